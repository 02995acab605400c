"""sparse_led: LED, the encoder-decoder of Longformer (arXiv:2004.05150, section 7), with the weights of Transformers' LED.

The encoder is Longformer's, see there. Self-attention of the decoder sees its past, or what a pattern for the decoder
holds of it; cross-attention stays dense, which is linear in the source.
"""

from typing import Any

import torch
from transformers import LEDConfig
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.led.modeling_led import (
    LEDDecoder,
    LEDDecoderAttention,
    LEDEncoder,
    LEDEncoderBaseModelOutput,
    LEDEncoderSelfAttention,
)

from ..hf.model_mixin import SparseEncoderMixin, SparseMixin
from ..hf.outputs import wanted_outputs
from ..hf.positions import Positions
from ..hf.register import register_family
from .attention_window import AttentionWindowEncoderConfigMixin, window_pattern
from .global_rows import GlobalRowsMixin, run_layers
from .tokens import read_tokens


class SparseLEDConfig(AttentionWindowEncoderConfigMixin, LEDConfig):
    model_type = "sparse_led"

    def implied_pattern(self, stack: str, layer: int) -> str:
        if stack == "decoder":
            return super().implied_pattern(stack, layer)
        return window_pattern(self.attention_window, layer)


class SparseLEDEncoderSelfAttention(GlobalRowsMixin, LEDEncoderSelfAttention):
    """Its windows and global tokens as plans."""

    stack = "encoder"


class SparseLEDEncoder(SparseEncoderMixin, LEDEncoder):
    config: SparseLEDConfig

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        global_attention_mask=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """As [`LEDEncoder.forward`], without padding to the window."""
        with_weights, with_states, as_dict = wanted_outputs(
            self.config,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.layernorm_embedding(states + self.embed_positions(states.shape[:-1]))
        states = torch.nn.functional.dropout(states, p=self.dropout, training=self.training)
        tokens = read_tokens(states, attention_mask, global_attention_mask)
        if tokens.marks is not None and not self.config.uses_marks:
            raise ValueError(f"attention_mask marks global tokens, but {self.config.why_no_marks}")
        layerdrop = self.layerdrop if self.training else 0.0
        last, states, weights = run_layers(self.layers, states, tokens, with_weights, with_states, layerdrop)
        if not as_dict:
            return tuple(value for value in (last, states, weights) if value is not None)
        return LEDEncoderBaseModelOutput(last_hidden_state=last, hidden_states=states, attentions=weights)


class SparseLEDDecoderAttention(LEDDecoderAttention):
    """The same projections, computed as BART's, which is on Transformers' attention interface."""

    def forward(self, hidden_states, key_value_states=None, output_attentions=False, **kwargs):
        # it has all that the other's code asks for, and the cache goes by the name that this version of Transformers gives it
        as_bart: Any = self
        out, weights = BartAttention.forward(as_bart, hidden_states, key_value_states, **kwargs)
        return out, weights, None


class SparseLEDDecoder(SparseMixin, LEDDecoder):
    config: SparseLEDConfig

    def number_layers(self) -> None:
        """Give the attention modules what BART's have from the start."""
        layers: list[Any] = list(self.layers)
        for layer in layers:
            for attention in (layer.self_attn, layer.encoder_attn):
                attention.config = self.config
                attention.is_causal = attention is layer.self_attn


# the decoder keeps its length
POSITIONS = Positions("learned", ("encoder.embed_positions.weight",), limit="max_encoder_position_embeddings")

register_family(
    SparseLEDConfig,
    POSITIONS,
    parts={
        LEDEncoderSelfAttention: SparseLEDEncoderSelfAttention,
        LEDDecoderAttention: SparseLEDDecoderAttention,
        LEDEncoder: SparseLEDEncoder,
        LEDDecoder: SparseLEDDecoder,
    },
)
