#!/bin/sh
# Falcon with ALiBi (alibi=True, as falcon-rw-1b has it) does not generate with cache_implementation="static": a shape that does not fit.
# Its bias is of the tokens so far, and a static cache's keys and mask are of all its slots; with padding the mask is unpacked as of two
# dimensions and has four. The class says that it can be compiled with such a cache. Falcon with rotary positions, and BLOOM, generate.
# Seen: a RuntimeError without padding and a ValueError with it; the dynamic cache's tokens are those without a cache
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
SHARED = dict(vocab_size=97, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3)
falcon = dict(num_hidden_layers=2, num_attention_heads=4, **SHARED)
torch.manual_seed(0)
models = {
    "falcon, ALiBi": FalconForCausalLM(FalconConfig(alibi=True, **falcon)),
    "falcon, rotary": FalconForCausalLM(FalconConfig(alibi=False, **falcon)),
    "bloom, ALiBi": BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **SHARED)),
}
ids = torch.randint(4, 97, (2, 12))
found = {}
for name, model in models.items():
    for padding in (0, 3):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        ask = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
        wanted = model.eval().generate(ids, use_cache=False, **ask)
        for cache in ("dynamic", "static"):
            try:
                right = torch.equal(model.generate(ids, cache_implementation=cache, **ask), wanted)
                found[name, padding, cache] = "as without a cache" if right else "other tokens"
            except (RuntimeError, ValueError) as error:
                found[name, padding, cache] = f"{type(error).__name__}: {error}"
            print(f"{name:14s} {padding} of padding, {cache:7s}: {found[name, padding, cache]}")
fails = {case: said.split(":")[0] for case, said in found.items() if said != "as without a cache"}
seen = models["falcon, ALiBi"]._can_compile_fullgraph and fails == {
    ("falcon, ALiBi", 0, "static"): "RuntimeError", ("falcon, ALiBi", 3, "static"): "ValueError"}
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
