"""sparse_qwen3_moe: Qwen3 MoE (arXiv:2505.09388) with sparse attention."""

from transformers import Qwen3MoeConfig

from .hf.config import SparseConfigMixin
from .hf.positions import ROTARY
from .hf.register import register_family


class SparseQwen3MoeConfig(SparseConfigMixin, Qwen3MoeConfig):
    model_type = "sparse_qwen3_moe"


register_family(SparseQwen3MoeConfig, ROTARY)
