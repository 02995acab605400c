"""Tests that a dense class passes and its sparse class does not, each with the reason. One that passes is an error."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from packaging import version


@dataclass(frozen=True)
class Failing:
    """A test that fails on the sparse classes of these families (empty: of all), in versions before `before` (or all)."""

    test: str
    reason: str
    families: tuple[str, ...] = ()
    before: str = ""

    def covers(self, family: str, test: str) -> bool:
        current = not self.before or version.parse(transformers.__version__) < version.parse(self.before)
        return test == self.test and current and (not self.families or family in self.families)


WEIGHTS_BY_CONFIG = (
    "BUG: config.output_attentions = True is refused on every sparse configuration, 'sparse_reference' too, for the setter "
    "of PreTrainedConfig compares the name with 'eager'"
)
NO_GRADIENT = (
    "BUG: of PreTrainedConfig, as above; and the weights of 'sparse_reference' are computed beside the output, not on the way "
    "to it, so that no gradient flows through them"
)
UNRECORDED_ENCODER = "BUG: SparseBartEncoder is not in _CAN_RECORD_REGISTRY, so that encoder_hidden_states and encoder_attentions are None"
OTHER_INITIAL_WEIGHTS = (
    "BUG: PreTrainedModel.is_custom_code() takes classes outside of Transformers for code that initializes in place, and "
    "skips _init_weights on modules without parameters of their own, which give those inside them their family's scale"
)
LOST_CACHE = (
    "BUG: a cache under its old name, past_key_values, is overruled by the new one that SparseMixin's forward makes for "
    "families with a sliding window: it looks for one name only"
)
CHOSEN_BY_YEAR = "skipped: it takes models by the year in the file of their configuration, and ours carry none"
WEIGHTS_OF_SDPA = (
    "by design: a model loaded with attn_implementation='sdpa' is asked for attention weights; 'sparse', for which that "
    "stands, makes none and says so, where a dense model turns to 'eager'"
)
OWN_WINDOW = "by design: what sparse_attention says holds; a sliding_window that is changed afterwards does not cut it"
OWN_NAMES = (
    "by design: 'eager' and 'sdpa' stand for 'sparse_reference' and 'sparse' on a sparse configuration, which never says that "
    "it is dense"
)

ENCODERS = ("bert", "modernbert", "roberta")

EXCEPTIONS = (
    Failing("test_attention_outputs", WEIGHTS_BY_CONFIG),
    Failing("test_retain_grad_hidden_states_attentions", NO_GRADIENT),
    Failing("test_hidden_states_output", UNRECORDED_ENCODER, ("bart",)),
    Failing("test_bc_cache_name_forward", LOST_CACHE, ("qwen3",)),
    Failing("test_can_init_all_missing_weights", OTHER_INITIAL_WEIGHTS, ("gpt2", "modernbert")),
    Failing("test_can_init_all_missing_weights", CHOSEN_BY_YEAR, ("modernbert", "qwen3"), before="5.24"),
    Failing("test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions", WEIGHTS_OF_SDPA, ENCODERS),
    Failing("test_sliding_window_mask", OWN_WINDOW, ("qwen3",)),
    Failing("test_can_set_attention_dynamically", OWN_NAMES),
    Failing("test_config_attn_implementation_setter", OWN_NAMES),
    Failing("test_sdpa_can_dispatch_non_composite_models", OWN_NAMES),
)


def expected_failure(family: str, test: str) -> str | None:
    """The reason for which a test fails on a sparse family, or None if it must pass."""
    return next((failing.reason for failing in EXCEPTIONS if failing.covers(family, test)), None)
