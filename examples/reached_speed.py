"""Speed of families that are no entry of the first table beside stock: sounds, pictures, learned sinks, values of another width.

Each piece is one call of `sparse-hf bench` and has a file of its own, written after every length. On a GPU in bf16 all of them take
some seven minutes, most of which FlexAttention compiles.

    python examples/reached_speed.py
    python examples/reached_speed.py --only whisper vit --out /tmp/results
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_hf.bench import chosen_device, environment, result_path, run_attention, run_models

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# DeepSeek V3: queries and keys of 192 numbers a head, values of 128
MLA = {"heads": 128, "head_dim": 192, "value_dim": 128}

PIECES: dict[str, Callable[..., Any]] = {
    # 30 and 300 s of sound
    "models-whisper": partial(run_models, ["whisper"], [1_500, 15_000]),
    # 224 x 224 and 2,048 x 2,048 pixels
    "models-vit": partial(run_models, ["vit"], [197, 16_385]),
    "attention-mla-triton": partial(
        run_attention, [4_096, 16_384, 65_536], "window(1023, 0)", backends=["triton"], **MLA
    ),
    "attention-mla-flex": partial(run_attention, [4_096, 16_384, 65_536], "window(1023, 0)", backends=["flex"], **MLA),
    # two layers with windows, then one with a window and one without, as in the model
    "models-gpt-oss-window": partial(run_models, ["gpt_oss_window"], [16_384, 65_536], layers=2),
    "models-gpt-oss": partial(run_models, ["gpt_oss"], [16_384, 65_536], layers=2),
}


def main(pieces: list[str], out: Path, device: str | None, **small: Any) -> int:
    """Run pieces; how many failed. What one of them raises is printed, and the next one runs."""
    out.mkdir(parents=True, exist_ok=True)
    facts, failed = environment(chosen_device(device)), 0
    for name in pieces:
        begin = time.perf_counter()
        try:
            PIECES[name](dtype="bf16", device=device, out=result_path(out, facts, name), **small)
        except Exception:  # noqa: BLE001 - a piece that no kernel of this machine can run must not end the others
            traceback.print_exc()
            failed += 1
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PIECES, default=list(PIECES), help="pieces to run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--device", help="cpu or cuda; by default the GPU if there is one")
    asked = parser.parse_args()
    sys.exit(main(asked.only, asked.out, asked.device))
