"""The models of `sparse-hf bench models`: class, configuration and our pattern.

All have random weights, no dropout, and 1,024 words; encoders are of base size (12 heads of 64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pkgutil import resolve_name

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.bigbird.block_sparse import transformers_random_blocks
from ..plan import build_plan

VOCABULARY = 1024
# tokens on which ours and Transformers' class are compared before anything is timed: no length for
# which Transformers' BigBird draws a block twice
COMPARED_TOKENS = 1280
# how far from Transformers in float32 an implementation may be: so many times as far as
# Transformers' default is in the same dtype
ERROR_FACTOR = 2.0
# what Transformers slides a window with
SLIDING = ("sdpa", "flex_attention")
# what Transformers computes sinks with
SINKS = ("eager", "flex_attention")


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        model: the name of Transformers' class, or where it lies: "module:class".
        config: arguments of its configuration for a number of tokens and of layers.
        pattern: what ours is given, or a function that says it for a number of tokens; None where
            the family implies one.
        dense: does Transformers' model compute more pairs than ours? It is given a mask of ours
            where the two are compared.
        takes_mask: may that be its argument? If not, its `sdpa` attends by the mask meanwhile.
        reads: the argument and the shape of a picture or a sound of a number of tokens; None: words.
        compared: tokens on which the two are compared.
        peer_factor: how many times as far from float32 as the default in the same dtype another
            implementation of Transformers may be and is timed; its errors are in the result.
        global_tokens: marked tokens at the beginning.
        same: arguments of `sparsify` under which ours computes the very pairs that Transformers'
            class does, where those that are timed are other ones.
        implementations: Transformers' attention implementations that have a row each, the class's
            default first; None is the default without its name.
    """

    model: str
    config: Callable[[int, int], dict]
    pattern: str | Callable[[int], str] | None = None
    dense: bool = False
    takes_mask: bool = True
    reads: Callable[[int], tuple[str, tuple[int, ...]]] | None = None
    compared: int = COMPARED_TOKENS
    peer_factor: float = ERROR_FACTOR
    global_tokens: int = 0
    same: Callable[[PreTrainedConfig, int], dict] = lambda config, n: {}
    implementations: tuple[str | None, ...] = (None,)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return resolve_name(self.model if ":" in self.model else f"transformers:{self.model}")

    def pattern_of(self, n: int) -> str | None:
        """What ours is given for `n` tokens."""
        return self.pattern(n) if callable(self.pattern) else self.pattern

    def mask(self, n: int, device: torch.device) -> Tensor | None:
        """`[1, 1, n, n]`: our pairs, where Transformers' class computes more; else None."""
        pattern = self.pattern_of(n)
        if not self.dense:
            return None
        assert pattern is not None
        return build_plan(pattern, n, device=device).to_dense()


