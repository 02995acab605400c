"""Test cases of a family: Transformers' mixins around tiny configurations of ours, for the dense and the sparse classes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import tempfile
import unittest
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerFast

import sparse_hf
from tests.models.families import COMMON, EOS, SIDES, TINY, VOCABULARY
from tests.transformers import sdist, standins

PATTERN = "window(2, 2) | first(1)"
# a length that no other size has, and at least as many rows as tests would otherwise fill up
LENGTH, BATCH, CHOICES = 11, 8, 4
# task of a pipeline -> what the name of the class that it takes ends with
TASKS = {
    "feature-extraction": ("Model",),
    "fill-mask": ("ForMaskedLM",),
    "text-classification": ("ForSequenceClassification",),
    "zero-shot": ("ForSequenceClassification",),
    "token-classification": ("ForTokenClassification",),
    "text-generation": ("LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"),
}
# inputs of other kinds than text have heads of their own
PERCEIVER = tuple(
    {
        "num_latents": LENGTH, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "pad_token_id": 0,
        "eos_token_id": EOS, "bos_token_id": 1,
    }.items()
)  # fmt: skip
PERCEIVER_NAMES = {
    "num_hidden_layers": "num_self_attends_per_block",
    "num_attention_heads": "num_self_attention_heads",
    "hidden_size": "d_latents",
}
OF_IMAGES = tuple(
    f"PerceiverFor{task}"
    for task in (
        *(f"ImageClassification{kind}" for kind in ("Learned", "Fourier", "ConvProcessing")),
        "OpticalFlow",
        "MultimodalAutoencoding",
    )
)
TOKENIZER = "PreTrainedTokenizerFast"
# they ask for attention weights, which of our implementations the reference alone gives
WITH_WEIGHTS = (
    "test_capture_outputs_decorator",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
)

# families that are sparse by themselves
BLOCKS = (("attention_type", "block_sparse"), ("block_size", 2), ("num_random_blocks", 1))
LONGFORMER = (*COMMON.items(), ("attention_window", 4), ("sep_token_id", EOS))
LED = (
    *((key, value) for key, value in SIDES.items() if key != "max_position_embeddings"),
    ("max_encoder_position_embeddings", 64), ("max_decoder_position_embeddings", 64), ("attention_window", 4),
)  # fmt: skip
# chunks of one token, of which every length is a multiple: the dense class trains on nothing else, and both hash
REFORMER = (
    *COMMON.items(), ("is_decoder", True), ("attn_layers", ("local", "lsh")), ("attention_head_size", 8),
    ("feed_forward_size", 64), ("axial_pos_embds", False), ("local_attn_chunk_length", 1), ("lsh_attn_chunk_length", 1),
    ("local_num_chunks_before", 3), ("lsh_num_chunks_before", 3), ("num_buckets", 4), ("num_hashes", 2), ("hash_seed", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """What is tested of a family.

    `trained` is the dense class that learns by heart in the training test, which also runs on several ranks; `changes`
    are made to the tiny configuration of the parity tests; `without` are classes that take other inputs than the rest.
    `pattern` None is what the configuration implies, and a family `has_marks` whose inputs are marked: by hand, or by a head that
    looks for the separators of a question.
    """

    dense_type: str
    trained: str
    changes: tuple[tuple[str, object], ...] = ()
    without: tuple[str, ...] = ()
    pattern: str | None = PATTERN
    has_marks: bool = False


SUITES = {
    suite.dense_type: suite
    for suite in (
        # its plain model reads vectors
        Suite("perceiver", "PerceiverForMaskedLM", PERCEIVER, without=("PerceiverModel", *OF_IMAGES)),
        Suite("bert", "BertForMaskedLM"),
        Suite("roberta", "RobertaForMaskedLM"),
        Suite("modernbert", "ModernBertForMaskedLM"),
        Suite("llama", "LlamaForCausalLM"),
        Suite("qwen3", "Qwen3ForCausalLM"),
        Suite("gpt2", "GPT2LMHeadModel"),
        # its decoder alone reads one text, not two
        Suite("bart", "BartForConditionalGeneration", without=("BartForCausalLM",)),
        Suite("longformer", "LongformerForMaskedLM", LONGFORMER, pattern=None, has_marks=True),
        Suite("led", "LEDForConditionalGeneration", LED, pattern=None, has_marks=True),
        Suite("big_bird", "BigBirdForMaskedLM", BLOCKS, pattern=None),
        Suite(
            "bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", BLOCKS, ("BigBirdPegasusForCausalLM",), None
        ),
        # one class wants a decoder, the other none
        Suite("reformer", "ReformerModelWithLMHead", REFORMER, without=("ReformerForMaskedLM",), pattern=None),
    )
}


class Tester:
    """Tiny configurations and inputs, under the names by which Transformers' mixins ask for them."""

    batch_size, seq_length = BATCH, LENGTH
    encoder_seq_length = decoder_seq_length = key_length = LENGTH
    num_choices = CHOICES
    is_training = True

    def __init__(self, suite: Suite, sparse: bool, with_weights: bool = False):
        self.suite, self.sparse, self.with_weights = suite, sparse, with_weights
        config = self.get_config()
        self.vocab_size = config.vocab_size
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            setattr(self, name, getattr(config, PERCEIVER_NAMES[name] if suite.dense_type == "perceiver" else name))
        self.causal_lm_class = next(c for c in self.classes if c.__name__.removeprefix("Sparse") == suite.trained)

    @property
    def classes(self) -> tuple[type, ...]:
        family = sparse_hf.FAMILIES[self.suite.dense_type]
        kept = [c for c in family.classes if sparse_hf.dense_class(c).__name__ not in self.suite.without]
        # the plain model first: some tests look at the first class only
        kept.sort(key=lambda c: not c.__name__.endswith("Model") or "LMHead" in c.__name__)
        return tuple(c if self.sparse else sparse_hf.dense_class(c) for c in kept)

    def get_config(self):
        family = sparse_hf.FAMILIES[self.suite.dense_type]
        dense = family.dense_config_class(**self.tiny)
        if not self.sparse:
            return dense
        config = family.config_class.from_dense(dense, self.suite.pattern)
        if self.with_weights:
            config._attn_implementation = "sparse_reference"
        return config

    @property
    def tiny(self) -> dict:
        return {**TINY.get(self.suite.dense_type, {}), **dict(self.suite.changes)}

    @property
    def config_class(self) -> type:
        return type(self.get_config())

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = torch.randint(EOS + 1, VOCABULARY, (BATCH, LENGTH))
        if config.is_encoder_decoder:
            # heads that classify read the state of the last token of the text
            ids[:, -1] = EOS
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.suite.has_marks:
            ids[:, [2, 4, 6]] = EOS
            inputs["global_attention_mask"] = (torch.arange(LENGTH) < 2).long().expand(BATCH, -1).contiguous()
        if config.is_encoder_decoder:
            decoder_ids = torch.randint(EOS + 1, VOCABULARY, (BATCH, LENGTH))
            inputs |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": torch.ones_like(decoder_ids)}
        return config, inputs


