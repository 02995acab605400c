"""sparse_bloom: BLOOM (arXiv:2211.05100) with sparse attention; its positions are ALiBi."""

import torch
from transformers import BloomConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor, dropout_add

from .alibi import ALIBI, alibi_arguments
from .derived.attention_modules import number_attention
from .hf.config import SparseConfigMixin
from .hf.register import register_family


class SparseBloomConfig(SparseConfigMixin, BloomConfig):
    model_type = "sparse_bloom"


class SparseBloomAttention(BloomAttention):
    """Attention by a pattern, with a slope by distance that counts real tokens."""

    config: SparseBloomConfig
    is_causal = True

    def forward(
        self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False, output_attentions=False,
        **kwargs,
    ):  # fmt: skip
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)  # pyright: ignore[reportArgumentType]
        # what it is at the second of two tokens
        two = torch.ones(1, 2, dtype=torch.long, device=q.device)
        slopes = build_alibi_tensor(two, self.num_heads, torch.float32)[:, 0, 1]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # pyright: ignore[reportArgumentType]
        dropout = self.attention_dropout.p if self.training else 0.0
        of_alibi = alibi_arguments(slopes, attention_mask, q, k, layer_past)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            self.inv_norm_factor,
            dropout,
            bias_skips_padding=True,
            **{**kwargs, **of_alibi},
        )
        return dropout_add(self.dense(out.flatten(2)), residual, self.hidden_dropout, self.training), weights


register_family(
    SparseBloomConfig,
    ALIBI,
    parts={BloomAttention: SparseBloomAttention},
    of_heads={"number_layers": number_attention, "keeps_arguments": True},
)
