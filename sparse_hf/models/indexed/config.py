"""What the configuration of a family that chooses its keys by content says in place of a pattern."""

from __future__ import annotations

from typing import ClassVar

from ...pattern import Pattern
from ..hf.config import SparseConfigMixin


class IndexedConfigMixin(SparseConfigMixin):
    """The family chooses keys by itself, among the pairs that a pattern holds: without one, among all of the past."""

    implies_pattern = True
    chooses_keys = True
    # can a pattern limit the choice, and are packed documents told apart? Written by `derive_indexed`
    takes_patterns: ClassVar[bool] = True
    documents_are_told_apart: ClassVar[bool] = True

    @property
    def uses_marks(self) -> bool:
        return False

    def heads_of(self, stack: str) -> int:
        # where layers differ in it, their configuration gives no one number, and no pattern here has need of it
        return vars(self)["num_attention_heads"]

    def validate_sparse_attention(self) -> None:
        super().validate_sparse_attention()
        patterns = [Pattern.parse(text) for text in self.layer_patterns()]
        for layer, pattern in enumerate(patterns):
            if not self.takes_patterns and pattern != Pattern.parse(self.implied_pattern("", layer)):
                raise ValueError(
                    f"layer {layer} has the pattern {pattern}; {self.model_type} chooses pools of keys, and no pattern limits that: give "
                    "none"
                )
            if pattern.heads or pattern.uses_marks or pattern.uses_content:
                raise ValueError(
                    f"layer {layer} has the pattern {pattern}; {self.model_type} chooses keys by content among those of a pattern of "
                    "positions, without marked(), per_head() or lsh(...)"
                )
            if layer and self.shares_choice(layer) and pattern != patterns[layer - 1]:
                raise ValueError(
                    f"layer {layer} has the pattern {pattern} and attends to what the layer before it chose by {patterns[layer - 1]}; "
                    "give both the same"
                )

    def shares_choice(self, layer: int) -> bool:
        """Does a layer attend to what the one before it chose?"""
        kinds = getattr(self, "indexer_types", None)
        return kinds is not None and kinds[layer] == "shared"
