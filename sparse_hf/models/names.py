"""Public names of `sparse_hf.models` beside the classes of the families."""

# name -> the module that defines it, imported when the name is first asked for
PUBLIC = {
    "FAMILIES": "hf.register",
    "Family": "hf.register",
    "Positions": "hf.positions",
    "SparseConfigMixin": "hf.config",
    "SparseMixin": "hf.model_mixin",
    "StreamingCache": "hf.streaming_cache",
    "dense_class": "hf.register",
    "family_of": "hf.register",
    "parse_layers": "hf.layer_spec",
    "register_family": "hf.register",
    "sparsify": "hf.sparsify",
    "transformers_random_blocks": "bigbird.block_sparse",
}
