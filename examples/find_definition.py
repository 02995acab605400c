r"""Does a decoder that reads a code base find a definition of another file?

Files of a package stand one behind the other, and behind them the question how a function of theirs
begins. Its signature is there word for word, as far back as its file. Asked are the dense model,
sparse ones with the same weights, and the dense model without the code, which has to guess.

    python examples/find_definition.py                         # SmolLM2, 4,096 tokens of this package's plans
    python examples/find_definition.py --model your/coder --package transformers.utils --length 32768 \
        --window 1024 --out found.json --plot found.png
    python examples/find_definition.py --tiny                  # seconds, with a random model

It prints the loss of signatures, and how many are said word for word. Without --model it needs the
checkpoint `smollm2` in the cache, or fetches it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples.checkpoints import checkpoint
from examples.remember import cache_name, opened
from examples.studies import DEVICE, canvas, keep, save
from sparse_hf.bench import environment

# shorter signatures say too little
SHORTEST, PIECE = 16, 1024
# the layers of SmolLM2 by which answers move most, as `sparse-hf tune` found at 8,192 tokens
CHOSEN = "7-8=dense, 14-15=dense, 17-18=dense, 20=dense, 23=dense"


@dataclass(frozen=True)
class Definition:
    """A function, its signature from behind the bracket on, and where its line begins in the text."""

    name: str
    signature: str
    at: int


def files(package: str) -> list[tuple[str, str]]:
    """Names and texts of the modules of a package, the shortest first, so that many of them fit.

    Raises:
        ValueError: there is no such package.
    """
    found = importlib.util.find_spec(package) if importlib.util.find_spec(package.partition(".")[0]) else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"{package!r} is no package that can be imported here; give one of several files")
    paths = sorted(Path(found.submodule_search_locations[0]).glob("*.py"), key=lambda path: path.stat().st_size)
    return [(path.name, path.read_text(encoding="utf-8")) for path in paths]


def definitions(text: str) -> list[Definition]:
    """Functions whose signatures are on one line of the text, and are defined once, in the order of the text."""
    lines, begins = text.split("\n"), [0]
    for line in lines:
        begins.append(begins[-1] + len(line) + 1)
    found = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        line = lines[node.lineno - 1]
        head = f"def {node.name}("
        if line.startswith(head) and line.endswith(":") and len(line) - len(head) >= SHORTEST:
            found.append(Definition(node.name, line[len(head) :], begins[node.lineno - 1]))
    return [one for one in found if text.count(f"def {one.name}(") == 1]


def code_base(package: str, length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """As many whole files as have `length` tokens together, and their number.

    Raises:
        ValueError: not two of them do.
    """
    text, count = "", 0
    for name, content in files(package):
        # a module's imports from __future__ have to stand first, in no text of several
        content = content.replace("from __future__ import annotations\n", "")
        longer = f"{text}# file: {name}\n{content}\n"
        if len(tokenizer(longer, verbose=False).input_ids) > length:
            break
        text, count = longer, count + 1
    if count < 2:
        raise ValueError(f"{length:,} tokens do not hold two files of {package}; give a longer --length")
    return text, count


@torch.inference_mode()
def asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, wanted: list[Definition]
) -> list[dict]:
    """For each definition its distance in tokens, the loss of its signature, and whether it is the likeliest.

    The text is read once, and questions behind it are asked as if the others never were.
    """
    cache, name = DynamicCache(config=model.config), cache_name(model)

    def read(ids: Tensor) -> Tensor:
        return model(input_ids=ids[None], use_cache=True, **{name: cache}).logits[0].float()

    code = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(code.input_ids, device=model.device)
    for piece in ids.split(PIECE):
        model(input_ids=piece[None], use_cache=True, logits_to_keep=1, **{name: cache})
    begins, found = torch.tensor([begin for begin, _ in code.offset_mapping]), []
    for one in wanted:
        question = tokenizer(f"\n# {one.name}, as it is defined above:\ndef {one.name}(", add_special_tokens=False)
        answer = torch.tensor(tokenizer(one.signature, add_special_tokens=False).input_ids, device=model.device)
        row = torch.tensor([*question.input_ids, *answer.tolist()], device=model.device)
        said = read(row)[len(question.input_ids) - 1 : -1]
        cache.crop(-len(row))
        found.append({
            "name": one.name,
            "distance": int((begins >= one.at).sum()),
            "loss": float(cross_entropy(said, answer)),
            "said": bool((said.argmax(-1) == answer).all()),
        })  # fmt: skip
    return found


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict:
    text, count = code_base(args.package, args.length, tokenizer)
    wanted = definitions(text)[:: args.every]
    if not wanted:
        raise ValueError(
            f"no function of the {count} files of {args.package} that {args.length:,} tokens hold has its whole signature on one line; "
            "give a longer --length, or another --package"
        )
    sinks = f"window({args.window - 1}, 0) | first(4)"
    ways = {
        "dense": (None, None), "window and sinks": (sinks, None), "every fourth layer dense": (sinks, "0-/4=dense"),
    }  # fmt: skip
    if args.layers:
        ways["chosen layers dense"] = (sinks, args.layers)
    found = {"dense, without the code": asked(model, tokenizer, "\n", wanted)}
    for name, (pattern, layers) in ways.items():
        given = model if pattern is None else sparse_hf.sparsify(model, pattern, layers=layers).eval()
        found[name] = asked(given, tokenizer, text, wanted)
        print(f"{name}: read", flush=True)
    ways = {name: {**summary(rows), "questions": rows} for name, rows in found.items()}
    tokens = len(tokenizer(text, verbose=False).input_ids)
    said = {"package": args.package, "files": count, "tokens": tokens, "window": args.window, "layers": args.layers}
    return {**said, "ways": ways}


def summary(rows: list[dict]) -> dict:
    return {"loss": sum(row["loss"] for row in rows) / len(rows), "said": sum(row["said"] for row in rows) / len(rows)}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A decoder: a folder or a hub id.")
    parser.add_argument("--tiny", action="store_true", help="A random model of two layers.")
    parser.add_argument("--package", default="sparse_hf.plan", help="Its modules are read, without its subpackages.")
    parser.add_argument("--length", type=int, default=4096, help="Tokens of code, at most.")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--layers", help=f"A further way: these layers stay dense; for SmolLM2 {CHOSEN!r}.")
    parser.add_argument("--every", type=int, default=1, help="Ask for every n-th definition.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    folder = args.model or (None if args.tiny else str(checkpoint("smollm2")))
    if args.layers is None and not args.model and not args.tiny:
        args.layers = CHOSEN
    found = {"environment": environment(DEVICE), "model": Path(folder or "tiny").name}
    model, tokenizer = opened(folder, args.tiny)
    found |= measure(model.to(DEVICE), tokenizer, args)
    questions = len(next(iter(found["ways"].values()))["questions"])
    print(f"{found['tokens']:,} tokens of {found['files']} files of {args.package}, {questions} definitions")
    for name, way in found["ways"].items():
        print(f"  {name}: loss {way['loss']:.2f}, word for word {way['said']:.0%}")
    return keep(found, args, plot)


def plot(found: dict, path: Path) -> None:
    """The loss of each signature by how far back it stands."""
    title = f"{found['model']}, window {found['window']}:\nsignatures of {found['package']}, {found['tokens']:,} tokens"
    figure, (axis,) = canvas(1, title)
    # without the code nothing is far
    places = [row["distance"] for row in found["ways"]["dense"]["questions"]]
    for (name, way), marker in zip(found["ways"].items(), ".osx^", strict=False):
        losses = [row["loss"] for row in way["questions"]]
        axis.plot(places, losses, marker=marker, label=f"{name} ({way['loss']:.2f})")
    axis.axvline(found["window"], color="grey", linestyle=":", label="the window")
    axis.set(xlabel="tokens between definition and question", ylabel="loss of the signature")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    save(figure, path)


if __name__ == "__main__":
    main()
