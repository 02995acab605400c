#!/bin/sh
# Mistral with sliding_window=1: `generate` with its default cache gives other tokens than without a cache.
# The growing cache keeps `keys[:, :, -sliding_window + 1:]`, and -0 keeps everything. sliding_window=2 and a static cache are right.
# Seen, of sliding_window=1: no cache [35, 23, 38, ...], default cache [35, 48, 23, ...], static cache [35, 23, 38, ...]
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import MistralConfig, MistralForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
ids = torch.randint(4, 60, (1, 12), generator=torch.Generator().manual_seed(0))
same = {}
for window in (1, 2, 3):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.5, sliding_window=window, eos_token_id=None, bos_token_id=1, pad_token_id=0)).eval()
    made = {}
    for name, how in (("no cache", {"use_cache": False}), ("default cache", {}), ("static cache", {"cache_implementation": "static", "disable_compile": True})):
        made[name] = model.generate(ids, max_new_tokens=8, do_sample=False, **how)[0, 12:].tolist()
        print(f"sliding_window={window} {name:13s} {made[name]}")
    same[window] = {name: tokens == made["no cache"] for name, tokens in made.items()}
seen = not same[1]["default cache"] and same[1]["static cache"] and all(all(same[w].values()) for w in (2, 3))
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
