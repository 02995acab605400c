"""sparse_perceiver: Perceiver (arXiv:2103.03206) and Perceiver IO (arXiv:2107.14795), linear in inputs and in outputs.

Latents read the inputs, attend to each other, and outputs read the latents. Both readings are dense, one query at a time
over all keys, and cost latents times inputs; Transformers writes that product down once per head, here nothing does.
`sparse_attention` speaks of what is left: a pattern per layer of the latents' self-attention, by default full, in which
`window(16, 16) | first(8)` counts latents. Blocks repeat their layers, and layers their pattern.

A masked language model answers for the tokens it was given, where Transformers' answers for its whole table of positions,
and is trained only on texts padded to it: the logits are the first rows of Transformers'. Padding is masked where the
latents read; rows of padded outputs are those of Transformers. Attention weights come under "sparse_reference" only.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PerceiverConfig,
    PerceiverForImageClassificationConvProcessing,
    PerceiverForImageClassificationFourier,
    PerceiverForImageClassificationLearned,
    PerceiverForMaskedLM,
    PerceiverForMultimodalAutoencoding,
    PerceiverForOpticalFlow,
    PerceiverForSequenceClassification,
    PerceiverModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.perceiver.modeling_perceiver import (
    PerceiverBasicDecoder,
    PerceiverLayer,
    PerceiverSelfAttention,
    PerceiverTextPreprocessor,
)

from ...pattern import Pattern
from ...plan import NOTHING
from ..hf.attention_interface import MaskRequest
from ..hf.config import SparseConfigMixin
from ..hf.counterparts import adopt
from ..hf.input_checks import check_ids
from ..hf.model_mixin import SparseMixin
from ..hf.own_modules import attend_by_pattern, backend_of
from ..hf.positions import Positions
from ..hf.register import register_family
from .cross_attention import attend_across, attend_across_with_weights


class SparsePerceiverConfig(SparseConfigMixin, PerceiverConfig):
    """`sparse_attention.layers` names a pattern for each of the `num_self_attends_per_block` layers of latents."""

    model_type = "sparse_perceiver"
    implies_pattern = True
    why_no_marks = (
        "latents, of which the patterns of a Perceiver speak, are no tokens that could be marked; leave it out"
    )

    @property
    def stacks(self) -> dict[str, int]:
        return {"": self.num_self_attends_per_block}

    def heads_of(self, stack: str) -> int:
        return self.num_self_attention_heads

    @property
    def uses_marks(self) -> bool:
        return False

    def validate_sparse_attention(self) -> None:
        """As in the parent; refuses marks, and patterns that see only what is before."""
        spec = self.sparse_attention
        if isinstance(spec, dict) and spec.get("global_token_ids"):
            raise ValueError(f"sparse_attention.global_token_ids is {spec['global_token_ids']}; {self.why_no_marks}")
        super().validate_sparse_attention()
        for text in (spec or {"patterns": {}})["patterns"].values():
            if Pattern.parse(text).uses_marks or any(p.uses_marks for p in Pattern.parse(text).heads or ()):
                raise ValueError(f"sparse_attention has {text!r}; {self.why_no_marks}")
            if _looks_back_only(text, self.num_latents):
                raise ValueError(
                    f"sparse_attention has {text!r}, which is causal; latents come in no order of time, and every one reads "
                    "the whole input: give a pattern of latents that looks both ways, like 'window(16, 16) | first(8)'"
                )


@lru_cache(maxsize=256)
def _looks_back_only(text: str, latents: int) -> bool:
    pattern, index = Pattern.parse(text), torch.arange(latents)
    pairs = [p.allows(index[:, None], index[None, :]) for p in pattern.heads or (pattern,)]
    return any(bool(p.tril(-1).any()) and not p.triu(1).any() for p in pairs)


class SparsePerceiverSelfAttention(PerceiverSelfAttention):
    """Attention of latents to inputs, of latents to latents by their pattern, and of outputs to latents.

    `config` and `layer_idx` are set by the model around it.
    """

    config: SparsePerceiverConfig
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: MaskRequest | None = None,
        inputs: Tensor | None = None,
        inputs_mask: MaskRequest | None = None,
        output_attentions: bool = False,
    ) -> tuple:
        """`[B, Q, C]` in and `[B, Q, E]` out, and `[B, H, Q, K]` weights if asked for.

        With `inputs` `[B, K, C']` it is cross-attention. `attention_mask`, of outputs, is not read, as in Transformers.
        """
        states = self.layernorm1(hidden_states)
        source = states if inputs is None else self.layernorm2(inputs)
        q, k = (self.transpose_for_scores(t, self.qk_channels_per_head) for t in (self.query(states), self.key(source)))
        v = self.transpose_for_scores(self.value(source), self.v_channels_per_head)
        dropout = self.dropout.p if self.training else 0.0
        if inputs is None:
            pattern = self.config.layer_pattern(self.layer_idx)
            out, weights = attend_by_pattern(
                self.config, (q, k, v), pattern, NOTHING, dropout=dropout, wants_weights=output_attentions
            )
        elif backend_of(self.config) == "reference":
            out, weights = attend_across_with_weights(q, k, v, _real_inputs(inputs_mask, inputs), dropout)
        else:
            out, weights = attend_across(q, k, v, _real_inputs(inputs_mask, inputs), dropout), None
        out = out.transpose(1, 2).flatten(2)
        return (out, weights) if output_attentions else (out,)


def _real_inputs(mask: MaskRequest | Tensor | None, inputs: Tensor) -> Tensor | None:
    """Which inputs are no padding, `[B, N]` bool; None if all are."""
    mask = mask.attention_mask if isinstance(mask, MaskRequest) else mask
    if mask is None:
        return None
    if mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be [batch, inputs], {tuple(inputs.shape[:2])}"
        )
    # kernels are faster without a mask, and Transformers makes one of ones where none is given
    return None if not torch.compiler.is_compiling() and mask.all() else mask


class SparsePerceiverLayer(GradientCheckpointingLayer, PerceiverLayer):
    """A layer that gradient checkpointing knows."""


class SparsePerceiverTextPreprocessor(PerceiverTextPreprocessor):
    # Transformers asks for `LongTensor`, which no tensor of whole numbers is to a type checker
    def forward(self, inputs: Any, *args, **kwargs):
        """As the parent's; raises ValueError for a text longer than the table of positions."""
        most = self.position_embeddings.num_embeddings
        if not torch.compiler.is_compiling():
            check_ids(self.embeddings.num_embeddings, inputs)
        if inputs.shape[1] > most:
            raise ValueError(
                f"inputs have {inputs.shape[1]} tokens; the table of positions has {most}: cut them, or convert the checkpoint "
                "with a greater max_length"
            )
        return super().forward(inputs, *args, **kwargs)


