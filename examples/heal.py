r"""Heal a converted decoder, by more pre-training or from the dense model.

All weights are trained, or LoRA.

    python examples/heal.py --model_name_or_path your/llama --pattern "window(255, 0) | first(4)" \
        --max_length 8192 --train_file corpus.jsonl --output_dir out --distil --lora_rank 16 \
        --edges 512 2048

    python examples/heal.py --tiny --use_cpu --distil --output_dir out --max_steps 20     # seconds

Perplexity is measured before and after, by position. Without files it trains on the chapters of a
novel.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.run_clm import collator, packed
from examples.training import checkpoint, leave, load_model, load_texts, parse
from sparse_hf.train import Distillation, NarrowingWindow, heal, lora_config


@dataclass
class HealingArguments:
    distil: bool = field(default=False, metadata={"help": "Learn from the dense model, which is loaded beside."})
    logits_weight: float = field(default=1.0, metadata={"help": "Of the dense model's answers in the loss."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Of the dense model's states in the loss."})
    temperature: float = field(default=2.0, metadata={"help": "By which the answers are flattened."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA; 0 trains all weights."})
    edges: list[int] = field(default_factory=list, metadata={"help": "Positions at which perplexity is told apart."})
    windows: list[int] = field(
        default_factory=list,
        metadata={"help": "Windows that layers see beside the pattern at first, from wide to narrow."},
    )
    narrowing_steps: int = field(default=100, metadata={"help": "Training steps over which these windows are spread."})


def main(arguments: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args, healing = parse(arguments, __doc__, HealingArguments)
    train, evaluation = load_texts(model_args, data_args)
    model, tokenizer = load_model(AutoModelForCausalLM, "decoder", model_args, training_args)
    teacher = None
    if healing.distil:
        dense = str(Path(training_args.output_dir) / "tiny") if model_args.tiny else model_args.model_name_or_path
        teacher = AutoModelForCausalLM.from_pretrained(dense)
        if teacher.config.model_type.startswith("sparse_"):
            raise ValueError(f"{dense} is sparse itself; --distil wants the dense model, with --pattern")
    length = model_args.length
    with training_args.main_process_first(desc="tokenizing"):
        train = packed(train, tokenizer, model, data_args, length)
        evaluation = packed(evaluation, tokenizer, model, data_args, length)
    weights = Distillation(logits=healing.logits_weight, hidden=healing.hidden_weight, temperature=healing.temperature)
    done = heal(
        model,
        train,
        training_args,
        teacher=teacher,
        distillation=weights if healing.distil else None,
        lora=lora_config(model, healing.lora_rank, 2 * healing.lora_rank) if healing.lora_rank else None,
        eval_dataset=evaluation,
        edges=healing.edges,
        callbacks=[NarrowingWindow(healing.windows, healing.narrowing_steps)] if healing.windows else [],
        data_collator=collator(model, tokenizer),
        resume_from_checkpoint=checkpoint(training_args),
    )
    metrics = {k: v for k, v in {**done.before, **done.after}.items() if "perplexity" in k}
    if training_args.should_save:
        done.model.save_pretrained(training_args.output_dir, state_dict=done.state_dict)
        tokenizer.save_pretrained(training_args.output_dir)
        Path(training_args.output_dir, "healing.json").write_text(json.dumps(metrics, indent=2))
    leave()
    return metrics


if __name__ == "__main__":
    main()
