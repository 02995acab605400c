#!/bin/sh
# Gemma 2 caps the scores of its attention (attn_logit_softcapping). In Transformers 5.17 its default attention is sdpa, which leaves the
# cap out without a warning; 5.24 takes eager by default, and refuses sdpa.
# Seen: 5.17.0 default sdpa, off from eager by 4.6211; 5.24.0 default eager, off by 0.0000, sdpa refused: True
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cat > "$work/check.py" <<'PY'
import sys
import torch, transformers
from transformers import Gemma2Config, Gemma2ForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    initializer_range=0.3, query_pre_attn_scalar=8, attn_logit_softcapping=1.5)
model, refused = Gemma2ForCausalLM(config).eval(), False
ids, taken = torch.randint(4, 97, (2, 40)), model.config._attn_implementation
with torch.no_grad():
    default = model(ids).logits
    model.set_attn_implementation("eager")
    off = (default - model(ids).logits).abs().max().item()
try:
    Gemma2ForCausalLM._from_config(config, attn_implementation="sdpa")
except ValueError as error:
    refused = True
print(f"default {taken}, off from eager by {off:.4f}, sdpa refused: {refused}")
old = transformers.__version__ == "5.17.0"
seen = (taken == "sdpa" and off > 1 and not refused) if old else (taken == "eager" and off < 1e-4 and refused)
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
for version in 5.17.0 5.24.0; do
    "$work/venv/bin/pip" install -q transformers==$version
    "$work/venv/bin/python" "$work/check.py"
done
