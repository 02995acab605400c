r"""Train a sparse encoder to find answers in long documents, each read whole.

There are no strides, and no windows to vote among.

    python examples/run_qa.py --model_name_or_path your/bert --pattern "window(128, 128) | marked()" \
        --max_length 4096 --train_file train.jsonl --validation_file dev.jsonl --output_dir out

Rows are SQuAD's: question, context, answers = {"text": [...], "answer_start": [...]}, of which the
first is learned and asked for. Without files they ask which sentence of a paper's abstract,
introduction or conclusion names its challenge, approach or outcome, see papers.py. Every token of
the question is marked. Reports exact match and F1 of the answers' tokens (not of their words, as
SQuAD's own script does).
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples import tiny
from examples.papers import questions
from examples.training import load_model, load_texts, parse, run
from sparse_hf.train import MarkQuestion

COLUMNS = ("question", "context", "answers")
# tokens of the longest answer that is looked for: long sentences
LONGEST = 128


def encoded(rows, tokenizer, length: int):
    """Question and context as a pair; answers as their first and last token.

    Where there is no answer, they are the class token.
    """

    def encode(row):
        made = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=length, return_offsets_mapping=True
        )
        context = [i for i, sequence in enumerate(made.sequence_ids()) if sequence == 1]
        first = last = 0
        if row["answers"]["text"]:
            start = row["answers"]["answer_start"][0]
            end = start + len(row["answers"]["text"][0])
            # an answer that was cut off counts as none
            if made["offset_mapping"][context[-1]][1] >= end:
                spans = [(i, *made["offset_mapping"][i]) for i in context]
                inside = [i for i, a, b in spans if a < end and b > start]
                first, last = inside[0], inside[-1]
        made.pop("offset_mapping")
        return {**made, "start_positions": first, "end_positions": last}

    return rows.map(encode, remove_columns=rows.column_names)


def spans(starts: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """The likeliest first and last token of each row, at most `LONGEST` tokens apart."""
    found = []
    for start, end in zip(starts, ends, strict=True):
        # the best end for every start, in one table of rows of `LONGEST`
        behind = np.pad(end, (0, LONGEST - 1), constant_values=-np.inf)
        table = start[:, None] + np.lib.stride_tricks.sliding_window_view(behind, LONGEST)
        first, length = np.unravel_index(table.argmax(), table.shape)
        found.append((int(first), int(first + length)))
    return found


def metrics(prediction) -> dict[str, float]:
    """Exact match, and F1 of the tokens of the two spans."""
    starts, ends = prediction.predictions[:2]
    exact, overlap = [], []
    for found, right in zip(spans(starts, ends), zip(*prediction.label_ids, strict=True), strict=True):
        exact.append(found == (int(right[0]), int(right[1])))
        a, b = (collections.Counter(range(first, last + 1)) for first, last in (found, right))
        common = (a & b).total()
        overlap.append(2 * common / (a.total() + b.total()))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def load_rows(model_args, data_args) -> tuple[Dataset, Dataset]:
    if model_args.tiny:
        return Dataset.from_list(tiny.questions(200)), Dataset.from_list(tiny.questions(20, seed=1))
    if data_args.dataset_name or data_args.train_file:
        return load_texts(model_args, data_args, [("a column of SQuAD's rows", name) for name in COLUMNS])
    train, evaluation = questions("train"), questions("val")
    # papers have several rows each, one behind the other
    evaluation = evaluation.shuffle(seed=0)
    return train, evaluation.take(min(data_args.max_eval_samples or len(evaluation), len(evaluation)))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(arguments, __doc__)
    if data_args.streaming:
        raise ValueError("--streaming is of no use to rows that are read whole; leave it out")
    train, evaluation = load_rows(model_args, data_args)
    model, tokenizer = load_model(AutoModelForQuestionAnswering, "encoder", model_args, training_args)
    length = model_args.length
    with training_args.main_process_first(desc="tokenizing"):
        train, evaluation = (encoded(rows, tokenizer, length) for rows in (train, evaluation))
    pad = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=MarkQuestion(pad, tokenizer.sep_token_id) if model.config.uses_marks else pad,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    return run(trainer, training_args, Trainer.evaluate)


if __name__ == "__main__":
    main()
