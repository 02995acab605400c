"""Public names of `sparse_hf.models` beside the classes of the families, and those of attention implementations.

Nothing here imports torch or Transformers.
"""

from typing import Literal

Implementation = Literal["sparse", "sparse_reference", "sparse_blockwise", "sparse_flex", "sparse_fa", "sparse_triton"]
# the attention implementations of a sparse model -> the backend that each takes
IMPLEMENTATIONS: dict[str, str] = {
    "sparse": "auto",
    "sparse_reference": "reference",
    "sparse_blockwise": "blockwise",
    "sparse_flex": "flex",
    "sparse_fa": "fa",
    "sparse_triton": "triton",
}

# what `cache_implementation` calls a StreamingCache
STREAMING = "streaming"

# name -> the module that defines it, imported when the name is first asked for
PUBLIC = {
    "FAMILIES": "hf.register",
    "Family": "hf.register",
    "Positions": "hf.positions",
    "SparseConfigMixin": "hf.config",
    "SparseMixin": "hf.model_mixin",
    "StreamingCache": "hf.streaming_cache",
    "dense_class": "hf.register",
    "derived_types": "derived.entry",
    "family_of": "hf.register",
    "indexer_losses": "indexed.loss",
    "parse_layers": "hf.layer_spec",
    "register_family": "hf.register",
    "sparsify": "hf.sparsify",
    "transformers_random_blocks": "bigbird.block_sparse",
}
