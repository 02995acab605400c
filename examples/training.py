"""What the training examples share: arguments, the model, and texts.

A dense model (`--pattern`) is converted into `output_dir/converted` first, which also gives it
`--max_length` positions; a sparse folder is trained as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

import sparse_hf
from examples import texts, tiny
from sparse_hf.models.hf.hearing import is_causal
from sparse_hf.train import MarkHeaders, TellAll

logger = logging.get_logger("transformers.examples")
Columns = list[tuple[str, str]]
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# LED has a pattern of its own
TINY = {"decoder": "window(7, 0) | first(2)", "encoder": "window(8, 8) | marked()", "encoder-decoder": None}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A folder or a hub id, dense or sparse."})
    pattern: str | None = field(
        default=None, metadata={"help": 'Makes a dense model sparse: "window(255, 0) | first(4)".'}
    )
    layers: str | None = field(default=None, metadata={"help": 'Layers with another pattern: "0-3=dense".'})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row; the model gets as many positions."})
    tiny: bool = field(default=False, metadata={"help": "A tiny random model and tiny texts: seconds on a CPU."})

    def __post_init__(self):
        if not self.tiny and self.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing; name a model, or try the example with --tiny")

    @property
    def length(self) -> int:
        """Tokens of a row; a tiny model has few positions."""
        return min(self.max_length, 128) if self.tiny else self.max_length


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which part of that data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "txt (a document a file), or json, jsonl, csv, parquet (a document a row)."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "By default a twentieth of the train file."})
    text_column: str = field(default="text", metadata={"help": "Where the texts are."})
    label_column: str = field(default="label", metadata={"help": "Where the labels are, for classification."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set while training; needs --max_steps."})
    max_eval_samples: int | None = field(default=200, metadata={"help": "Rows to evaluate on, 0 for all."})


@dataclass
class HeaderArguments:
    headers: str | None = field(default=None, metadata={"help": "A regular expression; what it matches is marked."})


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and tells the defaults of options."""


def parse(
    arguments: list[str] | None,
    about: str,
    *more,
    model=ModelArguments,
    training=TrainingArguments,
    defaults: dict | None = None,
) -> tuple:
    """Model, data and training arguments from the command line, then those of `more`.

    The command line may be one .json file.

    `about` is what `--help` begins with.
    """
    # Trainer's hundred options come last
    parser = HfArgumentParser((model, DataArguments, *more, training), description=about, formatter_class=Help)
    defaults = {"output_dir": "out", "save_total_limit": 2, "logging_steps": 10, **(defaults or {})}
    parser.set_defaults(**defaults)
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) == 1 and given[0].endswith(".json"):
        parsed = parser.parse_dict({**defaults, **json.loads(Path(given[0]).read_text(encoding="utf-8"))})
    else:
        parsed = parser.parse_args_into_dataclasses(given)
    data, training = parsed[1], parsed[-1]
    if data.dataset_name and data.train_file:
        raise ValueError(
            f"both --dataset_name {data.dataset_name} and --train_file {data.train_file} are given; give one"
        )
    if data.streaming and training.max_steps <= 0:
        raise ValueError("--streaming knows no length of an epoch; say --max_steps")
    set_seed(training.seed)
    return (*parsed[:2], training, *parsed[2:-1])


