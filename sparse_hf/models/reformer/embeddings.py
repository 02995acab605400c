"""Embeddings of a Reformer: axial positions of texts of any length, in the precision of the words.

Legend: B batch, N tokens, E hidden size.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from transformers.models.reformer.modeling_reformer import (
    AxialPositionEmbeddings,
    PositionEmbeddings,
    ReformerEmbeddings,
)

from ..hf.input_checks import check_ids, check_positions


class SparseReformerEmbeddings(ReformerEmbeddings):
    """Words and positions, refused where a table has no row for them."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_idx_pos_encodings: int = 0,
    ) -> Tensor:
        """`[B, N, E]`."""
        words = self.word_embeddings
        if not torch.compiler.is_compiling():
            check_ids(words.num_embeddings, input_ids)
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        end = start_idx_pos_encodings + given.shape[1]
        if position_ids is None and end > self.max_position_embeddings:
            raise ValueError(
                f"a text has {end} tokens; this model has positions for {self.max_position_embeddings} "
                "(max_position_embeddings): cut it, or generate fewer tokens"
            )
        table = self.position_embeddings
        if isinstance(table, PositionEmbeddings) and not torch.compiler.is_compiling():
            check_positions(table.embedding.num_embeddings, position_ids)
        states = super().forward(input_ids, position_ids, inputs_embeds, start_idx_pos_encodings)
        # Transformers keeps axial tables in float32, whatever a model is loaded in
        return states.to(words.weight.dtype if inputs_embeds is None else inputs_embeds.dtype)


class SparseAxialPositionEmbeddings(AxialPositionEmbeddings):
    """Axial positions of texts of any length that the table has room for, in training too."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """`[B, N]` to `[B, N, E]`."""
        room = prod(self.axial_pos_shape)
        if not torch.compiler.is_compiling() and position_ids.numel() and int(position_ids.max()) >= room:
            raise ValueError(
                f"axial_pos_shape {tuple(self.axial_pos_shape)} has room for {room} positions; the text has position "
                f"{int(position_ids.max())}"
            )
        axes, after = [], room
        for axis, (weight, size) in enumerate(zip(self.weights, self.axial_pos_shape, strict=True)):
            after //= size
            index = position_ids // after % size
            axes.append(torch.nn.functional.embedding(index, weight.flatten(0, -2)))
            if axis == min(1, len(self.axial_pos_shape) - 1):
                column = index
        positions = torch.cat(axes, dim=-1)
        if self.training and self.dropout > 0:
            # Transformers drops all positions that agree in the second axis, text by text
            size = self.axial_pos_shape[min(1, len(self.axial_pos_shape) - 1)]
            kept = torch.nn.functional.dropout(positions.new_ones(position_ids.shape[0], size), self.dropout)
            positions = positions * kept.gather(1, column)[..., None]
        return positions
