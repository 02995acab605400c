#!/bin/sh
# An attention function that is registered with Transformers' AttentionInterface, and has no mask function of the same name in
# AttentionMaskInterface, gets None for a mask: padding is attended to, without a warning. Here the function is
# Transformers' own for sdpa, under another name.
# Seen: row padded on the left: off by 9.2071; row without padding: off by 0.0000; with sdpa_mask registered: off by 0.0000
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)).eval()
ids, mask = torch.randint(4, 97, (2, 40)), torch.ones(2, 40, dtype=torch.long)
mask[0, :10] = 0
def logits(name):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits
wanted = logits("sdpa")
AttentionInterface.register("mine", sdpa_attention_forward)
alone = (logits("mine") - wanted).abs()
AttentionMaskInterface.register("mine", sdpa_mask)
both = (logits("mine") - wanted)[:, 10:].abs().max().item()
padded, whole = alone[0, 10:].max().item(), alone[1].max().item()
print(f"row padded on the left: off by {padded:.4f}; row without padding: off by {whole:.4f}; with sdpa_mask registered: off by {both:.4f}")
seen = padded > 1 and whole < 1e-4 and both < 1e-4
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
