"""Tiny random models with a tokenizer of bytes, and texts for them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_hf.evaluation import Settings
from tests.models.families import dense_model

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
VOCABULARY = 256 + len(SPECIAL)
TEXT = " ".join(
    f"The {colour} {thing} stands {where} and nobody asks why." for colour in ("red", "blue", "old", "tall", "quiet")
    for thing in ("house", "tree", "lamp", "clock") for where in ("by the river", "on the hill", "behind the church")
)  # fmt: skip
QUICK = Settings(length=96, lengths=(260,), depths=(0.5,), tasks=("passkey",), progress=False)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and none joined."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIAL, *alphabet))}, []))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    pad, begin, end, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=of_bytes, pad_token=pad, bos_token=begin, eos_token=end, mask_token=mask
    )


def tiny_model(head: str = "LlamaForCausalLM", **changes):
    return dense_model(head, vocab_size=VOCABULARY, **{"max_position_embeddings": 2048, **changes}).eval()
