r"""Train a sparse decoder to predict the next token, on packed documents.

    python examples/run_clm.py --model_name_or_path your/llama --pattern "window(255, 0) | first(4)" \
        --max_length 8192 --train_file corpus.jsonl --output_dir out --num_train_epochs 1

    python examples/run_clm.py --tiny --use_cpu --output_dir out     # seconds

Reports perplexity. Without files it trains on the chapters of a novel.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.training import load_model, load_texts, parse, run
from sparse_hf.train import CheckedCollator, PackDocuments, PackedCollator, first_position


def packed(documents, tokenizer, model, data_args, length: int):
    """Tokenized documents as rows of `length` tokens, each document by itself."""

    def tokenize(examples):
        return {"input_ids": tokenizer(examples[data_args.text_column]).input_ids}

    columns = list(documents.features or next(iter(documents)))
    tokenized = documents.map(tokenize, batched=True, remove_columns=columns)
    pack = PackDocuments(length, first_position(model.config))
    return tokenized.map(pack, batched=True, remove_columns=["input_ids"])


def collator(model, tokenizer):
    """Pads packed rows, keeps documents apart, and refuses what the model cannot take."""
    made = PackedCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), causal=True)
    return CheckedCollator(made, model)


def perplexity(trainer) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {**metrics, "perplexity": math.exp(metrics["eval_loss"])}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(arguments, __doc__)
    train, evaluation = load_texts(model_args, data_args)
    model, tokenizer = load_model(AutoModelForCausalLM, "decoder", model_args, training_args)
    length = model_args.length
    with training_args.main_process_first(desc="tokenizing"):
        train = packed(train, tokenizer, model, data_args, length)
        evaluation = packed(evaluation, tokenizer, model, data_args, length)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collator(model, tokenizer),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    return run(trainer, training_args, perplexity)


if __name__ == "__main__":
    main()
