"""The models of `sparse-hf bench models`: class, configuration and our pattern.

All have random weights, no dropout, and 1,024 words; encoders are of base size (12 heads of 64).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..models.bigbird.block_sparse import transformers_random_blocks
from ..plan import build_plan

VOCABULARY = 1024
# what Transformers slides a window with
SLIDING = ("sdpa", "flex_attention")


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        model: the name of Transformers' class.
        config: arguments of its configuration for a number of tokens and of layers.
        pattern: what ours is given; None where the family implies one.
        dense: does Transformers' model compute more pairs than ours? It is given a mask of ours
            where the two are compared.
        global_tokens: marked tokens at the beginning.
        same: arguments of `sparsify` under which ours computes the very pairs that Transformers'
            class does, where those that are timed are other ones.
        implementations: Transformers' attention implementations that have a row each, the class's
            default first; None is the default without its name.
    """

    model: str
    config: Callable[[int, int], dict]
    pattern: str | None = None
    dense: bool = False
    global_tokens: int = 0
    same: Callable[[PreTrainedConfig, int], dict] = lambda config, n: {}
    implementations: tuple[str | None, ...] = (None,)

    def masks(self, n: int, device: torch.device) -> dict:
        """What makes Transformers' class compute our pairs on `n` tokens."""
        if not self.dense:
            return {}
        assert self.pattern is not None
        return {"attention_mask": build_plan(self.pattern, n, device=device).to_dense()}


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
}
