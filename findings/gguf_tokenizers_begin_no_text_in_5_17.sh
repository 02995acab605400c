#!/bin/sh
# A llama GGUF file whose header says add_bos_token: in Transformers 5.17 its tokenizer puts no <s> before a text; in 5.24 it does. The
# header is valid: gguf's own writer makes it and its reader gives the keys back. Gemma 3, which answers nonsense without <bos>, is read so too.
# Seen: 5.17.0 says ids [7, 7], 5.24.0 says ids [1, 7, 7]
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/m.py" <<'PY'
import sys
import gguf, transformers
from transformers import AutoTokenizer
writer = gguf.GGUFWriter(f"{sys.argv[1]}/m.gguf", "llama")
pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"]
for add, value in (
    ("context_length", 512), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 32), ("head_count", 4),
    ("head_count_kv", 4), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 1e4), ("rope_dimension_count", 8),
    ("vocab_size", len(pieces)), ("tokenizer_model", "llama"), ("token_list", pieces), ("token_scores", [-float(i) for i in range(len(pieces))]),
    ("token_types", [2, 3, 3, 1, 1, 1, 1, 1]), ("unk_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2), ("add_bos_token", True),
):
    getattr(writer, f"add_{add}")(value)
for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
    getattr(writer, step)()
said = gguf.GGUFReader(f"{sys.argv[1]}/m.gguf").fields["tokenizer.ggml.add_bos_token"].contents()
ids = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="m.gguf")("ab ab")["input_ids"]
print("transformers", transformers.__version__, "add_bos_token", said, "ids", ids)
seen = (ids[:1] == [1]) == (sys.argv[2] == "begins")
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 gguf==0.19.0 sentencepiece==0.2.3
"$work/venv/bin/python" "$work/m.py" "$work" begins-not
"$work/venv/bin/pip" install -q transformers==5.24.0
"$work/venv/bin/python" "$work/m.py" "$work" begins
