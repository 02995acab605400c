"""sparse_longformer: Longformer (arXiv:2004.05150) by patterns, with the weights of Transformers' Longformer.

Without `sparse_attention` a layer's pattern is the one of its `attention_window`. With it, windows may also be causal, or
dilated head by head, as in the paper: `per_head(window(64, 64) | marked(), window(128, 128) & stride(2) | marked(), ...)`.
Texts need no padding to the window. Attention weights come as whole squares and under "sparse_reference" only, not in the
compact form of Transformers. Packed documents are kept apart where `position_ids` tell them.
"""

from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor
from transformers import (
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerModel,
)
from transformers import initialization as init
from transformers.models.longformer.modeling_longformer import (
    LongformerBaseModelOutputWithPooling,
    LongformerLayer,
    LongformerLMHead,
    LongformerSelfAttention,
)

from ..hf.mask_request import said_of
from ..hf.model_mixin import SparseEncoderMixin, SparseMixin
from ..hf.outputs import wanted_outputs
from ..hf.positions import Positions
from ..hf.register import register_family
from ..hf.text_parts import TEXT_PART
from .attention_window import AttentionWindowConfigMixin, window_pattern
from .global_rows import GlobalRowsMixin, run_layers
from .tokens import read_tokens


class SparseLongformerConfig(AttentionWindowConfigMixin, LongformerConfig):
    model_type = "sparse_longformer"
    heads_mark = True

    def implied_pattern(self, stack: str, layer: int) -> str:
        return window_pattern(self.attention_window, layer)


class SparseLongformerSelfAttention(GlobalRowsMixin, LongformerSelfAttention):
    """Its windows and global tokens as plans."""


class SparseLongformerLayer(LongformerLayer):
    """A layer whose feed-forward takes `chunk_size_feed_forward` tokens at a time; the last ones may be fewer."""

    def forward(self, hidden_states: Tensor, attention_mask=None, output_attentions=False, **_) -> tuple[Tensor, ...]:
        states, *weights = self.attention(
            hidden_states, attention_mask=attention_mask, output_attentions=output_attentions
        )
        size = self.chunk_size_feed_forward
        if not size:
            return self.ff_chunk(states), *weights
        return torch.cat([self.ff_chunk(chunk) for chunk in states.split(size, dim=1)], dim=1), *weights


class SparseLongformerModel(SparseEncoderMixin, LongformerModel):
    """[`LongformerModel`] with attention by its configuration's patterns."""

    config: SparseLongformerConfig
    config_class = SparseLongformerConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | LongformerBaseModelOutputWithPooling:
        """As [`LongformerModel.forward`], without padding to the window."""
        with_weights, with_states, as_dict = wanted_outputs(
            self.config,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if input_ids is not None and not torch.compiler.is_compiling():
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        states = self.embeddings(
            input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids, inputs_embeds=inputs_embeds
        )
        tokens = read_tokens(states, attention_mask, global_attention_mask, position_ids)
        tokens = replace(tokens, part=said_of(self.config).get(TEXT_PART))
        if tokens.marks is not None and not self.config.uses_marks:
            raise ValueError(f"attention_mask marks global tokens, but {self.config.why_no_marks}")
        last, states, weights = run_layers(self.encoder.layer, states, tokens, with_weights, with_states)
        pooled = None if self.pooler is None else self.pooler(last)
        if not as_dict:
            return last, pooled, *(value for value in (states, weights) if value is not None)
        return LongformerBaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=states, attentions=weights
        )


class SparseLongformerForMaskedLM(SparseMixin, LongformerForMaskedLM):
    """[`LongformerForMaskedLM`] with attention by patterns; a checkpoint without its head gets one whose bias is 0."""

    config: SparseLongformerConfig
    config_class = SparseLongformerConfig

    def _init_weights(self, module):
        super()._init_weights(module)
        # which Transformers leaves as the memory happens to be
        if isinstance(module, LongformerLMHead):
            init.zeros_(module.bias)


