r"""What a bounded cache remembers of a long conversation.

Facts are told in turns, and asked for many turns later: of the dense model with a cache that keeps
all, and of sparse ones whose cache keeps the last tokens and the first four.

    python examples/remember.py --model your/llama --window 512 --out remember.json --plot remember.png
    python examples/remember.py --model your/llama --layers "7-8=dense, 14-15=dense"      # these keep all keys
    python examples/remember.py --tiny        # seconds, with a random model

It prints for each fact after how many tokens it was asked for, and how likely its answer was.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_hf
from examples import tiny
from examples.studies import keep
from sparse_hf.bench import environment

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kate", "Liam", "Mona", "Nick")
TALK = (
    "User: What did you do today?\nAssistant: I read a book about the sea, and then I went for a walk.\n",
    "User: Is it cold outside?\nAssistant: It is mild, and there is hardly any wind.\n",
    "User: Tell me about trees.\nAssistant: They grow slowly, give shade, and lose their leaves in autumn.\n",
)


@dataclass(frozen=True)
class Turn:
    """A turn of the conversation; `name` and `number` where it tells a fact."""

    text: str
    name: str | None = None
    number: str | None = None


def conversation(facts: int, between: int, seed: int = 0) -> list[Turn]:
    """Facts with so many turns of talk behind each."""
    draw, turns = random.Random(seed), []
    for name in draw.sample(NAMES, facts):
        number = str(draw.randrange(1000, 10000))
        text = (
            f"User: The room of {name} is {number}.\nAssistant: I will remember that the room of {name} is {number}.\n"
        )
        turns += [Turn(text, name, number), *(Turn(draw.choice(TALK)) for _ in range(between))]
    return turns


def cache_name(model: PreTrainedModel) -> str:
    """What this version of Transformers calls the argument for a cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def remembered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: list[Turn], window: int | None
) -> list[dict]:
    """For each fact its distance in tokens, the loss of its answer, and whether it is the likeliest.

    The whole conversation is read turn by turn into one cache, as a chat does.
    """
    cache = DynamicCache(config=model.config) if window is None else sparse_hf.StreamingCache(model.config)
    name = cache_name(model)
    place, read = {}, 0
    for turn in turns:
        ids = tokenizer(turn.text, return_tensors="pt", add_special_tokens=False).input_ids
        if turn.name:
            place[turn.name] = read
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
        read += ids.shape[1]
    found = []
    for turn in turns:
        if not turn.name:
            continue
        question = tokenizer(
            f"User: Which room has {turn.name}?\nAssistant: The room of {turn.name} is", add_special_tokens=False
        )
        answer = tokenizer(f" {turn.number}", add_special_tokens=False)
        ids = torch.tensor([[*question.input_ids, *answer.input_ids]])
        # each question is asked as if the others never were
        logits = model(input_ids=ids, use_cache=True, **{name: copy.deepcopy(cache)}).logits[0]
        wanted = torch.tensor(answer.input_ids)
        said = logits[len(question.input_ids) - 1 : -1].float()
        found.append({
            "name": turn.name,
            "distance": read - place[turn.name],
            "loss": float(cross_entropy(said, wanted)),
            "said": bool((said.argmax(-1) == wanted).all()),
        })  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A decoder: a folder or a hub id.")
    parser.add_argument("--tiny", action="store_true", help="A random model of two layers.")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--facts", type=int, default=6)
    parser.add_argument("--between", type=int, default=8, help="Turns of talk behind each fact.")
    parser.add_argument(
        "--layers", help="A further way: these layers stay dense, like '0-/4=dense', and keep all keys."
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    if not args.tiny and not args.model:
        parser.error("give --model, or --tiny")
    dense, tokenizer = opened(args.model, args.tiny)
    turns = conversation(args.facts, args.between)
    sinks = f"window({args.window - 1}, 0) | first(4)"
    models = {
        "dense": (dense, None),
        f"last {args.window}": (sparse_hf.sparsify(dense, f"window({args.window - 1}, 0)").eval(), args.window),
        f"last {args.window}, first 4": (sparse_hf.sparsify(dense, sinks).eval(), args.window),
    }
    if args.layers:
        model = sparse_hf.sparsify(dense, sinks, layers=args.layers).eval()
        models[f"last {args.window}, first 4, some layers dense"] = (model, args.window)
    results = {}
    for name, (model, window) in models.items():
        results[name] = remembered(model, tokenizer, turns, window)
        print(f"{name}: {sum(one['said'] for one in results[name])} of {len(results[name])} facts")
        for one in results[name]:
            print(f"  {one['distance']:6,} tokens ago: loss {one['loss']:.2f}{', said' if one['said'] else ''}")
    content = {
        "environment": environment(torch.device("cpu")),
        "model": Path(args.model or "tiny").name,
        "window": args.window,
        "layers": args.layers,
        "results": results,
    }
    return keep(content, args, plot)


def opened(name: str | None, is_tiny: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_tiny:
        tokenizer = tiny.tokenizer(causal=True)
        return tiny.model(AutoModelForCausalLM, "decoder", len(tokenizer), 4096).eval(), tokenizer
    assert name is not None
    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def plot(content: dict, path: Path) -> None:
    """The loss of each answer by how long ago its fact was told."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, found), marker in zip(content["results"].items(), "osx^", strict=False):
        axes.plot([one["distance"] for one in found], [one["loss"] for one in found], marker=marker, label=name)
    axes.axvline(content["window"], color="grey", linestyle=":", label="the window")
    axes.set(
        xlabel="tokens since the fact was told", ylabel="loss of the answer", title=f"What {content['model']} remembers"
    )
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
