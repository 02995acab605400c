#!/bin/sh
# The vision tower of Phi-4 multimodal says is_causal = True in its attention, and reads whole images. Where no patch is padding it
# gets no mask, and its attention under sdpa is causal: the first patch sees no other one, and states are not those under eager.
# Seen: eager and sdpa differ by 2.2265; the first patch under sdpa, another last patch given: off by 0.0000, under eager: 0.1876
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import Phi4MultimodalVisionConfig, Phi4MultimodalVisionModel
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = Phi4MultimodalVisionModel(Phi4MultimodalVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=56, crop_size=56)).eval()
for weight in model.parameters():
    if weight.ndim > 1:
        weight.data.normal_(0, weight[0].numel() ** -0.5)
image = torch.randn(1, 3, 56, 56)
other = image.clone()
other[..., -14:, -14:] += 1
def states(name, pixels):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(pixels).last_hidden_state
off = (states("eager", image) - states("sdpa", image)).abs().max().item()
first = {name: (states(name, image) - states(name, other))[:, 0].abs().max().item() for name in ("sdpa", "eager")}
print(f"eager and sdpa differ by {off:.4f}; the first patch under sdpa, another last patch given: off by {first['sdpa']:.4f}, "
      f"under eager: {first['eager']:.4f}")
seen = off > 0.1 and first["sdpa"] == 0 and first["eager"] > 1e-3
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
