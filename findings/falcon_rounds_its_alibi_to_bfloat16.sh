#!/bin/sh
# Falcon's ALiBi is made in bfloat16, whatever the dtype of the model: beyond 256 tokens it is rounded, and neighbours get the same bias
# or biases several slopes apart, where the same distance should have the same bias. BLOOM's, made in float32, is not.
# Seen: head 0 of 4, neighbours at 0..255: 0.2500 apart; at 512..767: from 0.0000 to 1.0000 apart; BLOOM's: 0.2500
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
print("torch", torch.__version__, "transformers", transformers.__version__)
tokens = torch.ones(1, 768, dtype=torch.long)
steps = [m.build_alibi_tensor(tokens, 4, torch.float32)[0, 0].diff() for m in (modeling_falcon, modeling_bloom)]
near, far, other = steps[0][:255], steps[0][512:], steps[1]
print(f"head 0 of 4, neighbours at 0..255: {near.max():.4f} apart; at 512..767: from {far.min():.4f} to {far.max():.4f} apart; "
      f"BLOOM's: {other.max():.4f}")
seen = bool((near == near[0]).all() and far.min() == 0 and far.max() > near.max() and (other == other[0]).all())
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
