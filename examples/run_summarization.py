r"""Train a sparse encoder-decoder to summarize long documents, each read whole.

Generated summaries are scored by ROUGE.

    python examples/run_summarization.py --model_name_or_path your/led --max_source_length 16384 \
        --max_target_length 256 --train_file train.jsonl --validation_file dev.jsonl \
        --output_dir out --num_beams 4

    python examples/run_summarization.py --model_name_or_path your/bart --max_source_length 8192 \
        --output_dir out --pattern "window(256, 256) | marked()" --layers decoder=dense

    python examples/run_summarization.py --tiny --use_cpu --output_dir out     # seconds

Rows have a text and a summary; without files they are papers, see papers.py. Of each text the first
token is marked where the pattern speaks of marks, as LED asks (arXiv:2004.05150, section 7), and
with `--headers` the section headers that match a regular expression too: in those papers
`--headers "^\d+(\.\d+)* [A-Z].*$"`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples import tiny
from examples.papers import papers
from examples.training import (
    HeaderArguments,
    ModelArguments,
    find_headers,
    load_model,
    load_texts,
    parse,
    run,
    tokenized,
)
from sparse_hf.train import Marks, tokens

logger = logging.get_logger("transformers.examples")
IGNORED = -100
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class SummarizationModelArguments(ModelArguments):
    # by the name that summarization knows it by
    max_length: int = field(init=False)
    max_source_length: int = field(
        default=1024, metadata={"help": "Tokens of a text; the model gets as many positions. The rest is cut off."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.max_length = self.max_source_length


@dataclass
class SummaryArguments(HeaderArguments):
    summary_column: str = field(default="summary", metadata={"help": "Where the summaries are."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a summary, given or generated."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of generation; by default the model's own."})
    source_prefix: str = field(default="", metadata={"help": 'What T5 is told before a text: "summarize: ".'})


@dataclass
class MarkFirst(Marks):
    """Marks the first token of each text, which is `<s>` where the tokenizer has one."""

    def marks(self, feature):
        return torch.arange(len(tokens(feature))) == 0


def encoded(rows, tokenizer, data_args, summary_args, length: int, headers):
    """Tokens of the text, with headers their marks, and labels of the summary."""

    def encode(row):
        source = tokenized(summary_args.source_prefix + row[data_args.text_column], tokenizer, length, headers)
        target = tokenizer(
            text_target=row[summary_args.summary_column], truncation=True, max_length=summary_args.max_target_length
        )
        return {**source, "labels": target["input_ids"]}

    return rows.map(encode, remove_columns=rows.column_names)


def rouge(tokenizer, count: int) -> Callable:
    """ROUGE-1, -2 and -L, and the mean number of generated tokens, of `count` rows.

    ROUGE is F1 in percent of stemmed English words.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)

    def decoded(ids):
        return tokenizer.batch_decode(np.where(ids == IGNORED, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def metrics(prediction) -> dict[str, float]:
        # behind them come those that several processes repeat to have batches alike, which
        # Seq2SeqTrainer keeps
        made, wanted = (decoded(ids[:count]) for ids in (prediction.predictions, prediction.label_ids))
        scores = [scorer.score(right, found) for right, found in zip(wanted, made, strict=True)]
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in made]
        return {
            **{name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE},
            "gen_len": float(np.mean(lengths)),
        }

    return metrics


def load_rows(model_args, data_args, summary_args) -> tuple[Dataset, Dataset]:
    if model_args.tiny:
        return Dataset.from_list(tiny.summaries(200)), Dataset.from_list(tiny.summaries(20, seed=1))
    if data_args.dataset_name or data_args.train_file:
        columns = [("--text_column", data_args.text_column), ("--summary_column", summary_args.summary_column)]
        return load_texts(model_args, data_args, columns)
    train, evaluation = papers("train"), papers("val")
    return train, evaluation.take(min(data_args.max_eval_samples or len(evaluation), len(evaluation)))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args, summary_args = parse(
        arguments,
        __doc__,
        SummaryArguments,
        model=SummarizationModelArguments,
        training=Seq2SeqTrainingArguments,
        defaults={"predict_with_generate": True},
    )
    if data_args.streaming:
        raise ValueError("--streaming is of no use to texts that are read whole; leave it out")
    if training_args.predict_with_generate and importlib.util.find_spec("rouge_score") is None:
        logger.warning("rouge_score is not installed: evaluation gives the loss and no ROUGE; pip install rouge-score")
        training_args.predict_with_generate = False
    with training_args.main_process_first(desc="reading the data"):
        train, evaluation = load_rows(model_args, data_args, summary_args)
    model, tokenizer = load_model(AutoModelForSeq2SeqLM, "encoder-decoder", model_args, training_args)
    most = getattr(
        model.config, "max_decoder_position_embeddings", getattr(model.config, "max_position_embeddings", None)
    )
    if most is not None and summary_args.max_target_length > most:
        raise ValueError(f"--max_target_length is {summary_args.max_target_length}; the decoder has {most} positions")
    # a decoder begins with a token of its own
    training_args.generation_max_length = training_args.generation_max_length or summary_args.max_target_length + 1
    training_args.generation_num_beams = training_args.generation_num_beams or summary_args.num_beams
    pad = DataCollatorForSeq2Seq(tokenizer, model=model)
    headers = find_headers(summary_args, model, pad)
    with training_args.main_process_first(desc="tokenizing"):
        train, evaluation = (
            encoded(rows, tokenizer, data_args, summary_args, model_args.length, headers)
            for rows in (train, evaluation)
        )
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        data_collator=MarkFirst(pad) if model.config.uses_marks else pad,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        compute_metrics=rouge(tokenizer, len(evaluation)) if training_args.predict_with_generate else None,
    )
    return run(trainer, training_args, Seq2SeqTrainer.evaluate)


if __name__ == "__main__":
    main()
