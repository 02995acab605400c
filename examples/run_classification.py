r"""Train a sparse model to classify long documents, by accuracy and macro F1.

    python examples/run_classification.py --model_name_or_path your/bert --pattern "window(128, 128) | marked()" \
        --max_length 4096 --train_file train.jsonl --validation_file dev.jsonl --output_dir out

Rows have a text and a label; without files they are State of the Union addresses and their
speakers' parties, see sotu.py, evaluated on presidents that are not trained on: an exercise, of
which 182 speeches teach little. The class token is marked where the pattern speaks of marks, and
with `--headers` the section headers that match a regular expression too:
`--headers "^(Article|Section) \d+"`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples import sotu
from examples.training import HeaderArguments, find_headers, load_model, load_texts, parse, run, tokenized
from sparse_hf.train import MarkHeaders, MarkTokens


def metrics(prediction) -> dict[str, float]:
    found = prediction.predictions.argmax(-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, found),
        "f1": f1_score(prediction.label_ids, found, average="macro"),
    }


def encoded(documents, tokenizer, data_args, labels: dict, length: int, headers: MarkHeaders | None):
    """Tokens, the number of the label and, with headers, their marks."""

    def encode(example):
        row = tokenized(example[data_args.text_column], tokenizer, length, headers)
        return {**row, "labels": labels[example[data_args.label_column]]}

    return documents.map(encode, remove_columns=documents.column_names)


def load_rows(model_args, data_args) -> tuple[Dataset, Dataset]:
    columns = {"--text_column": data_args.text_column, "--label_column": data_args.label_column}
    if model_args.tiny or data_args.dataset_name or data_args.train_file:
        return load_texts(model_args, data_args, list(columns.items()))
    found = sotu.speeches()
    parts = ([found[i] for i in part] for part in sotu.split(found, seed=0))
    names = list(columns.values())
    return tuple(Dataset.from_list([dict(zip(names, (s.text, s.party), strict=True)) for s in part]) for part in parts)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args, header_args = parse(arguments, __doc__, HeaderArguments)
    if data_args.streaming:
        raise ValueError("--streaming hides which labels there are; leave it out for classification")
    train, evaluation = load_rows(model_args, data_args)
    names = sorted(set(train[data_args.label_column]))
    unknown = sorted(set(evaluation[data_args.label_column]) - set(names))
    if unknown:
        raise ValueError(f"rows to evaluate have the labels {unknown}; those to train on have {names}")
    model, tokenizer = load_model(
        AutoModelForSequenceClassification, "encoder", model_args, training_args, num_labels=len(names)
    )
    model.config.id2label = {i: str(name) for i, name in enumerate(names)}
    model.config.label2id = {str(name): i for i, name in enumerate(names)}
    length = model_args.length
    pad = DataCollatorWithPadding(tokenizer)
    headers = find_headers(header_args, model, pad)
    numbers = {name: i for i, name in enumerate(names)}
    with training_args.main_process_first(desc="tokenizing"):
        train, evaluation = (encoded(d, tokenizer, data_args, numbers, length, headers) for d in (train, evaluation))
    marks = model.config.uses_marks and tokenizer.cls_token_id is not None
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=MarkTokens(pad, [tokenizer.cls_token_id]) if marks else pad,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    return run(trainer, training_args, Trainer.evaluate)


if __name__ == "__main__":
    main()
