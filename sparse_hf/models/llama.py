"""sparse_llama: Llama (arXiv:2302.13971, arXiv:2407.21783) with sparse attention."""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .config import SparseConfigMixin
from .families import register_family
from .mixin import SparseGenerationMixin, SparseMixin


class SparseLlamaConfig(SparseConfigMixin, LlamaConfig):
    model_type = "sparse_llama"


class SparseLlamaModel(SparseMixin, LlamaModel):
    config: SparseLlamaConfig


class SparseLlamaForCausalLM(SparseGenerationMixin, LlamaForCausalLM):
    config: SparseLlamaConfig


class SparseLlamaForSequenceClassification(SparseMixin, LlamaForSequenceClassification):
    config: SparseLlamaConfig


class SparseLlamaForTokenClassification(SparseMixin, LlamaForTokenClassification):
    config: SparseLlamaConfig


class SparseLlamaForQuestionAnswering(SparseMixin, LlamaForQuestionAnswering):
    config: SparseLlamaConfig
    # its labels are positions, which Trainer cannot count: it averages the loss
    accepts_loss_kwargs = False


register_family(
    "llama",
    SparseLlamaConfig,
    {
        SparseLlamaModel: AutoModel,
        SparseLlamaForCausalLM: AutoModelForCausalLM,
        SparseLlamaForSequenceClassification: AutoModelForSequenceClassification,
        SparseLlamaForTokenClassification: AutoModelForTokenClassification,
        SparseLlamaForQuestionAnswering: AutoModelForQuestionAnswering,
    },
)
