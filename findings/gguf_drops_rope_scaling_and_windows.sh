#!/bin/sh
# A llama GGUF file whose header says YaRN scaling (factor 4 of 128 tokens) and attention.sliding_window 16: Transformers loads it with
# plain angles and full attention, without a warning. The header is valid: gguf's own writer makes it and its reader gives the keys back.
# Seen: LlamaConfig {'rope_theta': 10000.0, 'rope_type': 'default'} sliding_window None
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 sentencepiece==0.2.3
"$work/venv/bin/python" - "$work" <<'PY'
import sys
import gguf, torch, transformers
from transformers import AutoConfig
print("torch", torch.__version__, "transformers", transformers.__version__)
writer = gguf.GGUFWriter(f"{sys.argv[1]}/m.gguf", "llama")
for add, value in (
    ("context_length", 512), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 32), ("head_count", 4),
    ("head_count_kv", 4), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 1e4), ("rope_dimension_count", 8), ("vocab_size", 64),
    ("rope_scaling_type", gguf.RopeScalingType.YARN), ("rope_scaling_factor", 4.0), ("rope_scaling_orig_ctx_len", 128),
    ("sliding_window", 16), ("tokenizer_model", "llama"), ("token_list", [f"t{i}" for i in range(64)]),
    ("token_scores", [0.0] * 64), ("token_types", [1] * 64),
):
    getattr(writer, f"add_{add}")(value)
for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
    getattr(writer, step)()
fields = gguf.GGUFReader(f"{sys.argv[1]}/m.gguf").fields
said = {key: fields[f"llama.{key}"].contents() for key in ("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window")}
config = AutoConfig.from_pretrained(sys.argv[1], gguf_file="m.gguf")
print("the file says", said)
print("Transformers reads", type(config).__name__, config.rope_parameters, "sliding_window", getattr(config, "sliding_window", None))
seen = config.rope_parameters["rope_type"] == "default" and getattr(config, "sliding_window", None) is None
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