@contextmanager
def attending_by(mask: Tensor) -> Iterator[None]:
    """Have Transformers' `sdpa` attend by a mask, for classes that take none."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, attention_mask, **given):
        return plain(module, query, key, value, mask, **given)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _encoder(n: int, layers: int, **more) -> dict:
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": layers}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": VOCABULARY}
    return {**sizes, **plain, "max_position_embeddings": n + 2, **more}


def _longformer(n: int, layers: int) -> dict:
    return _encoder(n, layers, attention_window=[512] * layers)


def _big_bird(n: int, layers: int) -> dict:
    return _encoder(n, layers, block_size=64, num_random_blocks=3)


def _reformer(n: int, layers: int) -> dict:
    # the shape of axial positions: two numbers whose product is n, as equal as can be
    rows = next(f for f in range(int(n**0.5), 0, -1) if n % f == 0)
    chunks = {"lsh_attn_chunk_length": 64, "local_attn_chunk_length": 64, "num_hashes": 1, "num_buckets": None}
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "attention_head_size": 64, "feed_forward_size": 3072}
    names = ("hidden_dropout_prob", "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
    return {
        **chunks, **sizes, **dict.fromkeys(names, 0.0), "attn_layers": (["local", "lsh"] * layers)[:layers],
        "vocab_size": VOCABULARY, "max_position_embeddings": n, "axial_pos_shape": [rows, n // rows],
        "axial_pos_embds_dim": [256, 512], "is_decoder": False, "hash_seed": 0, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


def _perceiver(n: int, layers: int) -> dict:
    sizes = {
        "d_model": 768,
        "d_latents": 1280,
        "num_latents": 256,
        "self_attends_per_block": layers,
        "qk_channels": 256,
    }
    return {
        **sizes,
        "v_channels": 1280,
        "attention_probs_dropout_prob": 0.0,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": n,
    }


def _modernbert(n: int, layers: int) -> dict:
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1152, "num_hidden_layers": layers}
    return {**ids, **sizes, "vocab_size": VOCABULARY, "max_position_embeddings": n, "local_attention": 128}


def _mistral(n: int, layers: int) -> dict:
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2816}
    window = {"sliding_window": 1024, "use_cache": False, "max_position_embeddings": n}
    return {**sizes, **window, "num_hidden_layers": layers, "vocab_size": VOCABULARY}


def _llama_1b(n: int, layers: int) -> dict:
    # the shape of Llama 3.2 1B, without its vocabulary
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
    return {
        **sizes,
        "use_cache": False,
        "max_position_embeddings": n,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
    }


def _gpt2(n: int, layers: int) -> dict:
    plain = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "use_cache": False, "n_positions": n}
    return {**plain, "n_embd": 768, "n_head": 12, "n_layer": layers, "vocab_size": VOCABULARY}


def _gpt_oss(n: int, layers: int, **more) -> dict:
    # a layer of GPT-OSS 20B; of its experts as many as a token takes, so that none is chosen by a rounding
    sizes = {"hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
    experts = {"intermediate_size": 2880, "num_local_experts": 4, "num_experts_per_tok": 4}
    plain = {"vocab_size": VOCABULARY, "use_cache": False, "max_position_embeddings": n, "pad_token_id": 0}
    return {**sizes, **experts, **plain, "sliding_window": 128, "num_hidden_layers": layers, **more}


def _gpt_oss_window(n: int, layers: int) -> dict:
    return _gpt_oss(n, layers, layer_types=["sliding_attention"] * layers)


def _whisper(n: int, layers: int) -> dict:
    # the encoder of whisper-small; two frames of 10 ms are a position
    sizes = {"d_model": 768, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072, "encoder_layers": layers}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return {**sizes, **ids, "max_source_positions": n, "vocab_size": VOCABULARY}


def _spectrogram(n: int) -> tuple[str, tuple[int, ...]]:
    return "input_features", (80, 2 * n)


def _vit(n: int, layers: int) -> dict:
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": layers}
    return {**sizes, "patch_size": 16, "image_size": 16 * _side(n)}


def _picture(n: int) -> tuple[str, tuple[int, ...]]:
    return "pixel_values", (3, 16 * _side(n), 16 * _side(n))


def _near_patches(n: int) -> str:
    return f"window2d({_side(n)}, {_side(n)}, 7, offset=1) | first(1)"


def _side(n: int) -> int:
    """Patches along one side of a square picture that is read as `n` tokens."""
    side = isqrt(n - 1)
    if side * side + 1 != n:
        raise ValueError(f"lengths has {n}; a square picture is side * side + 1 tokens, such as {side * side + 1}")
    return side


def _drawn(config: PreTrainedConfig, n: int) -> dict:
    return {"layers": dict(enumerate(transformers_random_blocks(config, n)))}


CASES: dict[str, Case] = {
    "bert": Case("BertModel", _encoder, "window(256, 256) | first(1)", dense=True),
    "longformer": Case("LongformerModel", _longformer, global_tokens=1),
    "big_bird": Case("BigBirdModel", _big_bird, same=_drawn),
    "reformer": Case("ReformerModel", _reformer),
    "perceiver": Case("PerceiverForMaskedLM", _perceiver),
    "sparse_transformer": Case("GPT2Model", _gpt2, "sparse_transformer(stride=128)", dense=True),
    # both slide in Transformers as well; ours has the same windows
    "modernbert": Case("ModernBertModel", _modernbert, "window(None, None)", implementations=SLIDING),
    "llama_1b": Case("LlamaModel", _llama_1b, "streaming(window=1024, sinks=4)", dense=True),
    "mistral": Case("MistralModel", _mistral, "window(1023, 0)", implementations=SLIDING),
    # with sinks that are learned: Transformers' flex_attention rounds to 16 bits before it adds them
    "gpt_oss": Case("GptOssModel", _gpt_oss, "window(None, None)", peer_factor=10.0, implementations=SINKS),
    # the same, each layer with a window
    "gpt_oss_window": Case(
        "GptOssModel", _gpt_oss_window, "window(None, None)", peer_factor=10.0, implementations=SINKS
    ),
    "whisper": Case(
        "transformers.models.whisper.modeling_whisper:WhisperEncoder",
        _whisper,
        "window(256, 256)",
        dense=True,
        takes_mask=False,
        reads=_spectrogram,
    ),
    "vit": Case("ViTModel", _vit, _near_patches, dense=True, takes_mask=False, reads=_picture, compared=32 * 32 + 1),
}
