#!/bin/sh
# `import transformers`, then a model class: sys.modules["transformers"] is now another object than the one imported first, because
# processing_utils runs the package's __init__ again. What is set on the one (`transformers.X = ...`) is not there on the other.
# Seen: one object before: True - one object after a model class: False - the mark is there: False
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers
print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.MARK = "set on the module that was imported first"
first = sys.modules["transformers"]
before = first is transformers
from transformers import BertModel
second = sys.modules["transformers"]
print("one object before:", before, "- one object after a model class:", second is first, "- the mark is there:", "MARK" in vars(second))
seen = before and second is not first and "MARK" not in vars(second)
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
