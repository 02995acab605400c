#!/bin/sh
# A cache that is handed to `generate` of a model whose configuration says use_cache=False (MPT's does by default, and many saved after
# gradient checkpointing): every pass is over the whole text and writes all of it to the cache again. Later tokens are
# others than without a cache, without a warning, in Transformers 5.17 and 5.24. With use_cache=True they are the same.
# Seen, 5.24, a prompt of 12 tokens and 8 new ones: [2, 7, 16, 54, 35, 58, ...], with a cache [2, 7, 16, 54, 19, 28, ...]
# and 124 tokens in it, of which 19 were read
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5,
    eos_token_id=None, bos_token_id=1, pad_token_id=0, use_cache=False)).eval()
ids = torch.randint(4, 60, (1, 12), generator=torch.Generator().manual_seed(1))
found = {}
for how in ("no cache", "a cache", "a cache and use_cache=True"):
    cache = None if how == "no cache" else DynamicCache(config=model.config)
    given = {"use_cache": True} if "True" in how else {}
    made = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **given)[0, 12:].tolist()
    found[how] = made, cache.get_seq_length() if cache is not None else 0
    print(f"{how}: {made}, {found[how][1]} tokens in the cache")
right, given, asked = found["no cache"], found["a cache"], found["a cache and use_cache=True"]
seen = asked == (right[0], 19) and given[0] != right[0] and given[1] > 19
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
