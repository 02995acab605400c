#!/bin/sh
# A second turn with the cache of the first: `generate` reads the new tokens alone. With prefill_chunk_size it reads the whole prompt
# again behind what the cache holds, in Transformers 5.17, and gives other tokens, without a warning. In 5.24 they are the same.
# Seen, a prompt of 40 tokens of which a cache holds 30: at once [35, 58, 18, ...], 45 in the cache; in pieces of 8 [50, 17, 53, ...], 75
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5,
    eos_token_id=None, bos_token_id=1, pad_token_id=0)).eval()
ids = torch.randint(4, 60, (1, 40), generator=torch.Generator().manual_seed(1))
found = {}
for held in (0, 30):
    for how in ({}, {"prefill_chunk_size": 8}):
        cache = DynamicCache(config=model.config)
        if held:
            with torch.no_grad():
                model(ids[:, :held], past_key_values=cache)
        made = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, **how)[0, 40:].tolist()
        found[held, bool(how)] = made, cache.get_seq_length()
        print(f"{held} tokens in the cache before, {how or 'at once'}: {made}, {cache.get_seq_length()} after")
seen = found[0, True] == found[0, False] == found[30, False] and found[30, True][1] == 75 and found[30, True][0] != found[30, False][0]
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