class Ours:
    """What the mixins expect of a test class besides its tester; comes before them."""

    suite: Suite
    sparse: bool
    # our modules carry no year, by which the test would choose
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = Tester(self.suite, self.sparse, self._testMethodName in WITH_WEIGHTS)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return self.model_tester.classes

    @property
    def is_encoder_decoder(self) -> bool:
        return self.model_tester.get_config().is_encoder_decoder

    @property
    def pipeline_model_mapping(self) -> dict[str, tuple[type, ...]]:
        return {task: chosen for task in TASKS if (chosen := pipeline_classes(self.model_tester, task))}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            inputs["labels"] = torch.zeros((BATCH, LENGTH), dtype=torch.long)
            inputs["next_sentence_label"] = torch.zeros(BATCH, dtype=torch.long)
        return inputs

    def is_pipeline_test_to_skip(self, *args, **kwargs) -> bool:
        return False

    def is_pipeline_test_to_skip_more(self, *args, **kwargs) -> bool:
        return False

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        save_tiny(self.model_tester, model_architecture, pipeline_folder() / model_architecture.config_class.model_type)
        super().run_pipeline_test(task, repo_name, model_architecture, **kwargs)

    def _run_fsdp2_distributed_test(self, *args, **kwargs):
        if self.model_tester.config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            # they would fail on the first rank, and leave the others waiting
            self.skipTest("the tests of FSDP train causal language models, of which the family has none")
        super()._run_fsdp2_distributed_test(*args, **kwargs)

    def _get_tiny_config(self):
        config_class, values = super()._get_tiny_config()
        # ranks draw other random numbers than one device does
        dropouts = {field.name for field in dataclasses.fields(config_class) if "drop" in field.name}
        current = config_class()
        zero = {name: 0.0 for name in dropouts if isinstance(getattr(current, name), float)}
        return config_class, {**values, **zero}

    def test_config(self):
        common = _module("test_configuration_common")
        # as many fields as the two kinds share, with values other than the default
        tester = common.ConfigTester(self, config_class=self.model_tester.config_class, **self.model_tester.tiny)
        tester.run_common_tests()


