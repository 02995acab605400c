#!/bin/sh
# AutoTokenizer takes the class of a tokenizer by the model type in config.json too: the same tokenizer.json and tokenizer_config.json
# (tokenizer_class LlamaTokenizer) give other token ids in a folder of type llama than in one of type mistral, without a warning. For
# mistral and others the declared class is passed over, and tokenizer.json taken as it is.
# Seen: llama LlamaTokenizer [6, 7, 6, 4]; mistral TokenizersBackend [3, 7, 6, 4]
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import json, sys, tempfile
import torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
print("torch", torch.__version__, "transformers", transformers.__version__)
vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "\u2581": 5, "\u2581a": 6, "\u2581b": 7}
words = Tokenizer(models.BPE(vocab, [("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
found = {}
for kind in ("llama", "mistral"):
    folder = tempfile.mkdtemp()
    words.save(f"{folder}/tokenizer.json")
    declared = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, values in (("tokenizer_config", declared), ("config", {"model_type": kind})):
        with open(f"{folder}/{name}.json", "w") as file:
            json.dump(values, file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[kind] = type(tokenizer).__name__, tokenizer("a b ab").input_ids
print("; ".join(f"{kind} {name} {ids}" for kind, (name, ids) in found.items()))
seen = found == {"llama": ("LlamaTokenizer", [6, 7, 6, 4]), "mistral": ("TokenizersBackend", [3, 7, 6, 4])}
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
