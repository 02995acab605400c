#!/bin/sh
# Dynamic NTK scaling of a Llama, generating past max_position_embeddings: with its cache, the default, it gives other tokens than without.
# The base of the angles grows with the length, and keys in the cache keep the angles of the length at which they came.
# Seen: of 24 new tokens the first 9 agree with dynamic scaling, all 24 with linear (position 32 comes with the ninth)
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
ids = torch.randint(4, 97, (1, 24), generator=torch.Generator().manual_seed(0))
agree = {}
for kind in ("dynamic", "linear"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=None, rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 4.0})).eval()
    with_cache, without = (model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=cache)[0, 24:] for cache in (True, False))
    print(f"{kind:8s} with cache {with_cache.tolist()}\n{kind:8s} without    {without.tolist()}")
    agree[kind] = int((with_cache == without).long().cumprod(0).sum())
print(f"of 24 new tokens the first {agree['dynamic']} agree with dynamic scaling, all {agree['linear']} with linear")
# the ninth new token is the first that lies past position 32
seen = 8 <= agree["dynamic"] < 24 and agree["linear"] == 24
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
