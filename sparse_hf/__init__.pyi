"""Written by `python -m tests.stubs`, see there."""

from . import attention as attention
from . import conversion as conversion
from . import evaluation as evaluation
from . import models as models
from . import pattern as pattern
from . import plan as plan
from .attention import mass_left_out as mass_left_out
from .attention import sparse_attention as sparse_attention
from .conversion import convert as convert
from .conversion import push_to_hub as push_to_hub
from .evaluation import evaluate as evaluate
from .evaluation import tune as tune
from .models import FAMILIES as FAMILIES
from .models import Family as Family
from .models import Positions as Positions
from .models import SparseAlbertConfig as SparseAlbertConfig
from .models import SparseAlbertForMaskedLM as SparseAlbertForMaskedLM
from .models import SparseAlbertForMultipleChoice as SparseAlbertForMultipleChoice
from .models import SparseAlbertForPreTraining as SparseAlbertForPreTraining
from .models import SparseAlbertForQuestionAnswering as SparseAlbertForQuestionAnswering
from .models import SparseAlbertForSequenceClassification as SparseAlbertForSequenceClassification
from .models import SparseAlbertForTokenClassification as SparseAlbertForTokenClassification
from .models import SparseAlbertModel as SparseAlbertModel
from .models import SparseAXK2Config as SparseAXK2Config
from .models import SparseAXK2ForCausalLM as SparseAXK2ForCausalLM
from .models import SparseAXK2ForSequenceClassification as SparseAXK2ForSequenceClassification
from .models import SparseAXK2ForTokenClassification as SparseAXK2ForTokenClassification
from .models import SparseAXK2Model as SparseAXK2Model
from .models import SparseBartConfig as SparseBartConfig
from .models import SparseBartForCausalLM as SparseBartForCausalLM
from .models import SparseBartForConditionalGeneration as SparseBartForConditionalGeneration
from .models import SparseBartForQuestionAnswering as SparseBartForQuestionAnswering
from .models import SparseBartForSequenceClassification as SparseBartForSequenceClassification
from .models import SparseBartModel as SparseBartModel
from .models import SparseBertConfig as SparseBertConfig
from .models import SparseBertForMaskedLM as SparseBertForMaskedLM
from .models import SparseBertForMultipleChoice as SparseBertForMultipleChoice
from .models import SparseBertForNextSentencePrediction as SparseBertForNextSentencePrediction
from .models import SparseBertForPreTraining as SparseBertForPreTraining
from .models import SparseBertForQuestionAnswering as SparseBertForQuestionAnswering
from .models import SparseBertForSequenceClassification as SparseBertForSequenceClassification
from .models import SparseBertForTokenClassification as SparseBertForTokenClassification
from .models import SparseBertLMHeadModel as SparseBertLMHeadModel
from .models import SparseBertModel as SparseBertModel
from .models import SparseBigBirdConfig as SparseBigBirdConfig
from .models import SparseBigBirdForCausalLM as SparseBigBirdForCausalLM
from .models import SparseBigBirdForMaskedLM as SparseBigBirdForMaskedLM
from .models import SparseBigBirdForMultipleChoice as SparseBigBirdForMultipleChoice
from .models import SparseBigBirdForPreTraining as SparseBigBirdForPreTraining
from .models import SparseBigBirdForQuestionAnswering as SparseBigBirdForQuestionAnswering
from .models import SparseBigBirdForSequenceClassification as SparseBigBirdForSequenceClassification
from .models import SparseBigBirdForTokenClassification as SparseBigBirdForTokenClassification
from .models import SparseBigBirdModel as SparseBigBirdModel
from .models import SparseBigBirdPegasusConfig as SparseBigBirdPegasusConfig
from .models import SparseBigBirdPegasusForCausalLM as SparseBigBirdPegasusForCausalLM
from .models import SparseBigBirdPegasusForConditionalGeneration as SparseBigBirdPegasusForConditionalGeneration
from .models import SparseBigBirdPegasusForQuestionAnswering as SparseBigBirdPegasusForQuestionAnswering
from .models import SparseBigBirdPegasusForSequenceClassification as SparseBigBirdPegasusForSequenceClassification
from .models import SparseBigBirdPegasusModel as SparseBigBirdPegasusModel
from .models import SparseBloomConfig as SparseBloomConfig
from .models import SparseBloomForCausalLM as SparseBloomForCausalLM
from .models import SparseBloomForQuestionAnswering as SparseBloomForQuestionAnswering
from .models import SparseBloomForSequenceClassification as SparseBloomForSequenceClassification
from .models import SparseBloomForTokenClassification as SparseBloomForTokenClassification
from .models import SparseBloomModel as SparseBloomModel
from .models import SparseCamembertConfig as SparseCamembertConfig
from .models import SparseCamembertForCausalLM as SparseCamembertForCausalLM
from .models import SparseCamembertForMaskedLM as SparseCamembertForMaskedLM
from .models import SparseCamembertForMultipleChoice as SparseCamembertForMultipleChoice
from .models import SparseCamembertForQuestionAnswering as SparseCamembertForQuestionAnswering
from .models import SparseCamembertForSequenceClassification as SparseCamembertForSequenceClassification
from .models import SparseCamembertForTokenClassification as SparseCamembertForTokenClassification
from .models import SparseCamembertModel as SparseCamembertModel
from .models import SparseCohere2Config as SparseCohere2Config
from .models import SparseCohere2ForCausalLM as SparseCohere2ForCausalLM
from .models import SparseCohere2Model as SparseCohere2Model
from .models import SparseConfigMixin as SparseConfigMixin
from .models import SparseDebertaConfig as SparseDebertaConfig
from .models import SparseDebertaForMaskedLM as SparseDebertaForMaskedLM
from .models import SparseDebertaForQuestionAnswering as SparseDebertaForQuestionAnswering
from .models import SparseDebertaForSequenceClassification as SparseDebertaForSequenceClassification
from .models import SparseDebertaForTokenClassification as SparseDebertaForTokenClassification
from .models import SparseDebertaModel as SparseDebertaModel
from .models import SparseDebertaV2Config as SparseDebertaV2Config
from .models import SparseDebertaV2ForMaskedLM as SparseDebertaV2ForMaskedLM
from .models import SparseDebertaV2ForMultipleChoice as SparseDebertaV2ForMultipleChoice
from .models import SparseDebertaV2ForQuestionAnswering as SparseDebertaV2ForQuestionAnswering
from .models import SparseDebertaV2ForSequenceClassification as SparseDebertaV2ForSequenceClassification
from .models import SparseDebertaV2ForTokenClassification as SparseDebertaV2ForTokenClassification
from .models import SparseDebertaV2Model as SparseDebertaV2Model
from .models import SparseDeepseekV4Config as SparseDeepseekV4Config
from .models import SparseDeepseekV4ForCausalLM as SparseDeepseekV4ForCausalLM
from .models import SparseDeepseekV4Model as SparseDeepseekV4Model
from .models import SparseDeepseekV32Config as SparseDeepseekV32Config
from .models import SparseDeepseekV32ForCausalLM as SparseDeepseekV32ForCausalLM
from .models import SparseDeepseekV32Model as SparseDeepseekV32Model
from .models import SparseDistilBertConfig as SparseDistilBertConfig
from .models import SparseDistilBertForMaskedLM as SparseDistilBertForMaskedLM
from .models import SparseDistilBertForMultipleChoice as SparseDistilBertForMultipleChoice
from .models import SparseDistilBertForQuestionAnswering as SparseDistilBertForQuestionAnswering
from .models import SparseDistilBertForSequenceClassification as SparseDistilBertForSequenceClassification
from .models import SparseDistilBertForTokenClassification as SparseDistilBertForTokenClassification
from .models import SparseDistilBertModel as SparseDistilBertModel
from .models import SparseDots3NoteForCausalLM as SparseDots3NoteForCausalLM
from .models import SparseDots3NoteTextConfig as SparseDots3NoteTextConfig
from .models import SparseDots3NoteTextModel as SparseDots3NoteTextModel
from .models import SparseElectraConfig as SparseElectraConfig
from .models import SparseElectraForCausalLM as SparseElectraForCausalLM
from .models import SparseElectraForMaskedLM as SparseElectraForMaskedLM
from .models import SparseElectraForMultipleChoice as SparseElectraForMultipleChoice
from .models import SparseElectraForPreTraining as SparseElectraForPreTraining
from .models import SparseElectraForQuestionAnswering as SparseElectraForQuestionAnswering
from .models import SparseElectraForSequenceClassification as SparseElectraForSequenceClassification
from .models import SparseElectraForTokenClassification as SparseElectraForTokenClassification
from .models import SparseElectraModel as SparseElectraModel
from .models import SparseFalconConfig as SparseFalconConfig
from .models import SparseFalconForCausalLM as SparseFalconForCausalLM
from .models import SparseFalconForQuestionAnswering as SparseFalconForQuestionAnswering
from .models import SparseFalconForSequenceClassification as SparseFalconForSequenceClassification
from .models import SparseFalconForTokenClassification as SparseFalconForTokenClassification
from .models import SparseFalconModel as SparseFalconModel
from .models import SparseGemma2Config as SparseGemma2Config
from .models import SparseGemma2ForCausalLM as SparseGemma2ForCausalLM
from .models import SparseGemma2ForSequenceClassification as SparseGemma2ForSequenceClassification
from .models import SparseGemma2ForTokenClassification as SparseGemma2ForTokenClassification
from .models import SparseGemma2Model as SparseGemma2Model
from .models import SparseGemma3ForCausalLM as SparseGemma3ForCausalLM
from .models import SparseGemma3TextConfig as SparseGemma3TextConfig
from .models import SparseGemma3TextForSequenceClassification as SparseGemma3TextForSequenceClassification
from .models import SparseGemma3TextModel as SparseGemma3TextModel
from .models import SparseGlm5NextTextConfig as SparseGlm5NextTextConfig
from .models import SparseGlm5NextTextModel as SparseGlm5NextTextModel
from .models import SparseGlmMoeDsaConfig as SparseGlmMoeDsaConfig
from .models import SparseGlmMoeDsaForCausalLM as SparseGlmMoeDsaForCausalLM
from .models import SparseGlmMoeDsaModel as SparseGlmMoeDsaModel
from .models import SparseGPT2Config as SparseGPT2Config
from .models import SparseGPT2ForQuestionAnswering as SparseGPT2ForQuestionAnswering
from .models import SparseGPT2ForSequenceClassification as SparseGPT2ForSequenceClassification
from .models import SparseGPT2ForTokenClassification as SparseGPT2ForTokenClassification
from .models import SparseGPT2LMHeadModel as SparseGPT2LMHeadModel
from .models import SparseGPT2Model as SparseGPT2Model
from .models import SparseGPTNeoXConfig as SparseGPTNeoXConfig
from .models import SparseGPTNeoXForCausalLM as SparseGPTNeoXForCausalLM
from .models import SparseGPTNeoXForQuestionAnswering as SparseGPTNeoXForQuestionAnswering
from .models import SparseGPTNeoXForSequenceClassification as SparseGPTNeoXForSequenceClassification
from .models import SparseGPTNeoXForTokenClassification as SparseGPTNeoXForTokenClassification
from .models import SparseGPTNeoXModel as SparseGPTNeoXModel
from .models import SparseGraniteConfig as SparseGraniteConfig
from .models import SparseGraniteForCausalLM as SparseGraniteForCausalLM
from .models import SparseGraniteModel as SparseGraniteModel
from .models import SparseHYV4Config as SparseHYV4Config
from .models import SparseHYV4ForCausalLM as SparseHYV4ForCausalLM
from .models import SparseHYV4Model as SparseHYV4Model
from .models import SparseHYV4VLTextConfig as SparseHYV4VLTextConfig
from .models import SparseHYV4VLTextModel as SparseHYV4VLTextModel
from .models import SparseLEDConfig as SparseLEDConfig
from .models import SparseLEDForConditionalGeneration as SparseLEDForConditionalGeneration
from .models import SparseLEDForQuestionAnswering as SparseLEDForQuestionAnswering
from .models import SparseLEDModel as SparseLEDModel
from .models import SparseLlamaConfig as SparseLlamaConfig
from .models import SparseLlamaForCausalLM as SparseLlamaForCausalLM
from .models import SparseLlamaForQuestionAnswering as SparseLlamaForQuestionAnswering
from .models import SparseLlamaForSequenceClassification as SparseLlamaForSequenceClassification
from .models import SparseLlamaForTokenClassification as SparseLlamaForTokenClassification
from .models import SparseLlamaModel as SparseLlamaModel
from .models import SparseLongformerConfig as SparseLongformerConfig
from .models import SparseLongformerForMaskedLM as SparseLongformerForMaskedLM
from .models import SparseLongformerForMultipleChoice as SparseLongformerForMultipleChoice
from .models import SparseLongformerForQuestionAnswering as SparseLongformerForQuestionAnswering
from .models import SparseLongformerForSequenceClassification as SparseLongformerForSequenceClassification
from .models import SparseLongformerForTokenClassification as SparseLongformerForTokenClassification
from .models import SparseLongformerModel as SparseLongformerModel
from .models import SparseMBartConfig as SparseMBartConfig
from .models import SparseMBartForCausalLM as SparseMBartForCausalLM
from .models import SparseMBartForConditionalGeneration as SparseMBartForConditionalGeneration
from .models import SparseMBartForQuestionAnswering as SparseMBartForQuestionAnswering
from .models import SparseMBartForSequenceClassification as SparseMBartForSequenceClassification
from .models import SparseMBartModel as SparseMBartModel
from .models import SparseMiniMaxM3VLForCausalLM as SparseMiniMaxM3VLForCausalLM
from .models import SparseMiniMaxM3VLTextConfig as SparseMiniMaxM3VLTextConfig
from .models import SparseMiniMaxM3VLTextModel as SparseMiniMaxM3VLTextModel
from .models import SparseMistralConfig as SparseMistralConfig
from .models import SparseMistralForCausalLM as SparseMistralForCausalLM
from .models import SparseMistralForQuestionAnswering as SparseMistralForQuestionAnswering
from .models import SparseMistralForSequenceClassification as SparseMistralForSequenceClassification
from .models import SparseMistralForTokenClassification as SparseMistralForTokenClassification
from .models import SparseMistralLarge4TextConfig as SparseMistralLarge4TextConfig
from .models import SparseMistralLarge4TextModel as SparseMistralLarge4TextModel
from .models import SparseMistralModel as SparseMistralModel
from .models import SparseMixin as SparseMixin
from .models import SparseMixtralConfig as SparseMixtralConfig
from .models import SparseMixtralForCausalLM as SparseMixtralForCausalLM
from .models import SparseMixtralForQuestionAnswering as SparseMixtralForQuestionAnswering
from .models import SparseMixtralForSequenceClassification as SparseMixtralForSequenceClassification
from .models import SparseMixtralForTokenClassification as SparseMixtralForTokenClassification
from .models import SparseMixtralModel as SparseMixtralModel
from .models import SparseModernBertConfig as SparseModernBertConfig
from .models import SparseModernBertForMaskedLM as SparseModernBertForMaskedLM
from .models import SparseModernBertForMultipleChoice as SparseModernBertForMultipleChoice
from .models import SparseModernBertForQuestionAnswering as SparseModernBertForQuestionAnswering
from .models import SparseModernBertForSequenceClassification as SparseModernBertForSequenceClassification
from .models import SparseModernBertForTokenClassification as SparseModernBertForTokenClassification
from .models import SparseModernBertModel as SparseModernBertModel
from .models import SparseMPNetConfig as SparseMPNetConfig
from .models import SparseMPNetForMaskedLM as SparseMPNetForMaskedLM
from .models import SparseMPNetForMultipleChoice as SparseMPNetForMultipleChoice
from .models import SparseMPNetForQuestionAnswering as SparseMPNetForQuestionAnswering
from .models import SparseMPNetForSequenceClassification as SparseMPNetForSequenceClassification
from .models import SparseMPNetForTokenClassification as SparseMPNetForTokenClassification
from .models import SparseMPNetModel as SparseMPNetModel
from .models import SparseMptConfig as SparseMptConfig
from .models import SparseMptForCausalLM as SparseMptForCausalLM
from .models import SparseMptForQuestionAnswering as SparseMptForQuestionAnswering
from .models import SparseMptForSequenceClassification as SparseMptForSequenceClassification
from .models import SparseMptForTokenClassification as SparseMptForTokenClassification
from .models import SparseMptModel as SparseMptModel
from .models import SparseOlmo2Config as SparseOlmo2Config
from .models import SparseOlmo2ForCausalLM as SparseOlmo2ForCausalLM
from .models import SparseOlmo2ForSequenceClassification as SparseOlmo2ForSequenceClassification
from .models import SparseOlmo2Model as SparseOlmo2Model
from .models import SparseOPTConfig as SparseOPTConfig
from .models import SparseOPTForCausalLM as SparseOPTForCausalLM
from .models import SparseOPTForQuestionAnswering as SparseOPTForQuestionAnswering
from .models import SparseOPTForSequenceClassification as SparseOPTForSequenceClassification
from .models import SparseOPTModel as SparseOPTModel
from .models import SparsePegasusConfig as SparsePegasusConfig
from .models import SparsePegasusForCausalLM as SparsePegasusForCausalLM
from .models import SparsePegasusForConditionalGeneration as SparsePegasusForConditionalGeneration
from .models import SparsePegasusModel as SparsePegasusModel
from .models import SparsePerceiverConfig as SparsePerceiverConfig
from .models import (
    SparsePerceiverForImageClassificationConvProcessing as SparsePerceiverForImageClassificationConvProcessing,
)
from .models import SparsePerceiverForImageClassificationFourier as SparsePerceiverForImageClassificationFourier
from .models import SparsePerceiverForImageClassificationLearned as SparsePerceiverForImageClassificationLearned
from .models import SparsePerceiverForMaskedLM as SparsePerceiverForMaskedLM
from .models import SparsePerceiverForMultimodalAutoencoding as SparsePerceiverForMultimodalAutoencoding
from .models import SparsePerceiverForOpticalFlow as SparsePerceiverForOpticalFlow
from .models import SparsePerceiverForSequenceClassification as SparsePerceiverForSequenceClassification
from .models import SparsePerceiverModel as SparsePerceiverModel
from .models import SparsePhi3Config as SparsePhi3Config
from .models import SparsePhi3ForCausalLM as SparsePhi3ForCausalLM
from .models import SparsePhi3ForSequenceClassification as SparsePhi3ForSequenceClassification
from .models import SparsePhi3ForTokenClassification as SparsePhi3ForTokenClassification
from .models import SparsePhi3Model as SparsePhi3Model
from .models import SparseQwen2Config as SparseQwen2Config
from .models import SparseQwen2ForCausalLM as SparseQwen2ForCausalLM
from .models import SparseQwen2ForQuestionAnswering as SparseQwen2ForQuestionAnswering
from .models import SparseQwen2ForSequenceClassification as SparseQwen2ForSequenceClassification
from .models import SparseQwen2ForTokenClassification as SparseQwen2ForTokenClassification
from .models import SparseQwen2Model as SparseQwen2Model
from .models import SparseQwen3Config as SparseQwen3Config
from .models import SparseQwen3ForCausalLM as SparseQwen3ForCausalLM
from .models import SparseQwen3ForQuestionAnswering as SparseQwen3ForQuestionAnswering
from .models import SparseQwen3ForSequenceClassification as SparseQwen3ForSequenceClassification
from .models import SparseQwen3ForTokenClassification as SparseQwen3ForTokenClassification
from .models import SparseQwen3Model as SparseQwen3Model
from .models import SparseQwen3MoeConfig as SparseQwen3MoeConfig
from .models import SparseQwen3MoeForCausalLM as SparseQwen3MoeForCausalLM
from .models import SparseQwen3MoeForQuestionAnswering as SparseQwen3MoeForQuestionAnswering
from .models import SparseQwen3MoeForSequenceClassification as SparseQwen3MoeForSequenceClassification
from .models import SparseQwen3MoeForTokenClassification as SparseQwen3MoeForTokenClassification
from .models import SparseQwen3MoeModel as SparseQwen3MoeModel
from .models import SparseQwen4ExpForCausalLM as SparseQwen4ExpForCausalLM
from .models import SparseQwen4ExpTextConfig as SparseQwen4ExpTextConfig
from .models import SparseQwen4ExpTextModel as SparseQwen4ExpTextModel
from .models import SparseReformerConfig as SparseReformerConfig
from .models import SparseReformerForMaskedLM as SparseReformerForMaskedLM
from .models import SparseReformerForQuestionAnswering as SparseReformerForQuestionAnswering
from .models import SparseReformerForSequenceClassification as SparseReformerForSequenceClassification
from .models import SparseReformerModel as SparseReformerModel
from .models import SparseReformerModelWithLMHead as SparseReformerModelWithLMHead
from .models import SparseRobertaConfig as SparseRobertaConfig
from .models import SparseRobertaForCausalLM as SparseRobertaForCausalLM
from .models import SparseRobertaForMaskedLM as SparseRobertaForMaskedLM
from .models import SparseRobertaForMultipleChoice as SparseRobertaForMultipleChoice
from .models import SparseRobertaForQuestionAnswering as SparseRobertaForQuestionAnswering
from .models import SparseRobertaForSequenceClassification as SparseRobertaForSequenceClassification
from .models import SparseRobertaForTokenClassification as SparseRobertaForTokenClassification
from .models import SparseRobertaModel as SparseRobertaModel
from .models import SparseSmolLM3Config as SparseSmolLM3Config
from .models import SparseSmolLM3ForCausalLM as SparseSmolLM3ForCausalLM
from .models import SparseSmolLM3ForQuestionAnswering as SparseSmolLM3ForQuestionAnswering
from .models import SparseSmolLM3ForSequenceClassification as SparseSmolLM3ForSequenceClassification
from .models import SparseSmolLM3ForTokenClassification as SparseSmolLM3ForTokenClassification
from .models import SparseSmolLM3Model as SparseSmolLM3Model
from .models import SparseT5Config as SparseT5Config
from .models import SparseT5EncoderModel as SparseT5EncoderModel
from .models import SparseT5ForConditionalGeneration as SparseT5ForConditionalGeneration
from .models import SparseT5ForQuestionAnswering as SparseT5ForQuestionAnswering
from .models import SparseT5ForSequenceClassification as SparseT5ForSequenceClassification
from .models import SparseT5ForTokenClassification as SparseT5ForTokenClassification
from .models import SparseT5Model as SparseT5Model
from .models import SparseXLMRobertaConfig as SparseXLMRobertaConfig
from .models import SparseXLMRobertaForCausalLM as SparseXLMRobertaForCausalLM
from .models import SparseXLMRobertaForMaskedLM as SparseXLMRobertaForMaskedLM
from .models import SparseXLMRobertaForMultipleChoice as SparseXLMRobertaForMultipleChoice
from .models import SparseXLMRobertaForQuestionAnswering as SparseXLMRobertaForQuestionAnswering
from .models import SparseXLMRobertaForSequenceClassification as SparseXLMRobertaForSequenceClassification
from .models import SparseXLMRobertaForTokenClassification as SparseXLMRobertaForTokenClassification
from .models import SparseXLMRobertaModel as SparseXLMRobertaModel
from .models import StreamingCache as StreamingCache
from .models import dense_class as dense_class
from .models import derived_types as derived_types
from .models import family_of as family_of
from .models import indexer_losses as indexer_losses
from .models import parse_layers as parse_layers
from .models import register_family as register_family
from .models import sparsify as sparsify
from .models import transformers_random_blocks as transformers_random_blocks
from .pattern import EMPTY as EMPTY
from .pattern import FULL as FULL
from .pattern import LSH as LSH
from .pattern import PARTIAL as PARTIAL
from .pattern import BlockTable as BlockTable
from .pattern import Chunk as Chunk
from .pattern import First as First
from .pattern import Fixed as Fixed
from .pattern import Last as Last
from .pattern import LSHChunks as LSHChunks
from .pattern import Marked as Marked
from .pattern import MarkedKeys as MarkedKeys
from .pattern import MarkedQueries as MarkedQueries
from .pattern import Outside as Outside
from .pattern import Pattern as Pattern
from .pattern import PatternError as PatternError
from .pattern import PerHead as PerHead
from .pattern import RandomBlocks as RandomBlocks
from .pattern import Ring as Ring
from .pattern import Stride as Stride
from .pattern import Summary as Summary
from .pattern import Threshold as Threshold
from .pattern import TopK as TopK
from .pattern import TopKBlocks as TopKBlocks
from .pattern import VerticalSlash as VerticalSlash
from .pattern import Window as Window
from .pattern import Window2d as Window2d
from .pattern import causal as causal
from .pattern import full as full
from .pattern import recipes as recipes
from .plan import BlockPlan as BlockPlan
from .plan import build_plan as build_plan
from .version import __version__ as __version__

__all__ = [
    "__version__",
    "BlockPlan",
    "build_plan",
    "convert",
    "evaluate",
    "push_to_hub",
    "tune",
    "mass_left_out",
    "sparse_attention",
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
    "EMPTY",
    "FULL",
    "PARTIAL",
    "BlockTable",
    "Chunk",
    "First",
    "Fixed",
    "LSH",
    "LSHChunks",
    "Last",
    "Marked",
    "MarkedKeys",
    "MarkedQueries",
    "Outside",
    "Pattern",
    "PatternError",
    "PerHead",
    "RandomBlocks",
    "Ring",
    "Stride",
    "Summary",
    "Threshold",
    "TopK",
    "TopKBlocks",
    "VerticalSlash",
    "Window",
    "Window2d",
    "causal",
    "full",
    "recipes",
]
