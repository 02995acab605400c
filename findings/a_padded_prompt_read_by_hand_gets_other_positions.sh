#!/bin/sh
# A batch that is padded on the left, read by `model(ids, attention_mask, past_key_values=cache)`, and then `generate` behind that cache:
# the padded row gets other tokens than from `generate` alone. `forward` counts positions from the start of the row, padding included,
# and `generate` from the first real token; each is right by itself, since rotary angles see distances only, and keys of one meet
# queries of the other. With position_ids given by hand (mask.cumsum(1) - 1) tokens are the same; a row without padding always has them.
# Seen: Llama, Qwen2 and Mistral, of 24 new tokens of the padded row fewer than 24 agree, all of the other row, and all with position_ids
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys, warnings
import torch, transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config
print("torch", torch.__version__, "transformers", transformers.__version__)
warnings.simplefilter("ignore")
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3)
seen = True
for config in (LlamaConfig(**SIZES), Qwen2Config(**SIZES), MistralConfig(**SIZES, sliding_window=None)):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt, question = torch.randint(4, 97, (2, 20)), torch.randint(4, 97, (2, 4))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    ids, ask = torch.cat((prompt, question), 1), dict(attention_mask=mask, max_new_tokens=24, do_sample=False)
    wanted = model.generate(ids, **ask)[:, 24:]
    for way in ("as it is", "position_ids"):
        cache = DynamicCache(config=config)
        given = {} if way == "as it is" else {"position_ids": (mask[:, :20].cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            model(prompt, attention_mask=mask[:, :20], past_key_values=cache, **given)
        found = model.generate(ids, past_key_values=cache, **ask)[:, 24:]
        same = (found == wanted).long().cumprod(1).sum(1).tolist()
        print(f"{config.model_type:8s} prompt read {way:13s}: of 24 new tokens the first {same[0]} agree in the padded row, {same[1]} in the other")
        seen &= same[1] == 24 and (same[0] < 24) == (way == "as it is")
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
