#!/bin/sh
# Transformers' BigBird with block-sparse attention draws its random blocks in training only. In evaluation every random block is block 0,
# which is global already: with two random blocks its keys weigh three times in each softmax, and no other key is added. Evaluation agrees
# with dense attention where these keys count threefold, and is far from the attention that was trained.
# Seen: off from block 0 counted once 0.5595, three times 0.0000; off from training without dropout 1.4404
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import BigBirdConfig, BigBirdModel
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
n, size, count = 256, 16, 2
model = BigBirdModel(BigBirdConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.3,
    block_size=size, num_random_blocks=count, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False).eval()
ids = torch.randint(4, 97, (1, n))
block = torch.arange(n) // size
last = n // size - 1
near = (block[:, None] - block).abs() <= 1
ends = ((block[:, None] % last == 0) | (block % last == 0))
pairs = near | ends
def dense(weight):
    """Attention of the only layer, by hand, where keys of block 0 count `weight` times for queries between the ends."""
    layer = model.encoder.layer[0]
    own, state = layer.attention.self, model.embeddings(ids)
    q, k, v = (p(state).view(n, 4, 8).transpose(0, 1) for p in (own.query, own.key, own.value))
    times = torch.ones(n, n).masked_fill((block == 0) & (block[:, None] % last != 0), weight)
    scores = (q @ k.transpose(1, 2) / 8**0.5 + times.log()).masked_fill(~pairs, -torch.inf)
    mixed = layer.attention.output((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, n, 32), state)
    return layer.output(layer.intermediate(mixed), mixed)
with torch.no_grad():
    found = model(ids)[0]
    once, thrice = ((found - dense(weight))[:, 2 * size : -2 * size].abs().max().item() for weight in (1.0, 1.0 + count))
    trained = (found - model.train()(ids)[0]).abs().max().item()
print(f"off from block 0 counted once {once:.4f}, three times {thrice:.4f}; off from training without dropout {trained:.4f}")
seen = once > 0.01 and thrice < 1e-4 and trained > 0.1
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