def load_model(auto_class, kind: str, model_args: ModelArguments, training_args, **changes):
    """The sparse model and its tokenizer.

    `kind` says which model `--tiny` makes, see `tiny.config`.

    Raises:
        ValueError: a family or head that is not supported, a dense model without a pattern, a
            sparse one with another, a pattern that cannot be read, fewer positions than a row
            has tokens, or an encoder that would learn next tokens.
    """
    with training_args.main_process_first(desc="converting the model"):
        source, pattern = _source(auto_class, kind, model_args, training_args, changes)
        config = AutoConfig.from_pretrained(source)
        family = sparse_hf.family_of(config.model_type)
        if family.config_class not in auto_class._model_mapping:
            raise ValueError(f"{source} is a {family.dense_type}, which {auto_class.__name__} has no model of")
        if config.model_type == family.dense_type:
            if pattern is None and not family.implies_pattern:
                raise ValueError(
                    f'{source} is dense; say which tokens may attend to which, --pattern "window(255, 0) | first(4)"'
                )
            source = _converted(source, family.positions.reach_of(config), pattern, model_args, training_args)
        elif pattern is not None or model_args.layers is not None:
            raise ValueError(f"{source} is sparse already and keeps its pattern; leave --pattern and --layers out")
    most = family.positions.reach_of(AutoConfig.from_pretrained(source))
    if most is not None and model_args.length > most:
        raise ValueError(
            f"rows have {model_args.length} tokens and {source} has {most} positions; ask for rows of {most}, or give the dense "
            "model, which gets more positions when it is converted"
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = auto_class.from_pretrained(source, **changes)
    if kind == "decoder" and not is_causal(model):
        raise ValueError(
            f"{model_args.model_name_or_path} is an encoder, whose tokens see those that they would have to foretell; train it with "
            "run_mlm.py, or for its task"
        )
    return model, tokenizer


def _converted(source: str, most: int | None, pattern: str | None, model_args: ModelArguments, training_args) -> str:
    """The folder of the sparse counterpart, made unless it is there.

    `most` is the positions of the source.
    """
    target = Path(training_args.output_dir) / "converted"
    grown = model_args.length if most is not None and model_args.length > most else None
    asked = {"source": source, "pattern": pattern, "layers": model_args.layers, "max_length": grown}
    record = target.with_name("converted.json")
    if target.exists():
        found = json.loads(record.read_text()) if record.exists() else "other arguments"
        if found == asked:
            return str(target)
        if get_last_checkpoint(training_args.output_dir):
            raise ValueError(
                f"{training_args.output_dir} has checkpoints of a model that was made with {found}, and {asked} is asked for; "
                "give another --output_dir"
            )
        logger.warning(f"{target} was made with {found}; it is made again with {asked}")
    target.parent.mkdir(parents=True, exist_ok=True)
    options = {"layers": model_args.layers, "max_length": grown, "overwrite": target.exists(), "progress": False}
    sparse_hf.convert(source, target, pattern, **options)
    # said last: a run that was killed before has not made what it was asked for
    record.write_text(json.dumps(asked))
    return str(target)


def _source(auto_class, kind, model_args, training_args, changes) -> tuple[str, str | None]:
    if not model_args.tiny:
        name = model_args.model_name_or_path
        if (os.path.isabs(name) or name.startswith(".")) and not os.path.isdir(name):
            raise ValueError(f"--model_name_or_path {name} is no folder")
        return name, model_args.pattern
    folder = Path(training_args.output_dir) / "tiny"
    if not folder.exists():
        tokenizer, part = tiny.tokenizer(causal=kind == "decoder"), folder.with_name("tiny.part")
        tokenizer.save_pretrained(part)
        tiny.model(auto_class, kind, len(tokenizer), **changes).save_pretrained(part)
        part.rename(folder)
    return str(folder), model_args.pattern or TINY[kind]


def load_texts(
    model_args: ModelArguments, data_args: DataArguments, columns: Columns | None = None
) -> tuple[Dataset | IterableDataset, Dataset]:
    """Documents to train on and to evaluate on, with the columns of the source.

    `columns` are those that there must be, and what asks for each; by default that of
    `--text_column`.

    Raises:
        ValueError: a column that is not there, or a file that cannot be read.
    """
    train, evaluation = _load_texts(model_args, data_args)
    for rows in (train, evaluation):
        found = list(rows.features or next(iter(rows)))
        for option, name in columns or [("--text_column", data_args.text_column)]:
            if name not in found:
                raise ValueError(f"{option} is {name!r}; the data set has {', '.join(found)}")
    return train, evaluation


def _load_texts(model_args, data_args) -> tuple[Dataset | IterableDataset, Dataset]:
    if model_args.tiny:
        return Dataset.from_list(tiny.texts(40)), Dataset.from_list(tiny.texts(10, seed=1))
    if data_args.dataset_name:
        found = load_dataset(data_args.dataset_name, data_args.dataset_config_name, streaming=data_args.streaming)
        train, evaluation = found["train"], found.get("validation", found.get("test"))
    elif data_args.train_file:
        train = _read(data_args.train_file, data_args.streaming)
        evaluation = _read(data_args.validation_file, False) if data_args.validation_file else None
    else:
        # chapters of a novel, the last tenth of which are kept for evaluation
        chapters = [{"text": text} for text in texts.moby_dick().split("\nCHAPTER ")]
        last = len(chapters) // 10
        train, evaluation = Dataset.from_list(chapters[:-last]), Dataset.from_list(chapters[-last:])
    if evaluation is None and isinstance(train, Dataset):
        halves = train.train_test_split(test_size=0.05, seed=0)
        train, evaluation = halves["train"], halves["test"]
    if evaluation is None:
        raise ValueError("a streamed data set without validation cannot be split; give --validation_file")
    if data_args.max_eval_samples:
        evaluation = Dataset.from_list(list(evaluation.take(data_args.max_eval_samples)))
    return train, evaluation


def _read(path: str, streaming: bool):
    kind = LOADERS.get(Path(path).suffix)
    if kind is None:
        raise ValueError(f"{path} ends in {Path(path).suffix!r}; known are {', '.join(LOADERS)}")
    options = {"sample_by": "document"} if kind == "text" else {}
    return load_dataset(kind, data_files=path, split="train", streaming=streaming, **options)


def find_headers(header_args: HeaderArguments, model, pad) -> MarkHeaders | None:
    """What finds the headers of `--headers`.

    Raises:
        ValueError: marks that the model's pattern does not speak of, or no regular expression.
    """
    if header_args.headers is None:
        return None
    if not model.config.uses_marks:
        raise ValueError(
            f"--headers {header_args.headers!r} marks tokens, and the model's pattern speaks of none; "
            'add marked() to it, --pattern "window(128, 128) | marked()"'
        )
    return MarkHeaders(pad, header_args.headers)


def tokenized(text: str, tokenizer, length: int, headers: MarkHeaders | None = None) -> dict:
    """One text as a row of tokens; with headers, their marks are a column."""
    row = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=headers is not None)
    if headers is None:
        return dict(row)
    marks = headers.marks({"text": text, **row}).long().tolist()
    row.pop("offset_mapping")
    return {**row, "global_attention_mask": marks}


