"""sparse_reformer: Reformer (arXiv:2001.04451) through our plans, with the weights of Transformers' Reformer.

Without `sparse_attention` a layer's pattern is that of the configuration's fields: `ring(...)`, chunks of positions, in local
layers and `lsh_chunks(...)` in hashed ones. The same rotations give the same answers as in Transformers, at any length:
texts need be no multiple of a chunk, and axial positions need not fill their table. Padding on the right counts as it
does in Transformers, where chunks form a ring that closes behind it; a row padded on the left gives what it gives alone,
where Transformers counts chunks from the padding.

Legend: B batch, N tokens.
"""

from __future__ import annotations

import inspect
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ReformerConfig, ReformerForMaskedLM, ReformerModel, ReformerModelWithLMHead
from transformers.models.reformer.modeling_reformer import (
    AxialPositionEmbeddings,
    ChunkReformerFeedForward,
    LocalSelfAttention,
    LSHSelfAttention,
    ReformerAttention,
    ReformerEmbeddings,
    ReformerEncoder,
    ReformerLayer,
    ReformerModelOutput,
    ReformerOnlyLMHead,
)

from ...pattern import LSHChunks, Pattern, Ring
from ..hf.config import SparseConfigMixin
from ..hf.documents import number_documents
from ..hf.model_mixin import SparseGenerationMixin, SparseMixin, adopt
from ..hf.outputs import wanted_outputs
from ..hf.positions import Positions
from ..hf.register import register_family
from .attention import SparseLocalSelfAttention, SparseLSHSelfAttention, SparseReformerCache, Text, is_hashed
from .embeddings import SparseAxialPositionEmbeddings, SparseReformerEmbeddings
from .reversible import (
    SparseChunkReformerFeedForward,
    SparseReformerAttention,
    SparseReformerEncoder,
    SparseReformerLayer,
    SparseReformerOnlyLMHead,
)

LOCAL, HASHED = "local", "lsh"


class SparseReformerConfig(SparseConfigMixin, ReformerConfig):
    model_type = "sparse_reformer"
    implies_pattern = True

    def implied_pattern(self, stack: str, layer: int) -> str:
        # Transformers' types allow None, and a list of factors
        if self.attn_layers[layer] == LOCAL:
            fields = self.local_attn_chunk_length, self.local_num_chunks_before, self.local_num_chunks_after
            size, before, after = (number or 0 for number in fields)
            return str(Ring(size, before, after))
        fields = self.lsh_attn_chunk_length, self.lsh_num_chunks_before, self.lsh_num_chunks_after
        size, before, after = (number or 0 for number in fields)
        buckets = tuple(self.num_buckets) if isinstance(self.num_buckets, list) else self.num_buckets
        return str(LSHChunks(size, before, after, self.num_hashes, buckets, self.hash_seed))

    def pattern_of(self, stack: str, layer: int, pattern: Pattern | None) -> Pattern:
        # a pattern of positions is one for local layers, and one of hashes for hashed ones
        fits = pattern is not None and is_hashed(pattern) == (self.attn_layers[layer] == HASHED)
        return super().pattern_of(stack, layer, pattern if fits else None)

    def validate_sparse_attention(self) -> None:
        super().validate_sparse_attention()
        if self.sparse_attention is None:
            return
        for layer, kind in enumerate(self.attn_layers):
            pattern = Pattern.parse(self.layer_pattern(layer))
            if is_hashed(pattern) != (kind == HASHED) or pattern.heads or pattern.uses_marks:
                wanted = (
                    "a pattern of positions, without marked() or per_head()" if kind == LOCAL else "lsh_chunks(...)"
                )
                raise ValueError(
                    f"layer {layer} has the pattern {pattern}; attn_layers says {kind!r}, which takes {wanted}"
                )

    @property
    def uses_marks(self) -> bool:
        return False

    @property
    def hashed_from(self) -> int:
        """Number of the first hashed layer."""
        kinds = list(self.attn_layers)
        return kinds.index(HASHED) if HASHED in kinds else len(kinds)


