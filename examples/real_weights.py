"""Real checkpoints, dense beside sparse: the same answers under a window as long as the text, and what a narrow one costs.

A narrow window is also held against the dense model that is given the pattern as its mask. Every checkpoint is converted
by `sparse_hf.convert` and measured in a process of its own, in float32 on the CPU.

    python examples/real_weights.py
    python examples/real_weights.py --only rxnmapper minilm
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import sparse_hf
from examples.assets import CACHE, GUTENBERG, fetch
from examples.checkpoints import CHECKPOINTS, checkpoint
from sparse_hf.bench.measure import environment

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "real-weights.json"
# the front matter, table of contents and extracts come first
SKIPPED_CHARACTERS = 20_000
# logits of so many tokens at a time: all 2,048 of a large vocabulary would be 2 GB
CHUNK = 256
IGNORED = -100
# texts that are joined from shorter ones
ROWS = 16

# reactions that every textbook has, as reactants and reagents >> product
REACTIONS = """
CC(=O)O.NCc1ccccc1.CCN=C=NCCCN(C)C>>CC(=O)NCc1ccccc1
O=C(O)c1ccccc1.NC1CCCCC1.CCN=C=NCCCN(C)C>>O=C(NC1CCCCC1)c1ccccc1
OB(O)c1ccccc1.Brc1ccncc1.[Na+].[Na+].O=C([O-])[O-]>>c1ccc(-c2ccncc2)cc1
CC1(C)OB(c2ccc(F)cc2)OC1(C)C.Brc1cccc(C#N)c1.O=C([O-])[O-].[K+].[K+].C1COCCO1>>N#Cc1cccc(-c2ccc(F)cc2)c1
CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F
C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12
CC(C)(C)OC(=O)N1CCC(N)CC1.O=Cc1ccccc1.CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+].ClCCl>>CC(C)(C)OC(=O)N1CCC(NCc2ccccc2)CC1
CC(C)(C)OC(=O)N1CCN(c2ccc(F)cc2)CC1.O=C(O)C(F)(F)F.ClCCl>>Fc1ccc(N2CCNCC2)cc1
CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCCc1ccc(O)cc1.CCN(CC)CC.ClCCl>>CC(C)(C)OC(=O)NCCc1ccc(O)cc1
COC(=O)c1ccc(OC)cc1.[Li+].[OH-].C1CCOC1.O>>COc1ccc(C(=O)O)cc1
CCOC(=O)CCc1ccccc1.[Na+].[OH-].CCO>>O=C(O)CCc1ccccc1
O=C(O)c1ccc(Br)cc1.CO.O=S(=O)(O)O>>COC(=O)c1ccc(Br)cc1
O=C(Cl)c1ccccc1.Nc1ccc(Cl)cc1.c1ccncc1>>O=C(Nc1ccc(Cl)cc1)c1ccccc1
CS(=O)(=O)Cl.OCCc1ccccc1.CCN(CC)CC.ClCCl>>CS(=O)(=O)OCCc1ccccc1
Cc1ccc(S(=O)(=O)Cl)cc1.NCc1ccco1.c1ccncc1>>Cc1ccc(S(=O)(=O)NCc2ccco2)cc1
O=[N+]([O-])c1ccc(F)cc1.C1CCNCC1.O=C([O-])[O-].[K+].[K+].CS(C)=O>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1
O=[N+]([O-])c1ccc(N2CCOCC2)cc1.[H][H].[Pd].CCO>>Nc1ccc(N2CCOCC2)cc1
COc1ccc([N+](=O)[O-])cc1.[Fe].[NH4+].[Cl-].CCO.O>>COc1ccc(N)cc1
O=Cc1ccc(Cl)cc1.[BH4-].[Na+].CO>>OCc1ccc(Cl)cc1
COC(=O)c1cccc(Br)c1.[AlH4-].[Li+].C1CCOC1>>OCc1cccc(Br)c1
OCc1ccc(F)cc1.ClCCl.O=[Mn]=O>>O=Cc1ccc(F)cc1
Oc1ccccc1.BrCc1ccccc1.O=C([O-])[O-].[K+].[K+].CC(C)=O>>c1ccc(COc2ccccc2)cc1
Oc1ccc(Br)cc1.CI.O=C([O-])[O-].[Cs+].[Cs+].CN(C)C=O>>COc1ccc(Br)cc1
COc1ccc(Br)cc1.BrB(Br)Br.ClCCl>>Oc1ccc(Br)cc1
c1ccc(COc2ccc(C3CC3)cc2)cc1.[H][H].[Pd].CO>>Oc1ccc(C2CC2)cc1
Brc1ccccc1.C1COCCN1.CC(C)(C)[O-].[Na+].Cc1ccccc1>>c1ccc(N2CCOCC2)cc1
C#Cc1ccccc1.Ic1ccc(C(=O)OC)cc1.CCN(CC)CC.I[Cu]>>COC(=O)c1ccc(C#Cc2ccccc2)cc1
C[Mg]Br.O=C(c1ccccc1)c1ccccc1.C1CCOC1>>CC(O)(c1ccccc1)c1ccccc1
O=C1CCCCC1.NO.Cl.CCO>>ON=C1CCCCC1
CC(=O)c1ccccc1.O=Cc1ccc(OC)cc1.[Na+].[OH-].CCO>>COc1ccc(C=CC(=O)c2ccccc2)cc1
Cc1ccccc1.O=C1CCC(=O)N1Br.ClC(Cl)(Cl)Cl>>BrCc1ccccc1
Nc1ccccc1.O=C=Nc1ccccc1.ClCCl>>O=C(Nc1ccccc1)Nc1ccccc1
Clc1ncnc2[nH]ccc12.NCc1ccccc1.CCN(C(C)C)C(C)C.CC(C)O>>c1ccc(CNc2ncnc3[nH]ccc23)cc1
CC(C)(C)OC(=O)N[C@@H](Cc1ccccc1)C(=O)O.COC(=O)CN.CCN=C=NCCCN(C)C>>COC(=O)CNC(=O)[C@H](Cc1ccccc1)NC(=O)OC(C)(C)C
C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1
CC(C)(C)[Si](C)(C)Cl.OCC1CCCO1.c1c[nH]cn1.CN(C)C=O>>CC(C)(C)[Si](C)(C)OCC1CCCO1
""".strip().split("\n")
# mistakes that native writers make
SENTENCES = """
Yesterday I buyed a new car and drived it home.
Their going to bring there books over they're tomorrow.
She don't like the way he talk to her brother.
The informations that you sended me was very useful.
He is more taller then his older sister.
We was waiting for the bus when it begun to rain.
I have went to the store to many times this week.
Its a shame that the dog lost it's collar again.
The team have losed three games and than won two.
Him and me is going to visit our grandmother on sunday.
If I would of known, I would have came earlier.
There is many reasons why peoples move to the city.
The childrens was playing in the garden all day long.
She has wrote three books, but nobody have read them.
i think that paris is the most beautiful city.
You should of told me that your leaving so soon.
He catched the ball and throwed it back to us.
Everyone have there own opinion about this matter.
The letter was wrote by a man which lived next door.
We didn't saw nothing strange in the old house.
My friend he live in a small village near the sea.
The affect of the storm were felt for many days.
Who's book is this that was leaved on the table?
I can't hardly believe that she runned so far.
The news are good and the weathers is fine today.
A apple a day keep the doctor away, or so they says.
After he had ate the soup, he feeled much more better.
Less people come to the fair then in the passed.
The man that I spoke with him was not very friendly.
Where is you going with them heavy bags?
They has been living here since ten years.
She accepted the advise and payed the bill quickly.
The ship sinked before the captain could saved it.
I am agree with you that the price are too high.
He said me that he were tired and want to sleep.
This is the most easiest question of the hole test.
Neither of the boys have finished there work yet.
The sun rised over the hills and the birds singed.
""".strip().split("\n")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens; `real` is false at padding, `targets` says what each token is to predict."""

    text: str
    ids: Tensor
    real: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True)
