#!/bin/sh
# Transformers' eager attention of a model in float64, with a row padded on the left: the answers of its real tokens are NaN. The mask holds
# the least float64, softmax is computed in float32, where that is -inf, and rows that see nothing become NaN; the next layer multiplies
# them by 0. float32, and sdpa in float64, are right.
# Seen: NaN at real tokens: float32 eager False, float64 eager True, float64 sdpa False
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
ids, mask = torch.randint(4, 97, (2, 40)), torch.ones(2, 40, dtype=torch.long)
mask[0, :10] = 0
nan = {}
for dtype, name in ((torch.float32, "eager"), (torch.float64, "eager"), (torch.float64, "sdpa")):
    model.to(dtype).set_attn_implementation(name)
    with torch.no_grad():
        nan[f"{dtype}".removeprefix("torch."), name] = bool(model(ids, attention_mask=mask).logits[0, 10:].isnan().any())
print("NaN at real tokens:", ", ".join(f"{' '.join(case)} {found}" for case, found in nan.items()))
seen = [case for case, found in nan.items() if found] == [("float64", "eager")]
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
