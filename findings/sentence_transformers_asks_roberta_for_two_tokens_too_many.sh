#!/bin/sh
# A RoBERTa folder whose tokenizer has no limit: Sentence Transformers takes max_position_embeddings (130) for the longest text, but the
# table begins with two rows for padding, so that 128 tokens are the most. Long texts are truncated to 130 tokens, and fail in the model.
# Seen: max_seq_length 130; 128 tokens are encoded; a long text raises RuntimeError: index 130 is out of bounds for dimension 1 with size 130
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0
"$work/venv/bin/python" - <<'PY'
import sys, tempfile
import sentence_transformers, torch, transformers
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel
print("torch", torch.__version__, "transformers", transformers.__version__, "sentence-transformers", sentence_transformers.__version__)
names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a"])}, unk_token="<unk>"))
words.pre_tokenizer, words.post_processor = pre_tokenizers.Whitespace(), processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
folder = tempfile.mkdtemp()
PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
RobertaModel(RobertaConfig(
    vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=130,
    pad_token_id=1, type_vocab_size=1)).save_pretrained(folder)
encoder, raised = SentenceTransformer(folder, device="cpu"), ""
fits = encoder.encode("a " * 126).shape
try:
    encoder.encode("a " * 500)
except (IndexError, RuntimeError) as error:
    raised = f"{type(error).__name__}: {error}"
print("max_seq_length", encoder.max_seq_length, "- 128 tokens give", fits, "- a long text:", raised)
seen = encoder.max_seq_length == 130 and fits == (16,) and bool(raised)
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
