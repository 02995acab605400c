"""What the training examples share: their arguments, the model, and texts as `datasets`.

A dense model (`--pattern`) is converted into `output_dir/converted` first, which also gives it `--max_length` positions; a
sparse folder is trained as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

import sparse_hf
from examples import texts, tiny

logger = logging.get_logger("transformers.examples")
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
TINY = {
    "decoder": "window(7, 0) | first(2)",
    "encoder": "window(8, 8) | marked()",
    "encoder-decoder": "window(8, 8) | first(1)",
}


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
    dataset_config_name: str | None = None
    train_file: str | None = field(
        default=None, metadata={"help": "txt (a document a file), json, jsonl, csv or parquet."}
    )
    validation_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    streaming: bool = field(default=False, metadata={"help": "Read the data set while training; needs --max_steps."})
    max_eval_samples: int | None = 200


def parse(arguments: list[str] | None, *more, defaults: dict | None = None) -> tuple:
    """Model, data and training arguments from the command line (or from one .json file), then those of `more`."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, *more))
    parser.set_defaults(output_dir="out", save_total_limit=2, logging_steps=10, **(defaults or {}))
    if arguments is not None and len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0])
    parsed = parser.parse_args_into_dataclasses(arguments)
    data, training = parsed[1], parsed[2]
    if data.dataset_name and data.train_file:
        raise ValueError(
            f"both --dataset_name {data.dataset_name} and --train_file {data.train_file} are given; give one"
        )
    if data.streaming and training.max_steps <= 0:
        raise ValueError("--streaming knows no length of an epoch; say --max_steps")
    set_seed(training.seed)
    return parsed


def load_model(auto_class, kind: str, model_args: ModelArguments, training_args, **changes):
    """The sparse model and its tokenizer. `kind` says which model `--tiny` makes, see `tiny.config`."""
    with training_args.main_process_first(desc="converting the model"):
        source, pattern = _source(auto_class, kind, model_args, training_args, changes)
        if not _is_sparse(source) and (pattern is not None or _implies_pattern(source)):
            target = Path(training_args.output_dir) / "converted"
            if not target.exists():
                most = getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", None)
                grown = model_args.max_length if most is not None and model_args.max_length > most else None
                layers = model_args.layers
                sparse_hf.convert(source, target, pattern, layers=layers, max_length=grown, progress=False)
            source = str(target)
    if not _is_sparse(source):
        raise ValueError(
            f'{source} is dense; say which tokens may attend to which, --pattern "window(255, 0) | first(4)"'
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return auto_class.from_pretrained(source, **changes), tokenizer


def _source(auto_class, kind, model_args, training_args, changes) -> tuple[str, str | None]:
    if not model_args.tiny:
        return model_args.model_name_or_path, model_args.pattern
    folder = Path(training_args.output_dir) / "tiny"
    if not folder.exists():
        tokenizer = tiny.tokenizer(causal=kind == "decoder")
        tokenizer.save_pretrained(folder)
        tiny.model(auto_class, kind, len(tokenizer), **changes).save_pretrained(folder)
    return str(folder), model_args.pattern or TINY[kind]


def _is_sparse(source: str) -> bool:
    return AutoConfig.from_pretrained(source).model_type.startswith("sparse_")


def _implies_pattern(source: str) -> bool:
    """Longformer, BigBird and their like need no `--pattern`."""
    family = sparse_hf.FAMILIES.get(AutoConfig.from_pretrained(source).model_type)
    return family is not None and family.implies_pattern


def load_texts(model_args: ModelArguments, data_args: DataArguments) -> tuple[Dataset | IterableDataset, Dataset]:
    """Documents to train on and to evaluate on, with the columns of the source."""
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


def run(trainer, training_args, evaluate) -> dict[str, float]:
    """Train, going on from a checkpoint if asked, save, and evaluate. `--resume_from_checkpoint True` takes the last one."""
    if training_args.do_train or not training_args.do_eval:
        trainer.train(resume_from_checkpoint=checkpoint(training_args))
        trainer.save_model()
        trainer.save_state()
    metrics = evaluate(trainer)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics


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
