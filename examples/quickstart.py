"""The README's example on a tiny random model: no network, a second or two.

python examples/quickstart.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparse_hf

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
dense = LlamaForCausalLM(config).eval()
text = torch.randint(0, 256, (1, 1000))

# in memory, weights shared; the second layer stays dense
sparse = sparse_hf.sparsify(dense, "window(127, 0) | first(4)", layers="1=dense")
print(type(sparse).__name__, sparse.config.sparse_attention)

# exact: a window that holds everything gives what the dense model gives
whole = sparse_hf.sparsify(dense, "window(None, 0)")
print("largest difference to the dense model:", float((whole(text).logits - dense(text).logits).abs().max()))

with tempfile.TemporaryDirectory() as folder:
    dense.save_pretrained(f"{folder}/dense")
    sparse_hf.convert(f"{folder}/dense", f"{folder}/sparse", "window(127, 0) | first(4)", progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/sparse")
    print(
        "loaded:", type(loaded).__name__, "; generated:", loaded.generate(text[:, :9], max_new_tokens=5)[0, 9:].tolist()
    )