def run(trainer, training_args, evaluate) -> dict[str, float]:
    """Train, going on from a checkpoint if asked, save, and evaluate.

    `--resume_from_checkpoint True` takes the last one.
    """
    with TellAll():
        if training_args.do_train or not training_args.do_eval:
            trainer.train(resume_from_checkpoint=checkpoint(training_args))
            if trainer.is_fsdp_enabled:
                # of the pieces that checkpoints keep, Trainer would save no model at all
                trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            trainer.save_model()
            trainer.save_state()
        metrics = evaluate(trainer)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    leave()
    return metrics


def leave() -> None:
    """Leave the group of processes together, when no wrapped model is held any more.

    Over gloo a process that goes while another still writes may abort it, and a wrapped model that
    is freed after the end of its group may wait for ever.
    """
    # Trainer and its model know each other
    gc.collect()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def checkpoint(training_args) -> str | None:
    asked = training_args.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("", "false"):
        return None
    if str(asked).lower() != "true":
        if not os.path.isdir(asked):
            raise ValueError(
                f"--resume_from_checkpoint {asked} is no folder; give a checkpoint, or True for the last one"
            )
        return str(asked)
    found = get_last_checkpoint(training_args.output_dir)
    logger.info(f"going on from {found or 'the beginning'}")
    return found
