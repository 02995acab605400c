"""Sparse models: derived from Transformers' own classes, registered with its Auto classes."""

from . import seam  # noqa: F401  (registers our attention with Transformers)
from .bert import (
    SparseBertConfig,
    SparseBertForMaskedLM,
    SparseBertForMultipleChoice,
    SparseBertForNextSentencePrediction,
    SparseBertForPreTraining,
    SparseBertForQuestionAnswering,
    SparseBertForSequenceClassification,
    SparseBertForTokenClassification,
    SparseBertModel,
)
from .config import SparseConfigMixin, parse_layers
from .families import FAMILIES, Family, family_of, register_family
from .llama import (
    SparseLlamaConfig,
    SparseLlamaForCausalLM,
    SparseLlamaForQuestionAnswering,
    SparseLlamaForSequenceClassification,
    SparseLlamaForTokenClassification,
    SparseLlamaModel,
)
from .mixin import SparseMixin
from .sparsify import sparsify

__all__ = [
    "FAMILIES",
    "Family",
    "SparseBertConfig",
    "SparseBertForMaskedLM",
    "SparseBertForMultipleChoice",
    "SparseBertForNextSentencePrediction",
    "SparseBertForPreTraining",
    "SparseBertForQuestionAnswering",
    "SparseBertForSequenceClassification",
    "SparseBertForTokenClassification",
    "SparseBertModel",
    "SparseConfigMixin",
    "SparseLlamaConfig",
    "SparseLlamaForCausalLM",
    "SparseLlamaForQuestionAnswering",
    "SparseLlamaForSequenceClassification",
    "SparseLlamaForTokenClassification",
    "SparseLlamaModel",
    "SparseMixin",
    "family_of",
    "parse_layers",
    "register_family",
    "sparsify",
]