class Measure:
    """What one pattern makes of one text."""

    name: str
    pattern: str
    batch: Callable[[PreTrainedTokenizerBase], Batch]


@dataclass(frozen=True)
class Case:
    auto: type
    measures: tuple[Measure, ...]


def book(name: str, skipped: int = 0) -> str:
    return (fetch(GUTENBERG) / name).read_text(encoding="utf-8", errors="replace")[skipped:]


def moby_dick() -> str:
    return book("moby_dick.txt", SKIPPED_CHARACTERS)


def running(text: str, title: str, rows: int, length: int, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The text from its beginning, for a decoder: each token predicts the next."""
    # what the tokenizer itself sets before a text
    start = tokenizer("").input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    step = length - len(start)
    table = torch.tensor([start + ids[at : at + step] for at in range(0, rows * step, step)])
    targets = torch.cat([table[:, 1:], torch.full((rows, 1), IGNORED)], 1)
    return Batch(title, table, torch.ones_like(table, dtype=torch.bool), targets)


def novel(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return running(moby_dick()[:16_000], "Moby Dick", 1, 2048, tokenizer)


def stories(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return running(book("bryant_stories.txt", 3_000)[:20_000], "Bryant, Stories to Tell", 8, 256, tokenizer)


def padded(texts: list[str], title: str, tokenizer: PreTrainedTokenizerBase) -> Batch:
    found = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    return Batch(title, found.input_ids, found.attention_mask.bool())


def paragraphs(tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Short and long ones together, so that most rows are padded."""
    found = [" ".join(text.split()) for text in moby_dick()[:20_000].split("\n\n")]
    return padded([text for text in found if text][:12], "paragraphs of Moby Dick", tokenizer)


def chapters(tokenizer: PreTrainedTokenizerBase) -> Batch:
    # 4,000 characters are more than 512 tokens
    text = moby_dick()
    return padded([text[at : at + 4_000] for at in range(0, 32_000, 4_000)], "Moby Dick", tokenizer)


def sentences(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return padded(SENTENCES, "sentences with mistakes", tokenizer)


def texts(tokenizer: PreTrainedTokenizerBase) -> Batch:
    # nine sentences have some 110 tokens, and the tagger was trained on 128 at most
    return padded(_shuffled_joins(SENTENCES, " ".join, 9), "nine sentences joined", tokenizer)


def long_texts(tokenizer: PreTrainedTokenizerBase) -> Batch:
    # each twice, to have more than 512 tokens
    return padded(_shuffled_joins(2 * SENTENCES, " ".join, 60), "sixty sentences joined", tokenizer)


def reactions(tokenizer: PreTrainedTokenizerBase) -> Batch:
    return padded(REACTIONS, "reactions", tokenizer)


def one_pot(tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Many reactions written as one, which fills all positions; nobody would run it."""

    def join(chosen: list[str]) -> str:
        sides = [reaction.split(">>") for reaction in chosen]
        return ">>".join(".".join(side) for side in zip(*sides, strict=True))

    # nine reactions have some 500 tokens
    return padded(_shuffled_joins(REACTIONS, join, 10), "ten reactions as one", tokenizer)


def _shuffled_joins(items: list[str], join: Callable[[list[str]], str], count: int) -> list[str]:
    draw = random.Random(0)
    return [join(draw.sample(items, count)) for _ in range(ROWS)]


def hidden_tokens(batch: Callable[[PreTrainedTokenizerBase], Batch]) -> Callable[[PreTrainedTokenizerBase], Batch]:
    """The same with every seventh token masked, for the model to find."""

    def masked(tokenizer: PreTrainedTokenizerBase) -> Batch:
        plain = batch(tokenizer)
        ends = torch.isin(plain.ids, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id]))
        seventh = (torch.arange(plain.ids.shape[1]) % 7 == 3) & plain.real & ~ends
        ids = plain.ids.masked_fill(seventh, tokenizer.mask_token_id)
        return Batch(plain.text, ids, plain.real, plain.ids.masked_fill(~seventh, IGNORED))

    return masked


LONG, NARROW = "window(511, 511)", "window(32, 32) | first(1)"


def decoder(batch: Callable = novel, long: str = "window(2047, 0)", narrow: str = "window(255, 0) | first(4)") -> Case:
    return Case(AutoModelForCausalLM, (Measure("long", long, batch), Measure("narrow", narrow, batch)))


def encoder() -> Case:
    return Case(AutoModel, (Measure("long", LONG, paragraphs), Measure("narrow", NARROW, chapters)))


def chemistry(auto: type, wrap: Callable = hidden_tokens) -> Case:
    return Case(
        auto,
        (
            Measure("long", LONG, wrap(reactions)),
            Measure("narrow", NARROW, wrap(one_pot)),
            Measure("narrow, as they come", NARROW, wrap(reactions)),
        ),
    )


CASES = {
    "smollm2": decoder(),
    "qwen2.5-coder-0.5b": decoder(),
    "gemma3-270m": decoder(),
    "stories15m": decoder(stories, "window(255, 0)", "window(63, 0) | first(4)"),
    "minilm": encoder(),
    "gte-small": encoder(),
    "rxnmapper": chemistry(AutoModelForMaskedLM),
    "rxnfp-mlm": chemistry(AutoModelForMaskedLM),
    "rxnfp-classifier": chemistry(AutoModelForSequenceClassification, lambda batch: batch),
    "distilbert-grammar": Case(
        AutoModelForTokenClassification,
        (
            Measure("long", LONG, sentences),
            Measure("narrow", NARROW, long_texts),
            Measure("narrow, as long as in training", NARROW, texts),
        ),
    ),
}
MPNET = "mpnet"


def measure(name: str) -> dict:
    """One checkpoint's entry."""
    case, dense_folder = CASES[name], checkpoint(name)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    # texts are cut here, so that a longer one is no reason to warn
    tokenizer.model_max_length = 1 << 30
    compare = compare_embeddings if case.auto is AutoModel else compare_predictions
    dense = load(case.auto, dense_folder)
    entry = {
        "package": CHECKPOINTS[name].package,
        "dense_class": type(dense).__name__,
        "parameters": dense.num_parameters(),
        "measures": [],
    }
    for pattern in dict.fromkeys(m.pattern for m in case.measures):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            folder = sparse_hf.convert(dense_folder, Path(scratch) / "sparse", pattern, progress=False)
            sparse = load(case.auto, folder)
        entry["sparse_class"] = type(sparse).__name__
        for m in (m for m in case.measures if m.pattern == pattern):
            print(f"  {name}: {m.name}, {pattern}", flush=True)
            batch = m.batch(tokenizer)
            found = compare(dense, sparse, batch)
            if m.name != "long":
                found |= compare_masked(dense, sparse, batch)
            entry["measures"].append({"name": m.name, "pattern": pattern, **sizes(batch), **found})
    return entry


def sizes(batch: Batch) -> dict:
    lengths = batch.real.sum(1)
    return {"text": batch.text, "rows": len(lengths), "longest": int(lengths.max()), "tokens": int(lengths.sum())}


def load(auto: type, folder: Path) -> PreTrainedModel:
    """In float32; a weight that is missing or left over raises, where Transformers would only warn."""
    # some bare encoders come without a pooler
    options = {"add_pooling_layer": False} if auto is AutoModel else {}
    model, found = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    left = {key for key in found["unexpected_keys"] if not key.startswith("pooler.")}
    if found["missing_keys"] or left or found["mismatched_keys"]:
        raise RuntimeError(f"{folder} does not fit {type(model).__name__}: {found}")
    return model.eval()


@torch.inference_mode()
def compare_predictions(dense: PreTrainedModel, sparse: PreTrainedModel, batch: Batch) -> dict:
    """What both say of each token that is no padding, or of each text."""
    largest = difference = 0.0
    labels, losses = ([], []), ([], [])
    targets = None if batch.targets is None else batch.targets[batch.real].split(CHUNK)
    for i, both in enumerate(zip(predictions(dense, batch), predictions(sparse, batch), strict=True)):
        largest = max(largest, float(both[0].abs().max()))
        difference = max(difference, float((both[0] - both[1]).abs().max()))
        for logits, chosen, lost in zip(both, labels, losses, strict=True):
            chosen.append(logits.argmax(-1))
            if targets is not None:
                lost.append(
                    torch.nn.functional.cross_entropy(logits, targets[i], reduction="sum", ignore_index=IGNORED)
                )
    labels = [torch.cat(chosen) for chosen in labels]
    same = labels[0] == labels[1]
    found = {
        "predictions": len(same),
        "same": float(same.float().mean()),
        "max_abs_diff": difference,
        "max_abs_dense": largest,
    }
    if targets is not None:
        wanted = torch.cat(targets)
        counted = wanted != IGNORED
        for which, chosen, lost in zip(("dense", "sparse"), labels, losses, strict=True):
            found[f"{which}_perplexity"] = float((sum(lost) / counted.sum()).exp())
            found[f"{which}_top1"] = float((chosen == wanted)[counted].float().mean())
    elif len(same) > len(batch.ids):
        # most tokens of a sentence are right, and label 0 says so
        edits = [chosen != 0 for chosen in labels]
        found |= {
            "dense_edits": int(edits[0].sum()),
            "sparse_edits": int(edits[1].sum()),
            "same_edits": int((same & edits[0]).sum()),
        }
    return found


@torch.inference_mode()
def compare_masked(dense: PreTrainedModel, sparse: PreTrainedModel, batch: Batch) -> dict:
    """The dense model with each layer's pattern as its mask must say what the sparse one says."""
    both = zip(predictions(dense, batch, masks(sparse, batch)), predictions(sparse, batch), strict=True)
    return {"masked_max_abs_diff": max(float((a - b).abs().max()) for a, b in both)}


def masks(sparse: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """[rows, 1, tokens, tokens], true where a query sees a key; one for each type of layers, if there are several."""
    config, length = sparse.config, batch.ids.shape[1]
    kinds = getattr(config, "layer_types", None) or ["all"] * config.num_hidden_layers
    at = torch.arange(length)
    found = {}
    for kind in dict.fromkeys(kinds):
        text = config.layer_pattern(kinds.index(kind), is_causal=hasattr(sparse, "lm_head"))
        seen = sparse_hf.Pattern.parse(text).allows(at[:, None], at[None, :])
        found[kind] = seen & batch.real[:, None, None, :]
    return found if len(found) > 1 else found.popitem()[1]


def predictions(model: PreTrainedModel, batch: Batch, mask: Tensor | dict | None = None) -> Iterator[Tensor]:
    """Logits [tokens or rows, classes] in chunks, of real tokens only; of a model without a head its last states."""
    mask = batch.real.long() if mask is None else mask
    if hasattr(model, "lm_head"):
        states = model.model(input_ids=batch.ids, attention_mask=mask, use_cache=False).last_hidden_state
        yield from (model.lm_head(part) for part in states[batch.real].split(CHUNK))
        return
    output = model(input_ids=batch.ids, attention_mask=mask)
    found = output.last_hidden_state if "last_hidden_state" in output else output.logits
    yield from (found[batch.real] if found.dim() == 3 else found).split(CHUNK)


@torch.inference_mode()
def compare_embeddings(dense: PreTrainedModel, sparse: PreTrainedModel, batch: Batch) -> dict:
    """Of tokens, and of texts as the mean over their tokens."""
    states = [
        model(input_ids=batch.ids, attention_mask=batch.real.long()).last_hidden_state for model in (dense, sparse)
    ]
    tokens = [s[batch.real] for s in states]
    texts = [(s * batch.real[..., None]).sum(1) / batch.real.sum(1, keepdim=True) for s in states]
    of_tokens, of_texts = torch.cosine_similarity(*tokens, dim=-1), torch.cosine_similarity(*texts, dim=-1)
    return {
        "max_abs_diff": float((tokens[0] - tokens[1]).abs().max()),
        "max_abs_dense": float(tokens[0].abs().max()),
        "token_cosine": float(of_tokens.mean()),
        "text_cosine": float(of_texts.mean()),
        "least_text_cosine": float(of_texts.min()),
    }


def refusal() -> dict:
    """MPNet computes attention by itself: what conversion says to a small one of random weights."""
    with tempfile.TemporaryDirectory() as scratch:
        config = MPNetConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        MPNetModel(config).save_pretrained(Path(scratch) / "dense")
        try:
            sparse_hf.convert(Path(scratch) / "dense", Path(scratch) / "sparse", NARROW, progress=False)
        except ValueError as error:
            return {"package": None, "dense_class": "MPNetModel", "weights": "random", "refused": str(error)}
    raise RuntimeError("an MPNet model was converted, though no pattern reaches its attention")


def in_own_process(name: str) -> dict:
    """Apart, so that all its memory is given back."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "entry.json"
        command = [sys.executable, __file__, "--measure", name, "--out", str(file)]
        if subprocess.run(command).returncode:
            raise SystemExit(f"measuring {name} failed")
        return json.loads(file.read_text())


def earlier(out: Path, here: dict) -> dict:
    """Entries of an earlier run on this machine with these versions."""
    if not out.exists():
        return {}
    found = json.loads(out.read_text())
    alike = all(found["environment"].get(key) == value for key, value in here.items() if key != "date")
    return found["checkpoints"] if alike else {}


def write(out: Path, content: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, out)


def table(entries: dict[str, dict]) -> Table:
    shown = Table(title="real weights, dense beside sparse")
    for column in (
        "checkpoint",
        "class",
        "pattern",
        "text",
        "tokens",
        "same argmax",
        "max |diff|",
        "from masked",
        "quality",
    ):
        shown.add_column(
            column, justify="right" if column in ("tokens", "same argmax", "max |diff|", "from masked") else "left"
        )
    for name, entry in entries.items():
        if "refused" in entry:
            shown.add_row(name, entry["dense_class"], "", "refused", "", "", "", "", entry["refused"].split(";")[0])
        for m in entry.get("measures", ()):
            same = f"{m['same']:.2%}" if "same" in m else ""
            tokens = f"{m['rows']} x {m['longest']}" if m["rows"] > 1 else str(m["longest"])
            shown.add_row(
                name,
                entry["sparse_class"],
                m["pattern"],
                m["text"],
                tokens,
                same,
                f"{m['max_abs_diff']:.1e}",
                f"{m['masked_max_abs_diff']:.1e}" if "masked_max_abs_diff" in m else "",
                quality(m),
            )
    return shown


def differs(m: dict) -> bool:
    """Beyond rounding, under a window as long as the text, or from the dense model with the pattern as its mask."""
    difference = m["max_abs_diff"] if m["name"] == "long" else m["masked_max_abs_diff"]
    return difference > 1e-3 * m["max_abs_dense"]


def quality(m: dict) -> str:
    if "text_cosine" in m:
        return f"cosine of texts {m['text_cosine']:.4f}, of tokens {m['token_cosine']:.4f}"
    if "same_edits" in m:
        return f"edits {m['dense_edits']} -> {m['sparse_edits']}, {m['same_edits']} the same"
    if "dense_perplexity" in m:
        return (
            f"perplexity {m['dense_perplexity']:.2f} -> {m['sparse_perplexity']:.2f}, "
            f"top-1 {m['dense_top1']:.1%} -> {m['sparse_top1']:.1%}"
        )
    return ""


def main() -> None:
    names = [*CASES, MPNET]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measure", choices=names, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.measure:
        write(arguments.out, refusal() if arguments.measure == MPNET else measure(arguments.measure))
        return
    here = environment(torch.device("cpu"))
    here["versions"] = {key: value for key, value in here["versions"].items() if value}
    here["versions"]["sparse-hf"] = sparse_hf.__version__
    entries = earlier(arguments.out, here) if arguments.only else {}
    chosen = arguments.only or names
    for i, name in enumerate(chosen, 1):
        print(f"{name} ({i} of {len(chosen)})", flush=True)
        entries[name] = in_own_process(name)
        ordered = {known: entries[known] for known in names if known in entries}
        # after each, so that a failure loses nothing
        write(arguments.out, {"environment": here, "dtype": "float32", "checkpoints": ordered})
    Console(width=200).print(table(ordered))
    print(f"written to {arguments.out}")
    unlike = [name for name in chosen if any(differs(m) for m in entries[name].get("measures", ()))]
    if unlike:
        raise SystemExit(f"dense and sparse differ where they should not: {', '.join(unlike)}")


if __name__ == "__main__":
    main()
