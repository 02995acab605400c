#!/bin/sh
# Two documents packed into one row of Llama, told apart by position_ids that begin anew: Transformers keeps them apart only if no
# attention_mask is given and use_cache=False is. With the default cache, with a mask of ones, or with cu_seq_lens instead of positions,
# which its default attention passes over, the second document attends to the first, without a warning; BERT attends so in every case.
# Seen: off from the documents alone: use_cache=False 0.0000, default 9.1636, mask of ones 9.1636, cu_seq_lens 6.7720, BERT 1.7440
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
print("torch", torch.__version__, "transformers", transformers.__version__)
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
def build(model, config, **more):
    torch.manual_seed(0)
    return model(config(**sizes, **more)).eval()
ids = torch.randint(4, 97, (1, 40), generator=torch.Generator().manual_seed(0))
positions = {"position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None]}
ends = torch.tensor([0, 25, 40], dtype=torch.int32)
lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 25, "max_length_k": 25}
llama, bert = build(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2), build(BertModel, BertConfig)
off = {}
for name, model, given in (
    ("use_cache=False", llama, {**positions, "use_cache": False}), ("default", llama, positions),
    ("mask of ones", llama, {**positions, "use_cache": False, "attention_mask": torch.ones_like(ids)}),
    ("cu_seq_lens", llama, {**lengths, "use_cache": False}), ("BERT", bert, positions),
):
    with torch.no_grad():
        alone = torch.cat([model(ids[:, :25])[0], model(ids[:, 25:])[0]], 1)
        off[name] = (model(ids, **given)[0] - alone).abs().max().item()
print("off from the documents alone:", ", ".join(f"{name} {value:.4f}" for name, value in off.items()))
seen = off.pop("use_cache=False") < 1e-4 and all(value > 0.1 for value in off.values())
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
