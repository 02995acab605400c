"""sparse_bert: BERT (arXiv:1810.04805) with sparse attention."""

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from .config import SparseConfigMixin
from .families import register_family
from .mixin import SparseMixin


class SparseBertConfig(SparseConfigMixin, BertConfig):
    model_type = "sparse_bert"


class SparseBertModel(SparseMixin, BertModel):
    config: SparseBertConfig


class SparseBertForPreTraining(SparseMixin, BertForPreTraining):
    config: SparseBertConfig
    # the sum of two means over different labels: Trainer averages it
    accepts_loss_kwargs = False


class SparseBertForMaskedLM(SparseMixin, BertForMaskedLM):
    config: SparseBertConfig


class SparseBertForSequenceClassification(SparseMixin, BertForSequenceClassification):
    config: SparseBertConfig


class SparseBertForTokenClassification(SparseMixin, BertForTokenClassification):
    config: SparseBertConfig


class SparseBertForQuestionAnswering(SparseMixin, BertForQuestionAnswering):
    config: SparseBertConfig
    # its labels are positions, which Trainer cannot count: it averages the loss
    accepts_loss_kwargs = False


class SparseBertForMultipleChoice(SparseMixin, BertForMultipleChoice):
    config: SparseBertConfig


class SparseBertForNextSentencePrediction(SparseMixin, BertForNextSentencePrediction):
    config: SparseBertConfig


register_family(
    "bert",
    SparseBertConfig,
    {
        SparseBertModel: AutoModel,
        SparseBertForPreTraining: AutoModelForPreTraining,
        SparseBertForMaskedLM: AutoModelForMaskedLM,
        SparseBertForSequenceClassification: AutoModelForSequenceClassification,
        SparseBertForTokenClassification: AutoModelForTokenClassification,
        SparseBertForQuestionAnswering: AutoModelForQuestionAnswering,
        SparseBertForMultipleChoice: AutoModelForMultipleChoice,
        SparseBertForNextSentencePrediction: AutoModelForNextSentencePrediction,
    },
    position_tables=("embeddings.position_embeddings.weight",),
    position_buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
)