class MarkingHeadMixin(SparseMixin):
    """For heads that mark tokens by themselves, as their dense class does, where the pattern has `marked()`."""

    config: SparseLongformerConfig
    config_class = SparseLongformerConfig

    def _unless_asked(self, tokens: Tensor | None, marks: Tensor | None) -> Tensor | None:
        """What the dense class is given as `global_attention_mask`: none makes it mark, a mask of no rows keeps it from it."""
        if marks is None and tokens is not None and not self.config.uses_marks:
            return tokens.new_zeros(0, *tokens.shape[1:], dtype=torch.long)
        return marks


class SparseLongformerForSequenceClassification(MarkingHeadMixin, LongformerForSequenceClassification):
    """[`LongformerForSequenceClassification`] with attention by patterns; by default the first token is global."""

    def default_marks(self, input_ids: Tensor) -> Tensor:
        return _first_token(input_ids)

    @wraps(LongformerForSequenceClassification.forward)
    def forward(self, input_ids=None, attention_mask=None, global_attention_mask=None, **kwargs):
        embeddings = kwargs.get("inputs_embeds")
        tokens = input_ids if embeddings is None else embeddings[..., 0]
        marks = self._unless_asked(tokens, global_attention_mask)
        # the dense class finds the first token of ids alone
        marks = _first_token(tokens) if marks is None and tokens is not None else marks
        return super().forward(input_ids, attention_mask, marks, **kwargs)


class SparseLongformerForQuestionAnswering(MarkingHeadMixin, LongformerForQuestionAnswering):
    """[`LongformerForQuestionAnswering`] with attention by patterns; by default the question is global."""

    accepts_loss_kwargs = False

    def default_marks(self, input_ids: Tensor) -> Tensor:
        index, separator = _first_separator(input_ids, self.config.sep_token_id)
        return index < separator

    @wraps(LongformerForQuestionAnswering.forward)
    def forward(self, input_ids=None, attention_mask=None, global_attention_mask=None, **kwargs):
        marks = self._unless_asked(input_ids, global_attention_mask)
        return super().forward(input_ids, attention_mask, marks, **kwargs)


class SparseLongformerForMultipleChoice(MarkingHeadMixin, LongformerForMultipleChoice):
    """[`LongformerForMultipleChoice`] with attention by patterns; by default what follows the two separators is global."""

    def default_marks(self, input_ids: Tensor) -> Tensor:
        index, separator = _first_separator(input_ids, self.config.sep_token_id)
        return index > separator + 1

    @wraps(LongformerForMultipleChoice.forward)
    def forward(self, input_ids=None, token_type_ids=None, attention_mask=None, global_attention_mask=None, **kwargs):
        marks = self._unless_asked(input_ids, global_attention_mask)
        return super().forward(input_ids, token_type_ids, attention_mask, marks, **kwargs)


def _first_token(input_ids: Tensor) -> Tensor:
    return (torch.arange(input_ids.shape[1], device=input_ids.device) == 0).expand(input_ids.shape)


def _first_separator(input_ids: Tensor, sep_token_id: int | None) -> tuple[Tensor, Tensor]:
    """The index of each token, `[..., N]`, and of the first separator in each row, `[..., 1]`."""
    if sep_token_id is None:
        raise ValueError(
            "the configuration has no sep_token_id, by which a question is found; pass global_attention_mask"
        )
    is_separator = input_ids == sep_token_id
    if not torch.compiler.is_compiling() and not is_separator.any(-1).all():
        raise ValueError(
            f"a row of input_ids has no separator (sep_token_id {sep_token_id}), which would tell its question from its text; "
            "pass global_attention_mask"
        )
    index = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
    return index, is_separator.int().argmax(-1, keepdim=True)


# positions begin behind the padding id, and `max_position_embeddings` counts all rows (4,098 for 4,096 tokens)
POSITIONS = Positions(
    "learned",
    ("embeddings.position_embeddings.weight",),
    ("embeddings.position_ids",),
    offset=2,
    counted=True,
    skips_padding=True,
)

register_family(
    SparseLongformerConfig,
    POSITIONS,
    parts={LongformerLayer: SparseLongformerLayer, LongformerSelfAttention: SparseLongformerSelfAttention},
)