class SparseReformerModel(SparseMixin, ReformerModel):
    """[`ReformerModel`] with attention by its configuration's patterns."""

    config: SparseReformerConfig
    config_class = SparseReformerConfig

    def number_layers(self) -> None:
        layers: list[Any] = list(self.encoder.layers)
        for layer in layers:
            layer.attention.self_attention.config = self.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        past_buckets_states: SparseReformerCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> tuple | ReformerModelOutput:
        """As [`ReformerModel.forward`], at any length. A cache is made outside of training only."""
        use_cache, with_weights, with_states, as_dict = wanted_outputs(
            self.config,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if input_ids is not None and not torch.compiler.is_compiling():
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        cache = past_buckets_states
        if cache is not None and not isinstance(cache, SparseReformerCache):
            raise ValueError(f"past_buckets_states is a {type(cache).__name__}; it must be what this model gave")
        if cache is None and use_cache and self.config.is_decoder and not self.training:
            cache = SparseReformerCache()
        begin = 0 if cache is None else cache.get_start_idx()
        states = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_idx_pos_encodings=begin,
        )
        text = self._read(attention_mask, begin + states.shape[1], num_hashes, with_weights)
        if position_ids is not None and not begin:
            _check_one_text(position_ids, text.real)
        last, states, weights = self.encoder(states, text, self.config.hashed_from, cache, with_states)
        if not as_dict:
            return tuple(value for value in (last, cache, states, weights) if value is not None)
        # Transformers writes down another type for the cache than it gives
        past: Any = cache
        return ReformerModelOutput(
            last_hidden_state=last, past_buckets_states=past, hidden_states=states, attentions=weights
        )

    def _read(self, attention_mask: Tensor | None, length: int, num_hashes: int | None, with_weights: bool) -> Text:
        if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] != length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, {length}], tokens in the cache "
                "included"
            )
        sizes = {LOCAL: self.config.local_attn_chunk_length, HASHED: self.config.lsh_attn_chunk_length}
        sizes = [sizes[kind] for kind in set(self.config.attn_layers)]
        real = None if attention_mask is None else attention_mask.bool()
        return Text.read(real, (lcm(*sizes), min(sizes)), num_hashes, with_weights)


def _check_one_text(position_ids: Tensor, real: Tensor | None) -> None:
    """Refuse rows of packed documents: their chunks in hash order would mix them."""
    if not torch.compiler.is_compiling() and number_documents(position_ids, real).any():
        raise ValueError(
            "position_ids begin anew inside a row, as in rows of packed documents; a Reformer sorts all tokens of a row by "
            "their hashes, and has one text to a row: leave packing out"
        )


class OwnBiasMixin(SparseMixin):
    """For heads that hold a bias beside that of their output layer, with which nobody computes."""

    lm_head: Any

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """A new output layer; the dense class shares its bias with the head, and cannot save it then."""
        count, kept = new_embeddings.out_features, self.lm_head.bias.data[: new_embeddings.out_features]
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = nn.Parameter(nn.functional.pad(kept, (0, count - len(kept))))


class SparseReformerForMaskedLM(OwnBiasMixin, ReformerForMaskedLM):
    """[`ReformerForMaskedLM`] with attention by patterns."""

    config: SparseReformerConfig
    config_class = SparseReformerConfig


class GenerationWithOwnBiasMixin(OwnBiasMixin, SparseGenerationMixin):
    """Both, before the dense class among the bases."""


class SparseReformerModelWithLMHead(GenerationWithOwnBiasMixin, ReformerModelWithLMHead):
    """[`ReformerModelWithLMHead`] with attention by patterns.

    Its name holds "reformer", by which `generate` knows models that make caches of their own (`past_buckets_states`) and
    that it must give no `DynamicCache`: that is so here too.
    """

    config: SparseReformerConfig
    config_class = SparseReformerConfig

    def number_layers(self) -> None:
        # it goes by the name of the class, and by this one Transformers finds this loss with a warning only
        self.loss_type = self.loss_type or "ForCausalLM"

    def prepare_inputs_for_generation(
        self, input_ids, past_buckets_states=None, attention_mask=None, position_ids=None, **kwargs
    ):
        """The new token alone if there is a cache. Unlike Transformers' it hands on the mask, from which positions follow."""
        begin = 0 if past_buckets_states is None else past_buckets_states.get_start_idx()
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        known = inspect.signature(ReformerModelWithLMHead.forward).parameters
        return {
            **{name: value for name, value in kwargs.items() if name in known and name != "labels"},
            "input_ids": input_ids[:, begin:],
            "past_buckets_states": past_buckets_states,
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else position_ids[:, begin:],
        }


# the table of axial positions is a product of short ones, and conversion leaves it alone
POSITIONS = Positions("learned", ("embeddings.position_embeddings.embedding.weight",), checked_by_model=True)
PARTS = {
    LocalSelfAttention: SparseLocalSelfAttention,
    LSHSelfAttention: SparseLSHSelfAttention,
    ReformerAttention: SparseReformerAttention,
    ReformerLayer: SparseReformerLayer,
    ReformerEncoder: SparseReformerEncoder,
    ChunkReformerFeedForward: SparseChunkReformerFeedForward,
    ReformerOnlyLMHead: SparseReformerOnlyLMHead,
    AxialPositionEmbeddings: SparseAxialPositionEmbeddings,
    ReformerEmbeddings: SparseReformerEmbeddings,
}


def _post_init(self) -> None:
    # Transformers enables checkpointing there if the configuration says so, and looks for layers that know it: ours do
    adopt(self)
    SparseMixin.post_init(self)


for _head in register_family(SparseReformerConfig, POSITIONS, parts=PARTS).classes:
    # layers that keep no activations have it all the time, see `SparseReformerEncoder`
    _head.supports_gradient_checkpointing = True
    _head.post_init = _post_init
