"""sparse_falcon: Falcon (arXiv:2311.16867) with sparse attention; its positions are rotary, or ALiBi in older models.

With ALiBi, Transformers' class rounds its bias to bfloat16, so that beyond 256 tokens equal distances get unequal ones; here
the slopes are rounded so, and distances are not.
"""

import torch
from transformers import FalconConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import (
    FALCON_ATTENTION_CLASSES,
    FalconAttention,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from .alibi import ALIBI, alibi_arguments
from .hf.cache import of_streaming
from .hf.config import IMPLEMENTATIONS, SparseConfigMixin
from .hf.positions import ROTARY, ChosenPositions
from .hf.register import register_family


class SparseFalconConfig(SparseConfigMixin, FalconConfig):
    model_type = "sparse_falcon"


class SparseFalconAttention(FalconAttention):
    """Attention by a pattern, with rotary positions or a slope by distance that counts real tokens."""

    config: SparseFalconConfig

    def forward(
        self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, use_cache=False,
        output_attentions=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        q, k, v = (states.transpose(1, 2) for states in self._split_heads(self.query_key_value(hidden_states)))
        if alibi is None:
            assert position_embeddings is not None
            q, k = apply_rotary_pos_emb(q, k, position_embeddings[0], position_embeddings[1])
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)  # pyright: ignore[reportArgumentType]
        if alibi is None:
            kwargs |= of_streaming(layer_past)
        else:
            # what it is at the second of two tokens, in front of the scale
            two = torch.ones(1, 2, dtype=torch.long, device=q.device)
            slopes = build_alibi_tensor(two, self.num_heads, torch.float32)[:, 0, 1] * self.inv_norm_factor
            kwargs |= {**alibi_arguments(slopes, attention_mask, q, k, layer_past), "bias_skips_padding": True}
            # rotary layers have none in the dense class
            kwargs["dropout"] = self.attention_dropout.p if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # pyright: ignore[reportArgumentType]
        out, weights = attend(self, q, k, v, attention_mask, self.inv_norm_factor, position_ids=position_ids, **kwargs)
        return self.dense(out.flatten(2)), weights


# layers look their attention up by the implementation's name when they are built
FALCON_ATTENTION_CLASSES.update(dict.fromkeys(IMPLEMENTATIONS, SparseFalconAttention))

register_family(
    SparseFalconConfig,
    ROTARY,
    parts={FalconAttention: SparseFalconAttention},
    of_heads={"keeps_arguments": True},
)
SparseFalconConfig.positions = ChosenPositions(  # pyright: ignore[reportAttributeAccessIssue]
    ROTARY, lambda config: ALIBI if config.alibi else ROTARY
)