class SparsePerceiverTextDecoder(PerceiverBasicDecoder):
    """The decoder of a masked language model, which asks for the tokens of its input and no others."""

    def decoder_query(self, inputs: Tensor, *args, **kwargs) -> Tensor:
        """`[B, N, C]`, the queries of the first N positions, for `inputs` `[B, N, C']`."""
        return super().decoder_query(inputs, *args, **kwargs)[:, : inputs.shape[1]]


class SparsePerceiverMixin(SparseMixin):
    """What all heads add to the parent's: gradient checkpointing, and vocabularies that grow."""

    config: SparsePerceiverConfig
    config_class = SparsePerceiverConfig
    supports_gradient_checkpointing = True

    def post_init(self):
        # the layers must know checkpointing before a configuration that asks for it is read
        adopt(self)
        super().post_init()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As [`PreTrainedModel.resize_token_embeddings`], of the words of a text, where the parent finds latents.

        Raises:
            NotImplementedError: a model that reads something else than text.
        """
        text = getattr(self, "perceiver", self).input_preprocessor
        if not isinstance(text, PerceiverTextPreprocessor):
            raise NotImplementedError(
                f"{type(self).__name__} reads no text here, and has no embeddings of tokens to resize"
            )
        words = self._get_resized_embeddings(text.embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing)
        text.embeddings = words.requires_grad_(text.embeddings.weight.requires_grad)
        self.config.vocab_size = words.num_embeddings
        head = getattr(self, "embedding_decoder", None)
        if head is not None:
            kept = head.bias.data[: words.num_embeddings]
            head.vocab_size = words.num_embeddings
            head.bias = nn.Parameter(nn.functional.pad(kept, (0, words.num_embeddings - len(kept))))
        return words


class SparsePerceiverModel(SparsePerceiverMixin, PerceiverModel):
    """[`PerceiverModel`] with any preprocessor and decoder of Transformers' Perceiver."""

    def number_layers(self) -> None:
        for module in self.modules():
            if isinstance(module, SparsePerceiverSelfAttention):
                module.config = self.config
        layers: list[Any] = list(self.encoder.self_attends)
        for number, layer in enumerate(layers):
            layer.attention.self.layer_idx = number


class SparsePerceiverForMaskedLM(SparsePerceiverMixin, PerceiverForMaskedLM):
    """[`PerceiverForMaskedLM`] whose logits are `[batch, tokens, vocabulary]` for texts of any length up to the table's."""

    def number_layers(self) -> None:
        decoder: Any = self.perceiver.decoder
        decoder.__class__ = SparsePerceiverTextDecoder


class SparsePerceiverForSequenceClassification(SparsePerceiverMixin, PerceiverForSequenceClassification):
    """[`PerceiverForSequenceClassification`] through our attention."""


class SparsePerceiverForImageClassificationLearned(SparsePerceiverMixin, PerceiverForImageClassificationLearned):
    """[`PerceiverForImageClassificationLearned`] through our attention."""


class SparsePerceiverForImageClassificationFourier(SparsePerceiverMixin, PerceiverForImageClassificationFourier):
    """[`PerceiverForImageClassificationFourier`] through our attention."""


class SparsePerceiverForImageClassificationConvProcessing(
    SparsePerceiverMixin, PerceiverForImageClassificationConvProcessing
):
    """[`PerceiverForImageClassificationConvProcessing`] through our attention."""


class SparsePerceiverForOpticalFlow(SparsePerceiverMixin, PerceiverForOpticalFlow):
    """[`PerceiverForOpticalFlow`] through our attention."""


class SparsePerceiverForMultimodalAutoencoding(SparsePerceiverMixin, PerceiverForMultimodalAutoencoding):
    """[`PerceiverForMultimodalAutoencoding`] through our attention."""


# of texts: where they are read, and where a masked language model answers; tables of images and of one label stay
POSITIONS = Positions(
    "learned",
    (
        "input_preprocessor.position_embeddings.weight",
        "perceiver.decoder.output_position_encodings.position_embeddings",
    ),
    checked_by_model=True,
)

register_family(
    SparsePerceiverConfig,
    POSITIONS,
    parts={
        PerceiverSelfAttention: SparsePerceiverSelfAttention,
        PerceiverLayer: SparsePerceiverLayer,
        PerceiverTextPreprocessor: SparsePerceiverTextPreprocessor,
    },
    heads=(PerceiverForOpticalFlow, PerceiverForMultimodalAutoencoding),
)
