"""Written by `python -m tests.stubs`, see there."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

from transformers.models.albert.configuration_albert import AlbertConfig
from transformers.models.albert.modeling_albert import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from transformers.models.axk2.configuration_axk2 import AXK2Config
from transformers.models.axk2.modeling_axk2 import (
    AXK2ForCausalLM,
    AXK2ForSequenceClassification,
    AXK2ForTokenClassification,
    AXK2Model,
)
from transformers.models.bart.configuration_bart import BartConfig
from transformers.models.bart.modeling_bart import (
    BartForCausalLM,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BartModel,
)
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)
from transformers.models.big_bird.configuration_big_bird import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForPreTraining,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
)
from transformers.models.bigbird_pegasus.configuration_bigbird_pegasus import BigBirdPegasusConfig
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusForCausalLM,
    BigBirdPegasusForConditionalGeneration,
    BigBirdPegasusForQuestionAnswering,
    BigBirdPegasusForSequenceClassification,
    BigBirdPegasusModel,
)
from transformers.models.bloom.configuration_bloom import BloomConfig
from transformers.models.bloom.modeling_bloom import (
    BloomForCausalLM,
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomModel,
)
from transformers.models.camembert.configuration_camembert import CamembertConfig
from transformers.models.camembert.modeling_camembert import (
    CamembertForCausalLM,
    CamembertForMaskedLM,
    CamembertForMultipleChoice,
    CamembertForQuestionAnswering,
    CamembertForSequenceClassification,
    CamembertForTokenClassification,
    CamembertModel,
)
from transformers.models.cohere2.configuration_cohere2 import Cohere2Config
from transformers.models.cohere2.modeling_cohere2 import Cohere2ForCausalLM, Cohere2Model
from transformers.models.deberta.configuration_deberta import DebertaConfig
from transformers.models.deberta.modeling_deberta import (
    DebertaForMaskedLM,
    DebertaForQuestionAnswering,
    DebertaForSequenceClassification,
    DebertaForTokenClassification,
    DebertaModel,
)
from transformers.models.deberta_v2.configuration_deberta_v2 import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM, DeepseekV4Model
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32ForCausalLM, DeepseekV32Model
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig
from transformers.models.distilbert.modeling_distilbert import (
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)
from transformers.models.dots3_note.configuration_dots3_note import Dots3NoteTextConfig
from transformers.models.dots3_note.modeling_dots3_note import Dots3NoteForCausalLM, Dots3NoteTextModel
from transformers.models.electra.configuration_electra import ElectraConfig
from transformers.models.electra.modeling_electra import (
    ElectraForCausalLM,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from transformers.models.falcon.configuration_falcon import FalconConfig
from transformers.models.falcon.modeling_falcon import (
    FalconForCausalLM,
    FalconForQuestionAnswering,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    FalconModel,
)
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
)
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
)
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel
from transformers.models.glm_moe_dsa.configuration_glm_moe_dsa import GlmMoeDsaConfig
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaForCausalLM, GlmMoeDsaModel
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteForCausalLM, GraniteModel
from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import HYV4ForCausalLM, HYV4Model
from transformers.models.hy_v4_vl.configuration_hy_v4_vl import HYV4VLTextConfig
from transformers.models.hy_v4_vl.modeling_hy_v4_vl import HYV4VLTextModel
from transformers.models.led.configuration_led import LEDConfig
from transformers.models.led.modeling_led import LEDForConditionalGeneration, LEDForQuestionAnswering, LEDModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.longformer.configuration_longformer import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerForTokenClassification
from transformers.models.mbart.configuration_mbart import MBartConfig
from transformers.models.mbart.modeling_mbart import (
    MBartForCausalLM,
    MBartForConditionalGeneration,
    MBartForQuestionAnswering,
    MBartForSequenceClassification,
    MBartModel,
)
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from transformers.models.mistral_large4.configuration_mistral_large4 import MistralLarge4TextConfig
from transformers.models.mistral_large4.modeling_mistral_large4 import MistralLarge4TextModel
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralForCausalLM,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
)
from transformers.models.modernbert.configuration_modernbert import ModernBertConfig
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)
from transformers.models.mpnet.configuration_mpnet import MPNetConfig
from transformers.models.mpnet.modeling_mpnet import (
    MPNetForMaskedLM,
    MPNetForMultipleChoice,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetForTokenClassification,
    MPNetModel,
)
from transformers.models.mpt.configuration_mpt import MptConfig
from transformers.models.mpt.modeling_mpt import (
    MptForCausalLM,
    MptForQuestionAnswering,
    MptForSequenceClassification,
    MptForTokenClassification,
    MptModel,
)
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
)
from transformers.models.pegasus.configuration_pegasus import PegasusConfig
from transformers.models.pegasus.modeling_pegasus import (
    PegasusForCausalLM,
    PegasusForConditionalGeneration,
    PegasusModel,
)
from transformers.models.perceiver.configuration_perceiver import PerceiverConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import (
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
)
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
)
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM, Qwen4ExpTextModel
from transformers.models.reformer.configuration_reformer import ReformerConfig
from transformers.models.reformer.modeling_reformer import (
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
)
from transformers.models.roberta.configuration_roberta import RobertaConfig
from transformers.models.roberta.modeling_roberta import (
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3ForCausalLM,
    SmolLM3ForQuestionAnswering,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import (
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)
from transformers.models.xlm_roberta.configuration_xlm_roberta import XLMRobertaConfig
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaForCausalLM,
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

from ..pattern.like import PatternLike
from .bigbird.block_sparse import BlockSparseConfigMixin
from .bigbird.block_sparse import transformers_random_blocks as transformers_random_blocks
from .bigbird.modeling import SparseBigBirdModel as SparseBigBirdModel
from .bigbird.pegasus import BlockSparseEncoderConfigMixin
from .derived.entry import derived_types as derived_types
from .hf.config import SparseConfigMixin as SparseConfigMixin
from .hf.encoder_decoder import SparseEncoderDecoderConfigMixin
from .hf.layer_spec import LayersLike
from .hf.layer_spec import parse_layers as parse_layers
from .hf.model_mixin import SparseGenerationMixin
from .hf.model_mixin import SparseMixin as SparseMixin
from .hf.positions import Positions as Positions
from .hf.register import FAMILIES as FAMILIES
from .hf.register import Family as Family
from .hf.register import dense_class as dense_class
from .hf.register import family_of as family_of
from .hf.register import register_family as register_family
from .hf.sparsify import sparsify as sparsify
from .hf.streaming_cache import StreamingCache as StreamingCache
from .indexed.config import IndexedConfigMixin
from .indexed.loss import indexer_losses as indexer_losses
from .longformer.attention_window import AttentionWindowConfigMixin, AttentionWindowEncoderConfigMixin
from .longformer.modeling import SparseLongformerForMaskedLM as SparseLongformerForMaskedLM
from .longformer.modeling import SparseLongformerForMultipleChoice as SparseLongformerForMultipleChoice
from .longformer.modeling import SparseLongformerForQuestionAnswering as SparseLongformerForQuestionAnswering
from .longformer.modeling import SparseLongformerForSequenceClassification as SparseLongformerForSequenceClassification
from .longformer.modeling import SparseLongformerModel as SparseLongformerModel
from .perceiver.modeling import (
    SparsePerceiverForImageClassificationConvProcessing as SparsePerceiverForImageClassificationConvProcessing,
)
from .perceiver.modeling import (
    SparsePerceiverForImageClassificationFourier as SparsePerceiverForImageClassificationFourier,
)
from .perceiver.modeling import (
    SparsePerceiverForImageClassificationLearned as SparsePerceiverForImageClassificationLearned,
)
from .perceiver.modeling import SparsePerceiverForMaskedLM as SparsePerceiverForMaskedLM
from .perceiver.modeling import SparsePerceiverForMultimodalAutoencoding as SparsePerceiverForMultimodalAutoencoding
from .perceiver.modeling import SparsePerceiverForOpticalFlow as SparsePerceiverForOpticalFlow
from .perceiver.modeling import SparsePerceiverForSequenceClassification as SparsePerceiverForSequenceClassification
from .perceiver.modeling import SparsePerceiverModel as SparsePerceiverModel
from .reformer.modeling import SparseReformerForMaskedLM as SparseReformerForMaskedLM
from .reformer.modeling import SparseReformerModel as SparseReformerModel
from .reformer.modeling import SparseReformerModelWithLMHead as SparseReformerModelWithLMHead

__all__ = [
    "FAMILIES",
    "Family",
    "Positions",
    "SparseConfigMixin",
    "SparseMixin",
    "StreamingCache",
    "dense_class",
    "derived_types",
    "family_of",
    "indexer_losses",
    "parse_layers",
    "register_family",
    "sparsify",
    "transformers_random_blocks",
    "SparseBartConfig",
    "SparseBartModel",
    "SparseBartForConditionalGeneration",
    "SparseBartForCausalLM",
    "SparseBartForSequenceClassification",
    "SparseBartForQuestionAnswering",
    "SparseBertConfig",
    "SparseBertModel",
    "SparseBertForPreTraining",
    "SparseBertLMHeadModel",
    "SparseBertForMaskedLM",
    "SparseBertForSequenceClassification",
    "SparseBertForQuestionAnswering",
    "SparseBertForTokenClassification",
    "SparseBertForMultipleChoice",
    "SparseBertForNextSentencePrediction",
    "SparseCamembertConfig",
    "SparseCamembertModel",
    "SparseCamembertForMaskedLM",
    "SparseCamembertForCausalLM",
    "SparseCamembertForSequenceClassification",
    "SparseCamembertForQuestionAnswering",
    "SparseCamembertForTokenClassification",
    "SparseCamembertForMultipleChoice",
    "SparseCohere2Config",
    "SparseCohere2Model",
    "SparseCohere2ForCausalLM",
    "SparseElectraConfig",
    "SparseElectraModel",
    "SparseElectraForPreTraining",
    "SparseElectraForCausalLM",
    "SparseElectraForMaskedLM",
    "SparseElectraForSequenceClassification",
    "SparseElectraForQuestionAnswering",
    "SparseElectraForTokenClassification",
    "SparseElectraForMultipleChoice",
    "SparseGPT2Config",
    "SparseGPT2Model",
    "SparseGPT2LMHeadModel",
    "SparseGPT2ForSequenceClassification",
    "SparseGPT2ForQuestionAnswering",
    "SparseGPT2ForTokenClassification",
    "SparseGPTNeoXConfig",
    "SparseGPTNeoXModel",
    "SparseGPTNeoXForCausalLM",
    "SparseGPTNeoXForSequenceClassification",
    "SparseGPTNeoXForQuestionAnswering",
    "SparseGPTNeoXForTokenClassification",
    "SparseGemma2Config",
    "SparseGemma2Model",
    "SparseGemma2ForCausalLM",
    "SparseGemma2ForSequenceClassification",
    "SparseGemma2ForTokenClassification",
    "SparseGemma3TextConfig",
    "SparseGemma3TextModel",
    "SparseGemma3ForCausalLM",
    "SparseGemma3TextForSequenceClassification",
    "SparseGraniteConfig",
    "SparseGraniteModel",
    "SparseGraniteForCausalLM",
    "SparseLlamaConfig",
    "SparseLlamaModel",
    "SparseLlamaForCausalLM",
    "SparseLlamaForSequenceClassification",
    "SparseLlamaForQuestionAnswering",
    "SparseLlamaForTokenClassification",
    "SparseMBartConfig",
    "SparseMBartModel",
    "SparseMBartForCausalLM",
    "SparseMBartForConditionalGeneration",
    "SparseMBartForSequenceClassification",
    "SparseMBartForQuestionAnswering",
    "SparseMistralConfig",
    "SparseMistralModel",
    "SparseMistralForCausalLM",
    "SparseMistralForSequenceClassification",
    "SparseMistralForQuestionAnswering",
    "SparseMistralForTokenClassification",
    "SparseMixtralConfig",
    "SparseMixtralModel",
    "SparseMixtralForCausalLM",
    "SparseMixtralForSequenceClassification",
    "SparseMixtralForQuestionAnswering",
    "SparseMixtralForTokenClassification",
    "SparseOlmo2Config",
    "SparseOlmo2Model",
    "SparseOlmo2ForCausalLM",
    "SparseOlmo2ForSequenceClassification",
    "SparseOPTConfig",
    "SparseOPTModel",
    "SparseOPTForCausalLM",
    "SparseOPTForSequenceClassification",
    "SparseOPTForQuestionAnswering",
    "SparsePegasusConfig",
    "SparsePegasusModel",
    "SparsePegasusForCausalLM",
    "SparsePegasusForConditionalGeneration",
    "SparsePhi3Config",
    "SparsePhi3Model",
    "SparsePhi3ForCausalLM",
    "SparsePhi3ForSequenceClassification",
    "SparsePhi3ForTokenClassification",
    "SparseQwen2Config",
    "SparseQwen2Model",
    "SparseQwen2ForCausalLM",
    "SparseQwen2ForSequenceClassification",
    "SparseQwen2ForQuestionAnswering",
    "SparseQwen2ForTokenClassification",
    "SparseQwen3Config",
    "SparseQwen3Model",
    "SparseQwen3ForCausalLM",
    "SparseQwen3ForSequenceClassification",
    "SparseQwen3ForQuestionAnswering",
    "SparseQwen3ForTokenClassification",
    "SparseQwen3MoeConfig",
    "SparseQwen3MoeModel",
    "SparseQwen3MoeForCausalLM",
    "SparseQwen3MoeForSequenceClassification",
    "SparseQwen3MoeForQuestionAnswering",
    "SparseQwen3MoeForTokenClassification",
    "SparseRobertaConfig",
    "SparseRobertaModel",
    "SparseRobertaForMaskedLM",
    "SparseRobertaForCausalLM",
    "SparseRobertaForSequenceClassification",
    "SparseRobertaForQuestionAnswering",
    "SparseRobertaForTokenClassification",
    "SparseRobertaForMultipleChoice",
    "SparseSmolLM3Config",
    "SparseSmolLM3Model",
    "SparseSmolLM3ForCausalLM",
    "SparseSmolLM3ForSequenceClassification",
    "SparseSmolLM3ForQuestionAnswering",
    "SparseSmolLM3ForTokenClassification",
    "SparseXLMRobertaConfig",
    "SparseXLMRobertaModel",
    "SparseXLMRobertaForMaskedLM",
    "SparseXLMRobertaForCausalLM",
    "SparseXLMRobertaForSequenceClassification",
    "SparseXLMRobertaForQuestionAnswering",
    "SparseXLMRobertaForTokenClassification",
    "SparseXLMRobertaForMultipleChoice",
    "SparseAlbertConfig",
    "SparseAlbertModel",
    "SparseAlbertForPreTraining",
    "SparseAlbertForMaskedLM",
    "SparseAlbertForSequenceClassification",
    "SparseAlbertForQuestionAnswering",
    "SparseAlbertForTokenClassification",
    "SparseAlbertForMultipleChoice",
    "SparseBigBirdConfig",
    "SparseBigBirdModel",
    "SparseBigBirdForPreTraining",
    "SparseBigBirdForCausalLM",
    "SparseBigBirdForMaskedLM",
    "SparseBigBirdForSequenceClassification",
    "SparseBigBirdForQuestionAnswering",
    "SparseBigBirdForTokenClassification",
    "SparseBigBirdForMultipleChoice",
    "SparseBigBirdPegasusConfig",
    "SparseBigBirdPegasusModel",
    "SparseBigBirdPegasusForCausalLM",
    "SparseBigBirdPegasusForConditionalGeneration",
    "SparseBigBirdPegasusForSequenceClassification",
    "SparseBigBirdPegasusForQuestionAnswering",
    "SparseBloomConfig",
    "SparseBloomModel",
    "SparseBloomForCausalLM",
    "SparseBloomForSequenceClassification",
    "SparseBloomForQuestionAnswering",
    "SparseBloomForTokenClassification",
    "SparseDebertaConfig",
    "SparseDebertaModel",
    "SparseDebertaForMaskedLM",
    "SparseDebertaForSequenceClassification",
    "SparseDebertaForQuestionAnswering",
    "SparseDebertaForTokenClassification",
    "SparseDebertaV2Config",
    "SparseDebertaV2Model",
    "SparseDebertaV2ForMaskedLM",
    "SparseDebertaV2ForSequenceClassification",
    "SparseDebertaV2ForQuestionAnswering",
    "SparseDebertaV2ForTokenClassification",
    "SparseDebertaV2ForMultipleChoice",
    "SparseDistilBertConfig",
    "SparseDistilBertModel",
    "SparseDistilBertForMaskedLM",
    "SparseDistilBertForSequenceClassification",
    "SparseDistilBertForQuestionAnswering",
    "SparseDistilBertForTokenClassification",
    "SparseDistilBertForMultipleChoice",
    "SparseFalconConfig",
    "SparseFalconModel",
    "SparseFalconForCausalLM",
    "SparseFalconForSequenceClassification",
    "SparseFalconForQuestionAnswering",
    "SparseFalconForTokenClassification",
    "SparseLEDConfig",
    "SparseLEDModel",
    "SparseLEDForConditionalGeneration",
    "SparseLEDForQuestionAnswering",
    "SparseLongformerConfig",
    "SparseLongformerModel",
    "SparseLongformerForMaskedLM",
    "SparseLongformerForSequenceClassification",
    "SparseLongformerForQuestionAnswering",
    "SparseLongformerForTokenClassification",
    "SparseLongformerForMultipleChoice",
    "SparseModernBertConfig",
    "SparseModernBertModel",
    "SparseModernBertForMaskedLM",
    "SparseModernBertForSequenceClassification",
    "SparseModernBertForQuestionAnswering",
    "SparseModernBertForTokenClassification",
    "SparseModernBertForMultipleChoice",
    "SparseMPNetConfig",
    "SparseMPNetModel",
    "SparseMPNetForMaskedLM",
    "SparseMPNetForSequenceClassification",
    "SparseMPNetForQuestionAnswering",
    "SparseMPNetForTokenClassification",
    "SparseMPNetForMultipleChoice",
    "SparseMptConfig",
    "SparseMptModel",
    "SparseMptForCausalLM",
    "SparseMptForSequenceClassification",
    "SparseMptForQuestionAnswering",
    "SparseMptForTokenClassification",
    "SparsePerceiverConfig",
    "SparsePerceiverModel",
    "SparsePerceiverForMaskedLM",
    "SparsePerceiverForSequenceClassification",
    "SparsePerceiverForImageClassificationLearned",
    "SparsePerceiverForImageClassificationFourier",
    "SparsePerceiverForImageClassificationConvProcessing",
    "SparsePerceiverForOpticalFlow",
    "SparsePerceiverForMultimodalAutoencoding",
    "SparseReformerConfig",
    "SparseReformerModel",
    "SparseReformerModelWithLMHead",
    "SparseReformerForMaskedLM",
    "SparseReformerForSequenceClassification",
    "SparseReformerForQuestionAnswering",
    "SparseT5Config",
    "SparseT5EncoderModel",
    "SparseT5Model",
    "SparseT5ForConditionalGeneration",
    "SparseT5ForSequenceClassification",
    "SparseT5ForQuestionAnswering",
    "SparseT5ForTokenClassification",
    "SparseAXK2Config",
    "SparseAXK2Model",
    "SparseAXK2ForCausalLM",
    "SparseAXK2ForSequenceClassification",
    "SparseAXK2ForTokenClassification",
    "SparseDeepseekV32Config",
    "SparseDeepseekV32Model",
    "SparseDeepseekV32ForCausalLM",
    "SparseDeepseekV4Config",
    "SparseDeepseekV4Model",
    "SparseDeepseekV4ForCausalLM",
    "SparseDots3NoteTextConfig",
    "SparseDots3NoteTextModel",
    "SparseDots3NoteForCausalLM",
    "SparseGlm5NextTextConfig",
    "SparseGlm5NextTextModel",
    "SparseGlmMoeDsaConfig",
    "SparseGlmMoeDsaModel",
    "SparseGlmMoeDsaForCausalLM",
    "SparseHYV4Config",
    "SparseHYV4Model",
    "SparseHYV4ForCausalLM",
    "SparseHYV4VLTextConfig",
    "SparseHYV4VLTextModel",
    "SparseMiniMaxM3VLTextConfig",
    "SparseMiniMaxM3VLTextModel",
    "SparseMiniMaxM3VLForCausalLM",
    "SparseMistralLarge4TextConfig",
    "SparseMistralLarge4TextModel",
    "SparseQwen4ExpTextConfig",
    "SparseQwen4ExpTextModel",
    "SparseQwen4ExpForCausalLM",
]

@dataclass(kw_only=True)
class SparseBartConfig(SparseEncoderDecoderConfigMixin, BartConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseBartModel(SparseMixin, BartModel):
    config: SparseBartConfig

class SparseBartForConditionalGeneration(SparseGenerationMixin, BartForConditionalGeneration):
    config: SparseBartConfig

class SparseBartForCausalLM(SparseGenerationMixin, BartForCausalLM):
    config: SparseBartConfig

class SparseBartForSequenceClassification(SparseMixin, BartForSequenceClassification):
    config: SparseBartConfig

class SparseBartForQuestionAnswering(SparseMixin, BartForQuestionAnswering):
    config: SparseBartConfig

@dataclass(kw_only=True)
class SparseBertConfig(SparseConfigMixin, BertConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseBertModel(SparseMixin, BertModel):
    config: SparseBertConfig

class SparseBertForPreTraining(SparseMixin, BertForPreTraining):
    config: SparseBertConfig

class SparseBertLMHeadModel(SparseGenerationMixin, BertLMHeadModel):
    config: SparseBertConfig

class SparseBertForMaskedLM(SparseMixin, BertForMaskedLM):
    config: SparseBertConfig

class SparseBertForSequenceClassification(SparseMixin, BertForSequenceClassification):
    config: SparseBertConfig

class SparseBertForQuestionAnswering(SparseMixin, BertForQuestionAnswering):
    config: SparseBertConfig

class SparseBertForTokenClassification(SparseMixin, BertForTokenClassification):
    config: SparseBertConfig

class SparseBertForMultipleChoice(SparseMixin, BertForMultipleChoice):
    config: SparseBertConfig

class SparseBertForNextSentencePrediction(SparseMixin, BertForNextSentencePrediction):
    config: SparseBertConfig

@dataclass(kw_only=True)
class SparseCamembertConfig(SparseConfigMixin, CamembertConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseCamembertModel(SparseMixin, CamembertModel):
    config: SparseCamembertConfig

class SparseCamembertForMaskedLM(SparseMixin, CamembertForMaskedLM):
    config: SparseCamembertConfig

class SparseCamembertForCausalLM(SparseGenerationMixin, CamembertForCausalLM):
    config: SparseCamembertConfig

class SparseCamembertForSequenceClassification(SparseMixin, CamembertForSequenceClassification):
    config: SparseCamembertConfig

class SparseCamembertForQuestionAnswering(SparseMixin, CamembertForQuestionAnswering):
    config: SparseCamembertConfig

class SparseCamembertForTokenClassification(SparseMixin, CamembertForTokenClassification):
    config: SparseCamembertConfig

class SparseCamembertForMultipleChoice(SparseMixin, CamembertForMultipleChoice):
    config: SparseCamembertConfig

@dataclass(kw_only=True)
class SparseCohere2Config(SparseConfigMixin, Cohere2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseCohere2Model(SparseMixin, Cohere2Model):
    config: SparseCohere2Config

class SparseCohere2ForCausalLM(SparseGenerationMixin, Cohere2ForCausalLM):
    config: SparseCohere2Config

@dataclass(kw_only=True)
class SparseElectraConfig(SparseConfigMixin, ElectraConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseElectraModel(SparseMixin, ElectraModel):
    config: SparseElectraConfig

class SparseElectraForPreTraining(SparseMixin, ElectraForPreTraining):
    config: SparseElectraConfig

class SparseElectraForCausalLM(SparseGenerationMixin, ElectraForCausalLM):
    config: SparseElectraConfig

class SparseElectraForMaskedLM(SparseMixin, ElectraForMaskedLM):
    config: SparseElectraConfig

class SparseElectraForSequenceClassification(SparseMixin, ElectraForSequenceClassification):
    config: SparseElectraConfig

class SparseElectraForQuestionAnswering(SparseMixin, ElectraForQuestionAnswering):
    config: SparseElectraConfig

class SparseElectraForTokenClassification(SparseMixin, ElectraForTokenClassification):
    config: SparseElectraConfig

class SparseElectraForMultipleChoice(SparseMixin, ElectraForMultipleChoice):
    config: SparseElectraConfig

@dataclass(kw_only=True)
class SparseGPT2Config(SparseConfigMixin, GPT2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGPT2Model(SparseMixin, GPT2Model):
    config: SparseGPT2Config

class SparseGPT2LMHeadModel(SparseGenerationMixin, GPT2LMHeadModel):
    config: SparseGPT2Config

class SparseGPT2ForSequenceClassification(SparseMixin, GPT2ForSequenceClassification):
    config: SparseGPT2Config

class SparseGPT2ForQuestionAnswering(SparseMixin, GPT2ForQuestionAnswering):
    config: SparseGPT2Config

class SparseGPT2ForTokenClassification(SparseMixin, GPT2ForTokenClassification):
    config: SparseGPT2Config

@dataclass(kw_only=True)
class SparseGPTNeoXConfig(SparseConfigMixin, GPTNeoXConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGPTNeoXModel(SparseMixin, GPTNeoXModel):
    config: SparseGPTNeoXConfig

class SparseGPTNeoXForCausalLM(SparseGenerationMixin, GPTNeoXForCausalLM):
    config: SparseGPTNeoXConfig

class SparseGPTNeoXForSequenceClassification(SparseMixin, GPTNeoXForSequenceClassification):
    config: SparseGPTNeoXConfig

class SparseGPTNeoXForQuestionAnswering(SparseMixin, GPTNeoXForQuestionAnswering):
    config: SparseGPTNeoXConfig

class SparseGPTNeoXForTokenClassification(SparseMixin, GPTNeoXForTokenClassification):
    config: SparseGPTNeoXConfig

@dataclass(kw_only=True)
class SparseGemma2Config(SparseConfigMixin, Gemma2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGemma2Model(SparseMixin, Gemma2Model):
    config: SparseGemma2Config

class SparseGemma2ForCausalLM(SparseGenerationMixin, Gemma2ForCausalLM):
    config: SparseGemma2Config

class SparseGemma2ForSequenceClassification(SparseMixin, Gemma2ForSequenceClassification):
    config: SparseGemma2Config

class SparseGemma2ForTokenClassification(SparseMixin, Gemma2ForTokenClassification):
    config: SparseGemma2Config

@dataclass(kw_only=True)
class SparseGemma3TextConfig(SparseConfigMixin, Gemma3TextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGemma3TextModel(SparseMixin, Gemma3TextModel):
    config: SparseGemma3TextConfig

class SparseGemma3ForCausalLM(SparseGenerationMixin, Gemma3ForCausalLM):
    config: SparseGemma3TextConfig

class SparseGemma3TextForSequenceClassification(SparseMixin, Gemma3TextForSequenceClassification):
    config: SparseGemma3TextConfig

@dataclass(kw_only=True)
class SparseGraniteConfig(SparseConfigMixin, GraniteConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGraniteModel(SparseMixin, GraniteModel):
    config: SparseGraniteConfig

class SparseGraniteForCausalLM(SparseGenerationMixin, GraniteForCausalLM):
    config: SparseGraniteConfig

@dataclass(kw_only=True)
class SparseLlamaConfig(SparseConfigMixin, LlamaConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseLlamaModel(SparseMixin, LlamaModel):
    config: SparseLlamaConfig

class SparseLlamaForCausalLM(SparseGenerationMixin, LlamaForCausalLM):
    config: SparseLlamaConfig

class SparseLlamaForSequenceClassification(SparseMixin, LlamaForSequenceClassification):
    config: SparseLlamaConfig

class SparseLlamaForQuestionAnswering(SparseMixin, LlamaForQuestionAnswering):
    config: SparseLlamaConfig

class SparseLlamaForTokenClassification(SparseMixin, LlamaForTokenClassification):
    config: SparseLlamaConfig

@dataclass(kw_only=True)
class SparseMBartConfig(SparseEncoderDecoderConfigMixin, MBartConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMBartModel(SparseMixin, MBartModel):
    config: SparseMBartConfig

class SparseMBartForCausalLM(SparseGenerationMixin, MBartForCausalLM):
    config: SparseMBartConfig

class SparseMBartForConditionalGeneration(SparseGenerationMixin, MBartForConditionalGeneration):
    config: SparseMBartConfig

class SparseMBartForSequenceClassification(SparseMixin, MBartForSequenceClassification):
    config: SparseMBartConfig

class SparseMBartForQuestionAnswering(SparseMixin, MBartForQuestionAnswering):
    config: SparseMBartConfig

@dataclass(kw_only=True)
class SparseMistralConfig(SparseConfigMixin, MistralConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMistralModel(SparseMixin, MistralModel):
    config: SparseMistralConfig

class SparseMistralForCausalLM(SparseGenerationMixin, MistralForCausalLM):
    config: SparseMistralConfig

class SparseMistralForSequenceClassification(SparseMixin, MistralForSequenceClassification):
    config: SparseMistralConfig

class SparseMistralForQuestionAnswering(SparseMixin, MistralForQuestionAnswering):
    config: SparseMistralConfig

class SparseMistralForTokenClassification(SparseMixin, MistralForTokenClassification):
    config: SparseMistralConfig

@dataclass(kw_only=True)
class SparseMixtralConfig(SparseConfigMixin, MixtralConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMixtralModel(SparseMixin, MixtralModel):
    config: SparseMixtralConfig

class SparseMixtralForCausalLM(SparseGenerationMixin, MixtralForCausalLM):
    config: SparseMixtralConfig

class SparseMixtralForSequenceClassification(SparseMixin, MixtralForSequenceClassification):
    config: SparseMixtralConfig

class SparseMixtralForQuestionAnswering(SparseMixin, MixtralForQuestionAnswering):
    config: SparseMixtralConfig

class SparseMixtralForTokenClassification(SparseMixin, MixtralForTokenClassification):
    config: SparseMixtralConfig

@dataclass(kw_only=True)
class SparseOlmo2Config(SparseConfigMixin, Olmo2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseOlmo2Model(SparseMixin, Olmo2Model):
    config: SparseOlmo2Config

class SparseOlmo2ForCausalLM(SparseGenerationMixin, Olmo2ForCausalLM):
    config: SparseOlmo2Config

class SparseOlmo2ForSequenceClassification(SparseMixin, Olmo2ForSequenceClassification):
    config: SparseOlmo2Config

@dataclass(kw_only=True)
class SparseOPTConfig(SparseConfigMixin, OPTConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseOPTModel(SparseMixin, OPTModel):
    config: SparseOPTConfig

class SparseOPTForCausalLM(SparseGenerationMixin, OPTForCausalLM):
    config: SparseOPTConfig

class SparseOPTForSequenceClassification(SparseMixin, OPTForSequenceClassification):
    config: SparseOPTConfig

class SparseOPTForQuestionAnswering(SparseMixin, OPTForQuestionAnswering):
    config: SparseOPTConfig

@dataclass(kw_only=True)
class SparsePegasusConfig(SparseEncoderDecoderConfigMixin, PegasusConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparsePegasusModel(SparseMixin, PegasusModel):
    config: SparsePegasusConfig

class SparsePegasusForCausalLM(SparseGenerationMixin, PegasusForCausalLM):
    config: SparsePegasusConfig

class SparsePegasusForConditionalGeneration(SparseGenerationMixin, PegasusForConditionalGeneration):
    config: SparsePegasusConfig

@dataclass(kw_only=True)
class SparsePhi3Config(SparseConfigMixin, Phi3Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparsePhi3Model(SparseMixin, Phi3Model):
    config: SparsePhi3Config

class SparsePhi3ForCausalLM(SparseGenerationMixin, Phi3ForCausalLM):
    config: SparsePhi3Config

class SparsePhi3ForSequenceClassification(SparseMixin, Phi3ForSequenceClassification):
    config: SparsePhi3Config

class SparsePhi3ForTokenClassification(SparseMixin, Phi3ForTokenClassification):
    config: SparsePhi3Config

@dataclass(kw_only=True)
class SparseQwen2Config(SparseConfigMixin, Qwen2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseQwen2Model(SparseMixin, Qwen2Model):
    config: SparseQwen2Config

class SparseQwen2ForCausalLM(SparseGenerationMixin, Qwen2ForCausalLM):
    config: SparseQwen2Config

class SparseQwen2ForSequenceClassification(SparseMixin, Qwen2ForSequenceClassification):
    config: SparseQwen2Config

class SparseQwen2ForQuestionAnswering(SparseMixin, Qwen2ForQuestionAnswering):
    config: SparseQwen2Config

class SparseQwen2ForTokenClassification(SparseMixin, Qwen2ForTokenClassification):
    config: SparseQwen2Config

@dataclass(kw_only=True)
class SparseQwen3Config(SparseConfigMixin, Qwen3Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseQwen3Model(SparseMixin, Qwen3Model):
    config: SparseQwen3Config

class SparseQwen3ForCausalLM(SparseGenerationMixin, Qwen3ForCausalLM):
    config: SparseQwen3Config

class SparseQwen3ForSequenceClassification(SparseMixin, Qwen3ForSequenceClassification):
    config: SparseQwen3Config

class SparseQwen3ForQuestionAnswering(SparseMixin, Qwen3ForQuestionAnswering):
    config: SparseQwen3Config

class SparseQwen3ForTokenClassification(SparseMixin, Qwen3ForTokenClassification):
    config: SparseQwen3Config

@dataclass(kw_only=True)
class SparseQwen3MoeConfig(SparseConfigMixin, Qwen3MoeConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseQwen3MoeModel(SparseMixin, Qwen3MoeModel):
    config: SparseQwen3MoeConfig

class SparseQwen3MoeForCausalLM(SparseGenerationMixin, Qwen3MoeForCausalLM):
    config: SparseQwen3MoeConfig

class SparseQwen3MoeForSequenceClassification(SparseMixin, Qwen3MoeForSequenceClassification):
    config: SparseQwen3MoeConfig

class SparseQwen3MoeForQuestionAnswering(SparseMixin, Qwen3MoeForQuestionAnswering):
    config: SparseQwen3MoeConfig

class SparseQwen3MoeForTokenClassification(SparseMixin, Qwen3MoeForTokenClassification):
    config: SparseQwen3MoeConfig

@dataclass(kw_only=True)
class SparseRobertaConfig(SparseConfigMixin, RobertaConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseRobertaModel(SparseMixin, RobertaModel):
    config: SparseRobertaConfig

class SparseRobertaForMaskedLM(SparseMixin, RobertaForMaskedLM):
    config: SparseRobertaConfig

class SparseRobertaForCausalLM(SparseGenerationMixin, RobertaForCausalLM):
    config: SparseRobertaConfig

class SparseRobertaForSequenceClassification(SparseMixin, RobertaForSequenceClassification):
    config: SparseRobertaConfig

class SparseRobertaForQuestionAnswering(SparseMixin, RobertaForQuestionAnswering):
    config: SparseRobertaConfig

class SparseRobertaForTokenClassification(SparseMixin, RobertaForTokenClassification):
    config: SparseRobertaConfig

class SparseRobertaForMultipleChoice(SparseMixin, RobertaForMultipleChoice):
    config: SparseRobertaConfig

@dataclass(kw_only=True)
class SparseSmolLM3Config(SparseConfigMixin, SmolLM3Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseSmolLM3Model(SparseMixin, SmolLM3Model):
    config: SparseSmolLM3Config

class SparseSmolLM3ForCausalLM(SparseGenerationMixin, SmolLM3ForCausalLM):
    config: SparseSmolLM3Config

class SparseSmolLM3ForSequenceClassification(SparseMixin, SmolLM3ForSequenceClassification):
    config: SparseSmolLM3Config

class SparseSmolLM3ForQuestionAnswering(SparseMixin, SmolLM3ForQuestionAnswering):
    config: SparseSmolLM3Config

class SparseSmolLM3ForTokenClassification(SparseMixin, SmolLM3ForTokenClassification):
    config: SparseSmolLM3Config

@dataclass(kw_only=True)
class SparseXLMRobertaConfig(SparseConfigMixin, XLMRobertaConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseXLMRobertaModel(SparseMixin, XLMRobertaModel):
    config: SparseXLMRobertaConfig

class SparseXLMRobertaForMaskedLM(SparseMixin, XLMRobertaForMaskedLM):
    config: SparseXLMRobertaConfig

class SparseXLMRobertaForCausalLM(SparseGenerationMixin, XLMRobertaForCausalLM):
    config: SparseXLMRobertaConfig

class SparseXLMRobertaForSequenceClassification(SparseMixin, XLMRobertaForSequenceClassification):
    config: SparseXLMRobertaConfig

class SparseXLMRobertaForQuestionAnswering(SparseMixin, XLMRobertaForQuestionAnswering):
    config: SparseXLMRobertaConfig

class SparseXLMRobertaForTokenClassification(SparseMixin, XLMRobertaForTokenClassification):
    config: SparseXLMRobertaConfig

class SparseXLMRobertaForMultipleChoice(SparseMixin, XLMRobertaForMultipleChoice):
    config: SparseXLMRobertaConfig

@dataclass(kw_only=True)
class SparseAlbertConfig(SparseConfigMixin, AlbertConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseAlbertModel(SparseMixin, AlbertModel):
    config: SparseAlbertConfig

class SparseAlbertForPreTraining(SparseMixin, AlbertForPreTraining):
    config: SparseAlbertConfig

class SparseAlbertForMaskedLM(SparseMixin, AlbertForMaskedLM):
    config: SparseAlbertConfig

class SparseAlbertForSequenceClassification(SparseMixin, AlbertForSequenceClassification):
    config: SparseAlbertConfig

class SparseAlbertForQuestionAnswering(SparseMixin, AlbertForQuestionAnswering):
    config: SparseAlbertConfig

class SparseAlbertForTokenClassification(SparseMixin, AlbertForTokenClassification):
    config: SparseAlbertConfig

class SparseAlbertForMultipleChoice(SparseMixin, AlbertForMultipleChoice):
    config: SparseAlbertConfig

@dataclass(kw_only=True)
class SparseBigBirdConfig(BlockSparseConfigMixin, BigBirdConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseBigBirdForPreTraining(SparseMixin, BigBirdForPreTraining):
    config: SparseBigBirdConfig

class SparseBigBirdForCausalLM(SparseGenerationMixin, BigBirdForCausalLM):
    config: SparseBigBirdConfig

class SparseBigBirdForMaskedLM(SparseMixin, BigBirdForMaskedLM):
    config: SparseBigBirdConfig

class SparseBigBirdForSequenceClassification(SparseMixin, BigBirdForSequenceClassification):
    config: SparseBigBirdConfig

class SparseBigBirdForQuestionAnswering(SparseMixin, BigBirdForQuestionAnswering):
    config: SparseBigBirdConfig

class SparseBigBirdForTokenClassification(SparseMixin, BigBirdForTokenClassification):
    config: SparseBigBirdConfig

class SparseBigBirdForMultipleChoice(SparseMixin, BigBirdForMultipleChoice):
    config: SparseBigBirdConfig

@dataclass(kw_only=True)
class SparseBigBirdPegasusConfig(BlockSparseEncoderConfigMixin, BigBirdPegasusConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseBigBirdPegasusModel(SparseMixin, BigBirdPegasusModel):
    config: SparseBigBirdPegasusConfig

class SparseBigBirdPegasusForCausalLM(SparseGenerationMixin, BigBirdPegasusForCausalLM):
    config: SparseBigBirdPegasusConfig

class SparseBigBirdPegasusForConditionalGeneration(SparseGenerationMixin, BigBirdPegasusForConditionalGeneration):
    config: SparseBigBirdPegasusConfig

class SparseBigBirdPegasusForSequenceClassification(SparseMixin, BigBirdPegasusForSequenceClassification):
    config: SparseBigBirdPegasusConfig

class SparseBigBirdPegasusForQuestionAnswering(SparseMixin, BigBirdPegasusForQuestionAnswering):
    config: SparseBigBirdPegasusConfig

@dataclass(kw_only=True)
class SparseBloomConfig(SparseConfigMixin, BloomConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseBloomModel(SparseMixin, BloomModel):
    config: SparseBloomConfig

class SparseBloomForCausalLM(SparseGenerationMixin, BloomForCausalLM):
    config: SparseBloomConfig

class SparseBloomForSequenceClassification(SparseMixin, BloomForSequenceClassification):
    config: SparseBloomConfig

class SparseBloomForQuestionAnswering(SparseMixin, BloomForQuestionAnswering):
    config: SparseBloomConfig

class SparseBloomForTokenClassification(SparseMixin, BloomForTokenClassification):
    config: SparseBloomConfig

@dataclass(kw_only=True)
class SparseDebertaConfig(SparseConfigMixin, DebertaConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseDebertaModel(SparseMixin, DebertaModel):
    config: SparseDebertaConfig

class SparseDebertaForMaskedLM(SparseMixin, DebertaForMaskedLM):
    config: SparseDebertaConfig

class SparseDebertaForSequenceClassification(SparseMixin, DebertaForSequenceClassification):
    config: SparseDebertaConfig

class SparseDebertaForQuestionAnswering(SparseMixin, DebertaForQuestionAnswering):
    config: SparseDebertaConfig

class SparseDebertaForTokenClassification(SparseMixin, DebertaForTokenClassification):
    config: SparseDebertaConfig

@dataclass(kw_only=True)
class SparseDebertaV2Config(SparseConfigMixin, DebertaV2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseDebertaV2Model(SparseMixin, DebertaV2Model):
    config: SparseDebertaV2Config

class SparseDebertaV2ForMaskedLM(SparseMixin, DebertaV2ForMaskedLM):
    config: SparseDebertaV2Config

class SparseDebertaV2ForSequenceClassification(SparseMixin, DebertaV2ForSequenceClassification):
    config: SparseDebertaV2Config

class SparseDebertaV2ForQuestionAnswering(SparseMixin, DebertaV2ForQuestionAnswering):
    config: SparseDebertaV2Config

class SparseDebertaV2ForTokenClassification(SparseMixin, DebertaV2ForTokenClassification):
    config: SparseDebertaV2Config

class SparseDebertaV2ForMultipleChoice(SparseMixin, DebertaV2ForMultipleChoice):
    config: SparseDebertaV2Config

@dataclass(kw_only=True)
class SparseDistilBertConfig(SparseConfigMixin, DistilBertConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseDistilBertModel(SparseMixin, DistilBertModel):
    config: SparseDistilBertConfig

class SparseDistilBertForMaskedLM(SparseMixin, DistilBertForMaskedLM):
    config: SparseDistilBertConfig

class SparseDistilBertForSequenceClassification(SparseMixin, DistilBertForSequenceClassification):
    config: SparseDistilBertConfig

class SparseDistilBertForQuestionAnswering(SparseMixin, DistilBertForQuestionAnswering):
    config: SparseDistilBertConfig

class SparseDistilBertForTokenClassification(SparseMixin, DistilBertForTokenClassification):
    config: SparseDistilBertConfig

class SparseDistilBertForMultipleChoice(SparseMixin, DistilBertForMultipleChoice):
    config: SparseDistilBertConfig

@dataclass(kw_only=True)
class SparseFalconConfig(SparseConfigMixin, FalconConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseFalconModel(SparseMixin, FalconModel):
    config: SparseFalconConfig

class SparseFalconForCausalLM(SparseGenerationMixin, FalconForCausalLM):
    config: SparseFalconConfig

class SparseFalconForSequenceClassification(SparseMixin, FalconForSequenceClassification):
    config: SparseFalconConfig

class SparseFalconForQuestionAnswering(SparseMixin, FalconForQuestionAnswering):
    config: SparseFalconConfig

class SparseFalconForTokenClassification(SparseMixin, FalconForTokenClassification):
    config: SparseFalconConfig

@dataclass(kw_only=True)
class SparseLEDConfig(AttentionWindowEncoderConfigMixin, LEDConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseLEDModel(SparseMixin, LEDModel):
    config: SparseLEDConfig

class SparseLEDForConditionalGeneration(SparseGenerationMixin, LEDForConditionalGeneration):
    config: SparseLEDConfig

class SparseLEDForQuestionAnswering(SparseMixin, LEDForQuestionAnswering):
    config: SparseLEDConfig

@dataclass(kw_only=True)
class SparseLongformerConfig(AttentionWindowConfigMixin, LongformerConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseLongformerForTokenClassification(SparseMixin, LongformerForTokenClassification):
    config: SparseLongformerConfig

@dataclass(kw_only=True)
class SparseModernBertConfig(SparseConfigMixin, ModernBertConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseModernBertModel(SparseMixin, ModernBertModel):
    config: SparseModernBertConfig

class SparseModernBertForMaskedLM(SparseMixin, ModernBertForMaskedLM):
    config: SparseModernBertConfig

class SparseModernBertForSequenceClassification(SparseMixin, ModernBertForSequenceClassification):
    config: SparseModernBertConfig

class SparseModernBertForQuestionAnswering(SparseMixin, ModernBertForQuestionAnswering):
    config: SparseModernBertConfig

class SparseModernBertForTokenClassification(SparseMixin, ModernBertForTokenClassification):
    config: SparseModernBertConfig

class SparseModernBertForMultipleChoice(SparseMixin, ModernBertForMultipleChoice):
    config: SparseModernBertConfig

@dataclass(kw_only=True)
class SparseMPNetConfig(SparseConfigMixin, MPNetConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMPNetModel(SparseMixin, MPNetModel):
    config: SparseMPNetConfig

class SparseMPNetForMaskedLM(SparseMixin, MPNetForMaskedLM):
    config: SparseMPNetConfig

class SparseMPNetForSequenceClassification(SparseMixin, MPNetForSequenceClassification):
    config: SparseMPNetConfig

class SparseMPNetForQuestionAnswering(SparseMixin, MPNetForQuestionAnswering):
    config: SparseMPNetConfig

class SparseMPNetForTokenClassification(SparseMixin, MPNetForTokenClassification):
    config: SparseMPNetConfig

class SparseMPNetForMultipleChoice(SparseMixin, MPNetForMultipleChoice):
    config: SparseMPNetConfig

@dataclass(kw_only=True)
class SparseMptConfig(SparseConfigMixin, MptConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMptModel(SparseMixin, MptModel):
    config: SparseMptConfig

class SparseMptForCausalLM(SparseGenerationMixin, MptForCausalLM):
    config: SparseMptConfig

class SparseMptForSequenceClassification(SparseMixin, MptForSequenceClassification):
    config: SparseMptConfig

class SparseMptForQuestionAnswering(SparseMixin, MptForQuestionAnswering):
    config: SparseMptConfig

class SparseMptForTokenClassification(SparseMixin, MptForTokenClassification):
    config: SparseMptConfig

@dataclass(kw_only=True)
class SparsePerceiverConfig(SparseConfigMixin, PerceiverConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

@dataclass(kw_only=True)
class SparseReformerConfig(SparseConfigMixin, ReformerConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseReformerForSequenceClassification(SparseMixin, ReformerForSequenceClassification):
    config: SparseReformerConfig

class SparseReformerForQuestionAnswering(SparseMixin, ReformerForQuestionAnswering):
    config: SparseReformerConfig

@dataclass(kw_only=True)
class SparseT5Config(SparseEncoderDecoderConfigMixin, T5Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseT5EncoderModel(SparseMixin, T5EncoderModel):
    config: SparseT5Config

class SparseT5Model(SparseMixin, T5Model):
    config: SparseT5Config

class SparseT5ForConditionalGeneration(SparseGenerationMixin, T5ForConditionalGeneration):
    config: SparseT5Config

class SparseT5ForSequenceClassification(SparseMixin, T5ForSequenceClassification):
    config: SparseT5Config

class SparseT5ForQuestionAnswering(SparseMixin, T5ForQuestionAnswering):
    config: SparseT5Config

class SparseT5ForTokenClassification(SparseMixin, T5ForTokenClassification):
    config: SparseT5Config

@dataclass(kw_only=True)
class SparseAXK2Config(IndexedConfigMixin, AXK2Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseAXK2Model(SparseMixin, AXK2Model):
    config: SparseAXK2Config

class SparseAXK2ForCausalLM(SparseGenerationMixin, AXK2ForCausalLM):
    config: SparseAXK2Config

class SparseAXK2ForSequenceClassification(SparseMixin, AXK2ForSequenceClassification):
    config: SparseAXK2Config

class SparseAXK2ForTokenClassification(SparseMixin, AXK2ForTokenClassification):
    config: SparseAXK2Config

@dataclass(kw_only=True)
class SparseDeepseekV32Config(IndexedConfigMixin, DeepseekV32Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseDeepseekV32Model(SparseMixin, DeepseekV32Model):
    config: SparseDeepseekV32Config

class SparseDeepseekV32ForCausalLM(SparseGenerationMixin, DeepseekV32ForCausalLM):
    config: SparseDeepseekV32Config

@dataclass(kw_only=True)
class SparseDeepseekV4Config(IndexedConfigMixin, DeepseekV4Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseDeepseekV4Model(SparseMixin, DeepseekV4Model):
    config: SparseDeepseekV4Config

class SparseDeepseekV4ForCausalLM(SparseGenerationMixin, DeepseekV4ForCausalLM):
    config: SparseDeepseekV4Config

@dataclass(kw_only=True)
class SparseDots3NoteTextConfig(IndexedConfigMixin, Dots3NoteTextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseDots3NoteTextModel(SparseMixin, Dots3NoteTextModel):
    config: SparseDots3NoteTextConfig

class SparseDots3NoteForCausalLM(SparseGenerationMixin, Dots3NoteForCausalLM):
    config: SparseDots3NoteTextConfig

@dataclass(kw_only=True)
class SparseGlm5NextTextConfig(IndexedConfigMixin, Glm5NextTextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGlm5NextTextModel(SparseMixin, Glm5NextTextModel):
    config: SparseGlm5NextTextConfig

@dataclass(kw_only=True)
class SparseGlmMoeDsaConfig(IndexedConfigMixin, GlmMoeDsaConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseGlmMoeDsaModel(SparseMixin, GlmMoeDsaModel):
    config: SparseGlmMoeDsaConfig

class SparseGlmMoeDsaForCausalLM(SparseGenerationMixin, GlmMoeDsaForCausalLM):
    config: SparseGlmMoeDsaConfig

@dataclass(kw_only=True)
class SparseHYV4Config(IndexedConfigMixin, HYV4Config):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseHYV4Model(SparseMixin, HYV4Model):
    config: SparseHYV4Config

class SparseHYV4ForCausalLM(SparseGenerationMixin, HYV4ForCausalLM):
    config: SparseHYV4Config

@dataclass(kw_only=True)
class SparseHYV4VLTextConfig(IndexedConfigMixin, HYV4VLTextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseHYV4VLTextModel(SparseMixin, HYV4VLTextModel):
    config: SparseHYV4VLTextConfig

@dataclass(kw_only=True)
class SparseMiniMaxM3VLTextConfig(IndexedConfigMixin, MiniMaxM3VLTextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMiniMaxM3VLTextModel(SparseMixin, MiniMaxM3VLTextModel):
    config: SparseMiniMaxM3VLTextConfig

class SparseMiniMaxM3VLForCausalLM(SparseGenerationMixin, MiniMaxM3VLForCausalLM):
    config: SparseMiniMaxM3VLTextConfig

@dataclass(kw_only=True)
class SparseMistralLarge4TextConfig(IndexedConfigMixin, MistralLarge4TextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseMistralLarge4TextModel(SparseMixin, MistralLarge4TextModel):
    config: SparseMistralLarge4TextConfig

@dataclass(kw_only=True)
class SparseQwen4ExpTextConfig(IndexedConfigMixin, Qwen4ExpTextConfig):
    pattern: InitVar[PatternLike | None] = None
    layers: InitVar[LayersLike] = None
    global_token_ids: InitVar[Sequence[int]] = ()

class SparseQwen4ExpTextModel(SparseMixin, Qwen4ExpTextModel):
    config: SparseQwen4ExpTextConfig

class SparseQwen4ExpForCausalLM(SparseGenerationMixin, Qwen4ExpForCausalLM):
    config: SparseQwen4ExpTextConfig
