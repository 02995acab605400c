#!/bin/sh
# Prompt tuning of a Llama by peft 0.21.2, without padding: with its cache, the default, `generate` gives other tokens than without in
# Transformers 5.24, and no warning says so; in 5.17 they are the same. A step's cache is called `cache` since, and peft asks for
# `past_key_values`: it finds none, and puts the virtual tokens before every new token again.
# Seen: 5.17.0 same tokens: True; 5.24.0 same tokens: False
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/check.py" <<'PY'
import sys
import peft, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=None))
tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
ids = torch.randint(4, 97, (2, 30), generator=torch.Generator().manual_seed(0))
made, by_hand = {}, ids
for cache in (True, False):
    made[cache] = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache)
for _ in range(8):
    with torch.no_grad():
        by_hand = torch.cat([by_hand, tuned(input_ids=by_hand, attention_mask=torch.ones_like(by_hand)).logits[:, -1:].argmax(-1)], 1)
for name, tokens in (("with cache", made[True]), ("without", made[False]), ("by hand", by_hand)):
    print(f"{name:10s}", tokens[:, 30:].tolist())
same = torch.equal(made[True], made[False])
print("same tokens:", same)
seen = same == (transformers.__version__ == "5.17.0") and torch.equal(made[False], by_hand)
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
for version in 5.17.0 5.24.0; do
    "$work/venv/bin/pip" install -q torch==2.13.0 transformers==$version peft==0.21.2
    "$work/venv/bin/python" "$work/check.py"
done
