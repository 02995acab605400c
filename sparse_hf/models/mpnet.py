"""sparse_mpnet: MPNet (arXiv:2004.09297) with sparse attention.

All layers share a learned bias by distance, which Transformers' class computes for all pairs; here it is one vector of
distances a head.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import MPNetConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from .dense_families import BEHIND_PADDING_ID
from .derived.attention_modules import number_attention
from .hf.config import SparseConfigMixin
from .hf.register import register_family


class SparseMPNetConfig(SparseConfigMixin, MPNetConfig):
    model_type = "sparse_mpnet"


class SparseMPNetSelfAttention(MPNetSelfAttention):
    """Attention by a pattern, with a bias by distance."""

    config: SparseMPNetConfig
    is_causal = False

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # pyright: ignore[reportArgumentType]
        dropout = self.dropout.p if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, None, dropout, position_bias=position_bias, **kwargs)
        return self.o(out.flatten(2)), *((weights,) if output_attentions else ())


class SparseMPNetEncoder(MPNetEncoder):
    """The stack of layers, whose bias is linear in the length."""

    def compute_position_bias(self, x, position_ids=None, num_buckets=32) -> Tensor:
        """The bias `[heads, 2 N - 1]` of the distances (key - query) from `1 - N` to `N - 1`."""
        distances = torch.arange(1 - x.shape[1], x.shape[1], device=x.device)
        return self.relative_attention_bias(self.relative_position_bucket(distances, num_buckets=num_buckets)).T


register_family(
    SparseMPNetConfig,
    replace(BEHIND_PADDING_ID, weighs_distances=True),
    parts={MPNetSelfAttention: SparseMPNetSelfAttention, MPNetEncoder: SparseMPNetEncoder},
    of_heads={"number_layers": number_attention, "keeps_arguments": True},
)
