#!/bin/sh
# A BigBird decoder (is_decoder, full attention) generates other tokens with its cache, the default, than without in Transformers 5.17.
# In 5.24 they are the same.
# Seen: 5.17.0 same tokens: False; 5.24.0 same tokens: True
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cat > "$work/check.py" <<'PY'
import sys
import torch, transformers
from transformers import BigBirdConfig, BigBirdForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = BigBirdForCausalLM(BigBirdConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
    is_decoder=True, attention_type="original_full", pad_token_id=0, bos_token_id=1, eos_token_id=None)).eval()
ids = torch.randint(4, 97, (2, 20), generator=torch.Generator().manual_seed(0))
made = {cache: model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=cache)[:, 20:].tolist() for cache in (True, False)}
print("with cache", made[True], "\nwithout   ", made[False])
same = made[True] == made[False]
print("same tokens:", same)
seen = same == (transformers.__version__ != "5.17.0")
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
for version in 5.17.0 5.24.0; do
    "$work/venv/bin/pip" install -q transformers==$version
    "$work/venv/bin/python" "$work/check.py"
done
