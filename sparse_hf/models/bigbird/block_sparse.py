"""What BigBird and BigBirdPegasus share: the pattern that their fields imply, and attention through our plans.

Transformers computes the same pairs block by block, but draws random blocks in training only (all are block 0 in
evaluation), counts a block twice that is listed twice, counts blocks from the padding of a left-padded row, makes `n x n`
weights, is not causal in a decoder, and attends fully ever after it met one text of at most `(5 + 2 r) b` tokens. Here a
pattern is a set of pairs, the same in training and evaluation, at every length and in every batch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from ...pattern import BlockTable, Chunk, First, Last, Marked, Pattern, PerHead, RandomBlocks, full
from ..hf.attention_interface import MaskRequest
from ..hf.cache import CACHE_NAMES
from ..hf.config import SparseConfigMixin

# the mixin stands before a dense class, whose attributes a type checker finds here
_Module = nn.Module if TYPE_CHECKING else object
# the path through the parents' code that hands masks on as they are; which pairs there are is the pattern's matter
PATH = "original_full"
FULL = str(full())
# lengths at which Transformers draws from the first 1,024 tokens ("old plans used in paper")
PAPER_LENGTHS, PAPER_LAST = (1024, 3072, 4096), 1024


def ends_and_window(block_size: int) -> Pattern:
    """BigBird without its random blocks: block-aligned window, first and last block, and whatever a batch marks (ETC)."""
    return Chunk(block_size, 1, 1) | First(block_size) | Last(1, block_size) | Marked()


def implied_text(config: PreTrainedConfig, layer: int) -> str:
    """The pattern of a layer by `attention_type`, `block_size` and `num_random_blocks`, with draws of its own per head.

    Raises:
        ValueError: an `attention_type` that Transformers does not know either.
    """
    if config.attention_type == PATH:
        return FULL
    if config.attention_type != "block_sparse":
        raise ValueError(f"attention_type is {config.attention_type!r}; it must be 'block_sparse' or 'original_full'")
    return _text(config.block_size, config.num_random_blocks, config.num_attention_heads, layer)


# a graph takes the answer as a constant instead of tracing the parser
@torch.compiler.assume_constant_result
def _text(block_size: int, count: int, heads: int, layer: int) -> str:
    return _cached_text(block_size, count, heads, layer)


@lru_cache(maxsize=256)
def _cached_text(block_size: int, count: int, heads: int, layer: int) -> str:
    fixed = ends_and_window(block_size)
    if not count:
        return str(fixed)
    return str(PerHead(*(fixed | RandomBlocks(count, block_size, layer * heads + head) for head in range(heads))))


def transformers_random_blocks(config: PreTrainedConfig, length: int) -> list[Pattern]:
    """The pairs that Transformers' own BigBird (or BigBirdPegasus encoder) computes in training: a pattern per layer.

    Its random blocks depend on the layer's number and on the length, so that these patterns are for texts of `length`
    tokens, in batches whose longest row has this length. Give them to `sparsify` as `layers=` (of BigBirdPegasus
    `layers={"encoder": ...}`) to compare a checkpoint's outputs. Blocks that Transformers lists twice (at 1,024, 3,072 and
    4,096 tokens it may draw a block of the window or the last one) weigh twice in its softmax and once here.

    Raises:
        ValueError: a length at which Transformers attends fully.

    Examples:
        >>> from transformers import BigBirdConfig
        >>> layers = transformers_random_blocks(BigBirdConfig(num_hidden_layers=2), 2048)
        >>> len(layers)
        2
    """
    size, count = config.block_size, config.num_random_blocks
    blocks = -(-length // size)
    if blocks <= 5 + 2 * count:
        raise ValueError(
            f"at {length} tokens Transformers attends fully: it is sparse from {(5 + 2 * count) * size + 1} tokens on"
        )
    patterns = []
    for layer in range(config.num_hidden_layers):
        tables = [BlockTable(size, ((), *map(tuple, rows))) for rows in _draws(config, layer, blocks * size)]
        patterns.append(PerHead(*(ends_and_window(size) | table for table in tables)))
    return patterns


def _draws(config: PreTrainedConfig, seed: int, length: int) -> list[list[list[int]]]:
    """Per head, the random key blocks of the query blocks 1 to n - 2, by Transformers' own code."""
    with torch.device("meta"):
        attention = BigBirdBlockSparseAttention(config, seed)
    size, count, heads = config.block_size, config.num_random_blocks, config.num_attention_heads
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        if length in PAPER_LENGTHS:
            longest = config.max_position_embeddings
            draw = (longest, longest, size, size, count, PAPER_LAST)
            drawn = [attention._bigbird_block_rand_mask(*draw)[: length // size - 2] for _ in range(heads)]
        else:
            plan = attention._get_rand_attn_plan(length, size, count)
            drawn = attention._bigbird_block_rand_mask_with_head(length, length, size, size, heads, *plan)
    finally:
        np.random.set_state(state)
    return [rows.tolist() for rows in drawn]


def refuse_attention_type(value: str) -> NoReturn:
    """What a sparse model's `set_attention_type` does."""
    raise ValueError(
        f"set_attention_type({value!r}) would change a sparse model's layers for others; sparsify the model again with the "
        "pattern that you want, 'window(None, None)' for full attention"
    )


class BlockSparseConfigMixin(SparseConfigMixin):
    """If `sparse_attention` is given, it alone says what attends to what, and `attention_type` says nothing."""

    implies_pattern = True
    marks_are_optional = True

    @property
    def uses_marks(self) -> bool:
        return super().uses_marks and (self.sparse_attention is not None or self.attention_type != PATH)


class BlockSparseAttentionMixin(_Module):
    """Before `BigBirdSelfAttention` among the bases: the same projections, and attention through Transformers' interface.

    `config` and `layer_idx` are set when the model adopts its parts. Attention weights are dropped out with the
    configuration's probability, which Transformers' block-sparse path forgets.
    """

    config: BlockSparseConfigMixin
    layer_idx: int
    num_attention_heads: int
    attention_head_size: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    # attention of a decoder's second kind, whose `attention_mask` is that of the encoder's states
    reads_encoder = False

    @property
    def is_causal(self) -> bool:
        return self.config.is_decoder

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask=None,
        token_positions: Tensor | None = None,
        padding_mask: Tensor | None = None,
        is_whole: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        caches = [kwargs.pop(name, None) for name in CACHE_NAMES]
        # as in the parent, attention that is given another sequence attends to that one
        crosses = encoder_hidden_states is not None
        read = encoder_hidden_states if crosses else hidden_states
        query, key, value = (
            project(states).unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)
            for project, states in ((self.query, hidden_states), (self.key, read), (self.value, read))
        )
        if crosses and not self.reads_encoder:
            attention_mask = encoder_attention_mask
        if is_whole and isinstance(attention_mask, MaskRequest):
            # Transformers makes a mask of ones, of which a graph would not know that it says nothing
            attention_mask = replace(attention_mask, attention_mask=None)
        if not crosses:
            cache = next((cache for cache in caches if cache is not None), None)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            attention_mask = self._past(attention_mask, padding_mask, key.shape[2] - query.shape[2])
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            position_ids=token_positions,
            is_cross_attention=crosses,
            **kwargs,
        )
        return out.flatten(2), weights

    def _past(self, mask, padding_mask: Tensor | None, q_offset: int):
        """Transformers 5.17 asks for a bidirectional mask of the new tokens alone, in a decoder too."""
        if not (self.is_causal and isinstance(mask, MaskRequest)):
            return mask
        if mask.mask_function is not bidirectional_mask_function:
            return mask
        padding_mask = None if padding_mask is None or padding_mask.ndim != 2 else padding_mask.bool()
        return MaskRequest(padding_mask, causal_mask_function, q_offset)
