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
REVERSIBLE = (
    "by design: reversible layers keep no activations, so that gradient checkpointing is accepted and computes nothing twice; "
    "the dense class does not take it at all"
)

ENCODERS = ("bert", "modernbert", "roberta")

EXCEPTIONS = (
    Failing("test_training_gradient_checkpointing", REVERSIBLE, ("reformer",)),
    Failing("test_training_gradient_checkpointing_use_reentrant_false", REVERSIBLE, ("reformer",)),
    Failing("test_training_gradient_checkpointing_use_reentrant_true", REVERSIBLE, ("reformer",)),
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