@cache
def _pipelines() -> tempfile.TemporaryDirectory:
    # removed when this process ends
    return tempfile.TemporaryDirectory(prefix="sparse_hf_pipelines_")


def pipeline_folder() -> Path:
    """Where the mixin of pipelines finds tiny models instead of on the hub; each is saved there when it is used."""
    return Path(_pipelines().name)


def pipeline_classes(tester: Tester, task: str) -> tuple[type, ...]:
    dense = {c: c.__name__.removeprefix("Sparse") for c in tester.classes}
    return tuple(
        c
        for c, name in dense.items()
        if name.endswith(TASKS[task]) and (task != "feature-extraction" or not name.endswith(("LMHeadModel",)))
    )


def save_tiny(tester: Tester, model_class: type, folder: Path) -> None:
    """A model and a tokenizer of whole words for the vocabulary of the tiny configurations."""
    target = folder / model_class.__name__
    if target.is_dir():
        return
    torch.manual_seed(0)
    model_class(tester.get_config()).save_pretrained(target)
    special = ["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if tester.get_config().is_encoder_decoder:
        # heads that classify read the state of the last token of the text
        tokenizer.post_processor = processors.TemplateProcessing(
            "$A [EOS]", "$A $B:1 [EOS]:1", special_tokens=[("[EOS]", EOS)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(target)


def test_case(suite: Suite, sparse: bool) -> type[unittest.TestCase]:
    """Every mixin that the sdist carries, on the dense or the sparse classes of a family."""
    common = _module("test_modeling_common")
    # empty, but the common tests look for it
    generates = (common.GenerationTesterMixin,) if any(c.can_generate() for c in Tester(suite, sparse).classes) else ()
    mixins = (
        common.ModelTesterMixin,
        *generates,
        _module("test_training_mixin").TrainingTesterMixin,
        _module("test_pipeline_mixin").PipelineTesterMixin,
        _module("test_tensor_parallel_mixin").TensorParallelTesterMixin,
        _module("test_fsdp_mixin").FSDPTesterMixin,
    )
    name = f"{'Sparse' if sparse else ''}{suite.dense_type.title()}ModelTest"
    return type(name, (Ours, *mixins, unittest.TestCase), {"suite": suite, "sparse": sparse})


@cache
def _module(name: str):
    """A module of Transformers' tests, fitted to this place: no hub, two cores, classes of other names."""
    sdist.install()
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(pipeline_folder())
    _write_summary(pipeline_folder())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"{sdist.PACKAGE}.{name}")
    for models_allowed in ("FSDP_DISTRIBUTED_TEST_MODEL_TYPES", "TP_DISTRIBUTED_TEST_MODEL_TYPES"):
        if hasattr(module, models_allowed):
            # None stands for all
            setattr(module, models_allowed, None)
    if hasattr(module, "mp"):
        module.mp = SimpleNamespace(spawn=standins.fork)
    if hasattr(module, "get_values"):
        module.get_values = partial(_with_sparse_names, module.get_values)
    if hasattr(module, "pipeline_test_mapping"):
        _use_our_pipelines(module)
    return module


def _with_sparse_names(get_values, mapping) -> list:
    """Class names of an Auto class; a sparse class stands wherever its dense one does."""
    names = list(get_values(mapping))
    return [*names, *(f"Sparse{name}" for name in names)]


def _use_our_pipelines(module) -> None:
    for entry in module.pipeline_test_mapping.values():
        # newer versions name the place of a class, older ones import it (and get the stand-in)
        if isinstance(entry["test"], str):
            entry["test"] = f"{standins.__name__}.{entry['test'].rpartition('.')[2]}"


def _write_summary(folder: Path) -> None:
    """The table of tiny models that the mixin of pipelines reads when it is imported."""
    named = [c for suite in SUITES.values() for c in sparse_hf.FAMILIES[suite.dense_type].classes]
    names = [name for c in named for name in (c.__name__, sparse_hf.dense_class(c).__name__)]
    entry = {"tokenizer_classes": [TOKENIZER], "processor_classes": [], "sha": None}
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(dict.fromkeys(names, entry)))
