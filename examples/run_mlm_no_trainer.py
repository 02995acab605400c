r"""run_mlm.py without Trainer: the loop by hand, see loop.py.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/run_mlm_no_trainer.py \
        --model_name_or_path your/bert --pattern "window(128, 128) | marked()" --max_length 4096 --output_dir out

    python examples/run_mlm_no_trainer.py --tiny --use_cpu --output_dir out --max_steps 8     # seconds
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from transformers import AutoModelForMaskedLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples import loop
from examples.run_mlm import MaskingArguments, collator
from examples.training import parse


def main(arguments: list[str] | None = None) -> float:
    model_args, data_args, args, masking = parse(arguments, __doc__, MaskingArguments, defaults={"max_steps": 100})
    collate = partial(collator, probability=masking.mlm_probability, seed=args.seed)
    return loop.train(AutoModelForMaskedLM, "encoder", collate, model_args, data_args, args)


if __name__ == "__main__":
    main()
