r"""run_clm.py without Trainer: the loop by hand, see loop.py.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/run_clm_no_trainer.py \
        --model_name_or_path your/llama --pattern "window(255, 0) | first(4)" --max_length 8192 --output_dir out

    python examples/run_clm_no_trainer.py --tiny --use_cpu --output_dir out --max_steps 8     # seconds
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples import loop
from examples.run_clm import collator
from examples.training import parse


def main(arguments: list[str] | None = None) -> float:
    model_args, data_args, args = parse(arguments, __doc__, defaults={"max_steps": 100})
    return loop.train(AutoModelForCausalLM, "decoder", collator, model_args, data_args, args)


if __name__ == "__main__":
    main()
