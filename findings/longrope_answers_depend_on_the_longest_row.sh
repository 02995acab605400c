#!/bin/sh
# LongRoPE (Phi-3) takes its long or short factors by the longest row of a batch: a text of 20 tokens, below the original limit of 32, gets
# other answers beside a text of 40 than alone or beside one of 30. The short row is padded on the right and its padding is masked.
# Seen: beside a text of 30 tokens: off by 0.0000; beside one of 40: off by 7.4697
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import Phi3Config, Phi3ForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = Phi3ForCausalLM(Phi3Config(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
    max_position_embeddings=128, original_max_position_embeddings=32, sliding_window=None, pad_token_id=0, eos_token_id=None,
    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4})).eval()
ids = torch.randint(4, 97, (2, 40), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[0, 20:] = 0
off = {}
with torch.no_grad():
    alone = model(ids[:1, :20]).logits
    for length in (30, 40):
        beside = model(ids[:, :length], attention_mask=mask[:, :length]).logits[:1, :20]
        off[length] = (beside - alone).abs().max().item()
print(f"beside a text of 30 tokens: off by {off[30]:.4f}; beside one of 40: off by {off[40]:.4f}")
seen = off[30] < 1e-4 and off[40] > 1
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
