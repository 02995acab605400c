r"""Train a sparse encoder to fill in masked tokens, on packed documents.

    python examples/run_mlm.py --model_name_or_path your/bert --pattern "window(128, 128) | marked()" \
        --max_length 4096 --train_file corpus.jsonl --output_dir out

The class token of each document is marked, so that `marked()` is Longformer's global attention.
Reports perplexity of the masked tokens. Without files it trains on the chapters of a novel.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.run_clm import packed, perplexity
from examples.training import load_model, load_texts, parse, run
from sparse_hf.train import CheckedCollator, MarkTokens, PackedCollator, RepeatableCollator


@dataclass
class MaskingArguments:
    mlm_probability: float = field(default=0.15, metadata={"help": "The share of tokens that are masked."})


def collator(model, tokenizer, probability: float, seed: int) -> RepeatableCollator:
    """Masks tokens, keeps documents apart, and marks class tokens for `marked()`."""
    if tokenizer.mask_token is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no mask token; train the model with run_clm.py"
        )
    made = PackedCollator(DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability))
    made = MarkTokens(made, [tokenizer.cls_token_id]) if model.config.uses_marks else made
    return RepeatableCollator(CheckedCollator(made, model), seed)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args, masking = parse(arguments, __doc__, MaskingArguments)
    train, evaluation = load_texts(model_args, data_args)
    model, tokenizer = load_model(AutoModelForMaskedLM, "encoder", model_args, training_args)
    collate = collator(model, tokenizer, masking.mlm_probability, training_args.seed)
    length = model_args.length
    with training_args.main_process_first(desc="tokenizing"):
        train = packed(train, tokenizer, model, data_args, length)
        evaluation = packed(evaluation, tokenizer, model, data_args, length)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collate,
        callbacks=[collate],
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    return run(trainer, training_args, perplexity)


if __name__ == "__main__":
    main()
