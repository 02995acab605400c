"""`evaluate`: what a model loses by a pattern, on the user's own texts, before anything is converted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..bench import environment
from ..pattern import Pattern, full
from .candidates import DENSE, Candidate, read_candidates
from .evaluation import Evaluation
from .pieces import Finished, Found, finish
from .probes.base import Setup
from .probes.table import check_names, choose
from .recall.table import choose_tasks
from .settings import Settings
from .subject import Contender, Subject, open_subject, tokenizer_of
from .texts import Sample, cut, read_texts
from .verdict import verdicts

# the folder of finished pieces within that of an evaluation
PIECES = "pieces"

Patterns = str | Path | Pattern | Candidate | Sequence[str | Path | Pattern | Candidate] | Mapping[str, str | Pattern]


def evaluate(
    model: PreTrainedModel | str | PathLike[str],
    patterns: Patterns = (),
    texts: str | Path | Sequence[str | Path] = (),
    *,
    probes: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
) -> Evaluation:
    """Measure what patterns cost a model in quality and what they save, beside its dense attention.

    The model stays as it is: candidates are sparse around its own weights. Everything is checked before the first forward pass.

    Args:
        model: a decoder or encoder in memory, dense or sparse, or its folder or hub id. A sparse one is a candidate itself.
        patterns: patterns, their texts, `"NAME: PATTERN; LAYERS"`, folders of sparse checkpoints, or a mapping from names.
        texts: what the model will read: texts, or paths of files. Each must have `settings.length` tokens.
        probes: any of divergence, perplexity, longppl, masked, embedding, coverage, recall, harness and cost; by default all that the
            model can be asked.
        tokenizer: by default that of the model's folder.
        out: a folder for finished pieces, `report.json` and `report.html`. What is there already is not done again, so that an
            interrupted evaluation goes on with the same call.
        settings: how much is read, see `Settings`.

    Returns:
        An `Evaluation`: `print(it)` gives the table and the verdicts, `it.result` all figures.

    Raises:
        ValueError: a pattern, text, probe or setting that does not fit; the message names it, and the remedy.
        FileNotFoundError: no such text or model.

    Examples:
        >>> text = "the court shall hear a party who owns land. " * 100
        >>> settings = Settings(length=128, progress=False)
        >>> found = evaluate("my-llama", "window(31, 0) | first(4)", [text], probes=["divergence"], settings=settings)
        >>> [one["candidate"] for one in found.result["verdicts"]]
        ['window(31, 0) | first(4)']
    """
    settings, names = settings or Settings(), None if probes is None else list(probes)
    check_names(names or ())
    setup = prepare(model, patterns, texts, tokenizer, settings)
    chosen, left_out = choose(names, setup)
    folder = None if out is None else Path(out)
    begin = time.perf_counter()
    pieces = [piece for probe in chosen for piece in probe.pieces(setup)]
    finished = finish(pieces, None if folder is None else folder / PIECES, settings.progress)
    results = {probe.name: probe.summary(setup, _of(probe.name, finished)) for probe in chosen}
    # tasks that a probe could not ask
    left_out |= {name: reason for of_probe in results.values() for name, reason in of_probe.pop("left_out", {}).items()}
    result = {
        "environment": environment(setup.subject.device),
        **_description(setup),
        "probes": results,
        "left_out": left_out,
        "verdicts": verdicts(setup, results),
        "seconds": {"of_all_pieces": sum(one.seconds for one in finished), "of_this_run": time.perf_counter() - begin},
    }
    evaluation = Evaluation(result)
    if folder is not None:
        evaluation.save(folder)
    return evaluation


def prepare(
    model: PreTrainedModel | str | PathLike[str],
    patterns: Patterns,
    texts: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Settings,
) -> Setup:
    """What probes look at, read and checked; arguments and errors are those of `evaluate`."""
    # what costs nothing is looked at first
    candidates, content = read_candidates(patterns), read_texts(texts)
    memo = {"tasks": choose_tasks(settings.tasks, settings.questions)}
    tokenizer = tokenizer or tokenizer_of(model)
    # texts are measured before any weight is read
    samples = cut(content, tokenizer, settings)
    subject = open_subject(model, candidates, tokenizer, settings)
    _check_lengths(subject, settings)
    _check_tokens(subject, samples)
    return Setup(subject, tuple(content), tuple(samples), settings, memo=memo)


def _of(probe: str, finished: Sequence[Finished]) -> list[Finished]:
    return [one for one in finished if one.probe == probe]


def _check_lengths(subject: Subject, settings: Settings) -> None:
    longest = max(settings.length, *settings.all_lengths)
    if subject.limit is not None and longest > subject.limit:
        raise ValueError(
            f"{longest:,} tokens are asked about, and {subject.name} has {subject.limit:,} positions; give a smaller length, or convert "
            f"it first with max_length={longest} (sparse-hf convert --max-length {longest}) and evaluate what is written"
        )


def _check_tokens(subject: Subject, samples: Sequence[Sample]) -> None:
    highest, known = max(int(one.ids.max()) for one in samples), subject.dense.model.config.get_text_config().vocab_size
    if highest >= known:
        raise ValueError(
            f"the tokenizer gives id {highest:,}, and {subject.name} has {known:,} tokens; give the tokenizer of the model (tokenizer=)"
        )


def _description(setup: Setup) -> Found:
    subject, config = setup.subject, setup.subject.dense.config
    return {
        "model": {
            "name": subject.name,
            "kind": subject.kind,
            "class": type(subject.dense.model).__name__,
            "parameters": subject.dense.model.num_parameters(),
            "layers": config.stacks[""],
            "heads": config.heads_of(""),
            "trained_length": subject.trained,
            "dtype": str(subject.dense.model.dtype).removeprefix("torch."),
        },
        "texts": [{"name": sample.name, "tokens": sample.ids.shape[1]} for sample in setup.samples],
        "settings": {
            "length": setup.settings.length,
            "lengths": list(setup.settings.all_lengths),
            "depths": list(setup.settings.depths),
            "repeats": setup.settings.repeats,
            "seed": setup.settings.seed,
        },
        "candidates": [_spelt(contender) for contender in subject.contenders],
    }


def _spelt(contender: Contender) -> Found:
    patterns = contender.config.layer_patterns("")
    return {"name": contender.name, "layers": [DENSE if text == str(full()) else text for text in patterns]}
