#!/bin/sh
# torchao's Float8WeightOnlyConfig turns a row of zeros into NaN: its scale, the row's maximum over that of float8, is 0. The head of a
# masked language model is tied to the embeddings, whose row for padding is 0, so that each prediction of BERT has a NaN, and its argmax
# is the padding token. Int8WeightOnlyConfig is right.
# Seen: NaN for tokens: Float8WeightOnlyConfig [0], Int8WeightOnlyConfig []; argmax is token 0: True, False
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 torchao==0.18.0
"$work/venv/bin/python" - <<'PY'
import copy, sys
import torch, torchao, transformers
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import BertConfig, BertForMaskedLM
print("torch", torch.__version__, "transformers", transformers.__version__, "torchao", torchao.__version__)
torch.manual_seed(0)
model = BertForMaskedLM(BertConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)).eval()
ids, nan, padding = torch.randint(4, 97, (2, 40)), {}, {}
for config in (Float8WeightOnlyConfig(), Int8WeightOnlyConfig()):
    quantized, name = copy.deepcopy(model), type(config).__name__
    quantize_(quantized, config)
    with torch.no_grad():
        logits = quantized(ids).logits
    nan[name] = logits.isnan().flatten(0, 1).any(0).nonzero().flatten().tolist()
    padding[name] = bool((logits.argmax(-1) == 0).all())
print("NaN for tokens:", nan, "- argmax is token 0:", padding)
seen = nan == {"Float8WeightOnlyConfig": [0], "Int8WeightOnlyConfig": []} and list(padding.values()) == [True, False]
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
