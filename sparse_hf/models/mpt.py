"""sparse_mpt: MPT (MosaicML, 2023, MPT-7B) with sparse attention; its positions are ALiBi.

Transformers' class has a bias for `max_seq_len` tokens; here it is one of distances, and texts may be longer.
"""

from transformers import MptConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpt.modeling_mpt import MptAttention

from .alibi import ALIBI, alibi_arguments
from .derived.attention_modules import number_attention
from .hf.config import SparseConfigMixin
from .hf.register import register_family


class SparseMptConfig(SparseConfigMixin, MptConfig):
    model_type = "sparse_mpt"


class SparseMptAttention(MptAttention):
    """Attention by a pattern, with a slope by distance that counts all tokens of a row."""

    config: SparseMptConfig
    is_causal = True

    def forward(self, hidden_states, position_bias, cache=None, attention_mask=None, past_key_values=None, **kwargs):
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        shape = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
        q, k, v = (states.reshape(shape).transpose(1, 2) for states in mixed.chunk(3, dim=2))
        # older versions call it by another name
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        # the last entry is of a token itself, the one before it of its neighbour
        slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
        kwargs |= alibi_arguments(slopes, attention_mask, q, k, cache)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # pyright: ignore[reportArgumentType]
        dropout = self.attn_dropout_p if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, self.softmax_scale, dropout, **kwargs)
        return self.out_proj(out.flatten(2)), weights


register_family(
    SparseMptConfig,
    ALIBI,
    parts={MptAttention: SparseMptAttention},
    of_heads={"number_layers": number_attention, "keeps_arguments": True},
)
