#!/bin/sh
# Trainer with label_smoothing_factor shifts the labels of a decoder by looking the name of its class up in a table: a subclass of
# LlamaForCausalLM that adds nothing trains on unshifted labels, so to copy its input, without a warning.
# Seen: losses with smoothing 5.8233 (LlamaForCausalLM) and 5.8575 (subclass), without 5.8166 and 5.8166
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
"$work/venv/bin/python" - <<'PY'
import sys, tempfile
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
print("torch", torch.__version__, "transformers", transformers.__version__)
class MyDecoder(LlamaForCausalLM):
    pass
batch, losses = torch.randint(4, 97, (2, 40), generator=torch.Generator().manual_seed(0)), {}
for smoothing in (0.1, 0.0):
    for made in (LlamaForCausalLM, MyDecoder):
        torch.manual_seed(0)
        model = made(LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)).eval()
        given = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, label_smoothing_factor=smoothing, report_to="none")
        losses[smoothing, made] = Trainer(model, given).compute_loss(model, {"input_ids": batch, "labels": batch.clone()}).item()
print("losses with smoothing, without:", ", ".join(f"{loss:.4f}" for loss in losses.values()))
off = {smoothing: abs(losses[smoothing, LlamaForCausalLM] - losses[smoothing, MyDecoder]) for smoothing in (0.1, 0.0)}
seen = off[0.1] > 0.01 and off[0.0] < 1e-5
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
