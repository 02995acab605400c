"""One model type, tried on a tiny random model: is it what its dense class is, and in what else does it work?"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import sparse_hf
from sparse_hf.conversion import convert
from sparse_hf.conversion.export import export
from sparse_hf.models.dense_families import DENSE_FAMILIES, INDEXED_FAMILIES, OTHER_FAMILIES
from sparse_hf.models.derived.check import FULL, NARROW, check, check_composed, tensors_of
from sparse_hf.models.derived.entry import dense_config_class, find_entry
from sparse_hf.models.derived.positions import find_positions
from sparse_hf.models.derived.samples import fresh
from sparse_hf.models.derived.tiny_model import FAILURES, apart, tiny_with_inputs
from sparse_hf.models.hf.register import Family, dense_class, family_of, find_composed
from tests.zoo.fresh_process import loaded_answers

VERIFIED = {entry.dense_type for entry in (*DENSE_FAMILIES, *OTHER_FAMILIES, *INDEXED_FAMILIES)}
# fields without which a configuration describes no model, or none with an attention layer
NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "informer": {"prediction_length": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "step3p5": {"sliding_window": 128},
    "xmod": {"default_language": "en_XX"},
    "time_series_transformer": {"prediction_length": 8},
}
# rotary angles of several axes, of which a configuration must say how long they are
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
NEEDED |= {
    name: {"rope_parameters": AXES} for name in ("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glm_image_text")
}
NEEDED |= {name: {"text_config": {"rope_parameters": AXES}} for name in ("glm4v", "glm4v_moe", "glm_ocr", "glm_image")}
for _name in ("glm4v_moe_text", "glm_ocr_text"):
    NEEDED[_name] |= {"head_dim": 128}
HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
# where a model of several has its positions
OF_ITS_TEXT = "of its text"
TOLERANCE, GENERATED, PADDING = 5e-4, 6, 3


def trial(model_type: str) -> dict[str, Any]:
    """What became of a model type: its status, the class, and either the reason of a refusal or what works."""
    if model_type in VERIFIED:
        return {"status": "verified"}
    composed = find_composed(model_type)
    if composed is not None:
        return _composed(composed)
    try:
        entry = find_entry(model_type)
        family = family_of(model_type)
        config = dense_config_class(model_type)(**NEEDED.get(model_type, {}))
    except FAILURES as error:
        return {"status": "refused", "reason": _reason(error)}
    assert entry is not None
    refusal = "it has no model class of its own"
    for dense in _classes(family):
        try:
            seen = check(dense, config)
        except ValueError as error:
            # another class is tried where this one has no input that is known, and not where something was seen
            refusal = _reason(error)
            if "no tiny copy" not in refusal:
                break
            continue
        works = _works(dense, config)
        mixing = sorted({name.split(".")[-1] for name in seen.mixing})
        return {
            "status": "derived",
            "class": dense.__name__,
            "positions": find_positions(dense, config).scheme,
            "mask": seen.took_mask,
            **({"other layers": mixing} if mixing else {}),
            **works,
        }
    return {"status": "refused", "reason": refusal}


def _composed(family: Family) -> dict[str, Any]:
    """A model of several, of which the text is made sparse: what works with text alone."""
    config_class = family.dense_config_class
    refusal = "it has no class that is known"
    for dense_kind in [dense_class(c) for c in family.classes if issubclass(c, GenerationMixin)]:
        try:
            config = config_class(**NEEDED.get(family.dense_type, {}))
            check_composed(dense_kind, config)
            with apart():
                # which has its text checked by itself
                sparse_hf.sparsify(tiny_with_inputs(dense_kind, config)[0], NARROW)
        except FAILURES as error:
            refusal = _reason(error)
            continue
        tests = {name: TESTS[name] for name in ("gradients", "padding", "cache", "saved", "checkpointing")}
        works = _works(dense_kind, config, tests)
        return {"status": "derived", "class": dense_kind.__name__, "positions": OF_ITS_TEXT, "mask": None, **works}
    return {"status": "refused", "reason": refusal}


def be_quiet() -> None:
    """Have a process say nothing of tiny configurations, and use one thread."""
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_num_threads(1)


def answer(model_type: str) -> dict[str, Any]:
    """What a trial found; a class that fails in a way that nobody foresaw is refused for it."""
    try:
        # what a class warns of is no matter of ours
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial(model_type)
    except Exception as error:  # noqa: BLE001 - whatever a class of others does, it shall be in the table
        return {"status": "refused", "reason": f"{type(error).__name__}: {_line(error)[:200]}"}


def _classes(family: Family) -> list[type[PreTrainedModel]]:
    """The class that is tried, and those that are where it has no input that is known: a language model first."""
    known = [dense_class(c) for c in family.classes]
    heads = [c for ending in HEADS for c in known if c.__name__.endswith(ending)]
    return list(dict.fromkeys([*heads[:1], *known]))[:4]


def _works(
    dense_class: type[PreTrainedModel], config: Any, tests: dict[str, Callable[..., bool | None]] | None = None
) -> dict[str, Any]:
    """What works beyond the answers: None where a class does not have it."""
    found: dict[str, Any] = dict.fromkeys(TESTS)
    for name, test in (TESTS if tests is None else tests).items():
        with apart(), torch.enable_grad():
            try:
                dense, inputs, _ = tiny_with_inputs(dense_class, config)
                dense.config._attn_implementation = "sdpa" if dense._supports_sdpa else "eager"
                found[name] = test(dense, inputs)
            except FAILURES as error:
                found[name] = _reason(error)
    return found


def _gradients(dense: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Under a pattern of all pairs, are gradients those of the dense class?"""
    found = _gradients_of(sparse_hf.sparsify(dense, FULL), inputs)
    if _alike(found, _gradients_of(dense, inputs)):
        return True
    # a class of images says that it is causal, and is so under sdpa alone
    dense.config._attn_implementation = "eager"
    return _alike(found, _gradients_of(dense, inputs))


def _gradients_of(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    answers = [t for t in tensors_of(model(**fresh(inputs))) if t.requires_grad]
    loss = torch.stack([(t * torch.randn_like(t)).sum() for t in answers]).sum()
    weights = [p for p in model.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]


def _padding(dense: PreTrainedModel, inputs: dict[str, Any]) -> bool | None:
    """Are answers of real tokens those of the dense class, padded on either side? Of two stacks, those of the second."""
    ids = inputs.get("input_ids")
    if ids is None or "attention_mask" in inputs:
        return None
    sparse, places = sparse_hf.sparsify(dense, FULL), torch.arange(ids.shape[1])
    for real in (places >= PADDING, places < ids.shape[1] - PADDING):
        padded = {**inputs, "attention_mask": real.long().expand(len(ids), -1)}
        try:
            wanted = tensors_of(dense(**fresh(padded)))[0]
        except FAILURES:
            # it takes no padding, or not with text alone
            return None
        found = tensors_of(sparse(**fresh(padded)))[0]
        if "decoder_input_ids" not in inputs:
            found, wanted = (_of_real(answer, real) for answer in (found, wanted))
        if not _alike([found], [wanted]):
            return False
    return True


def _of_real(answer: Tensor, real: Tensor) -> Tensor:
    """What a model says of real tokens: some classes add a token behind them, others leave the first one out."""
    if answer.ndim < 2 or abs(answer.shape[1] - len(real)) > 1:
        return answer
    more = answer.shape[1] - len(real)
    return answer[:, torch.nn.functional.pad(real, (0, more), value=True) if more >= 0 else real[-more:]]


def _cached(dense: PreTrainedModel, inputs: dict[str, Any]) -> bool | None:
    """Are greedy tokens with a cache those without?"""
    if not isinstance(dense, GenerationMixin) or "input_ids" not in inputs or not dense.can_generate():
        return None
    if getattr(dense.config, "is_decoder", True) is False and not dense.config.is_encoder_decoder:
        # a class that reads in both directions, unless its configuration says that it writes
        config = copy.deepcopy(dense.config)
        config.is_decoder = True
        dense = _with_weights_of(dense, config)
    more: dict[str, Any] = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}
    given = {k: v for k, v in inputs.items() if k == "input_ids"}
    if dense.config.is_encoder_decoder and dense.generation_config.decoder_start_token_id is None:
        more["decoder_start_token_id"] = 0
    # some classes have a cache that is for other inputs, or for a configuration as a decoder
    try:
        of_dense = [dense.generate(**given, **more, use_cache=cache) for cache in (True, False)]
    except FAILURES:
        # it generates from more than a text, which is not known here
        return None
    sparse = sparse_hf.sparsify(dense, NARROW)
    of_sparse = [sparse.generate(**given, **more, use_cache=cache) for cache in (True, False)]
    return bool(torch.equal(*of_sparse)) if torch.equal(*of_dense) else None


def _with_weights_of(dense: PreTrainedModel, config: Any) -> PreTrainedModel:
    made = type(dense)(config).eval()
    made.load_state_dict(dense.state_dict())
    return made


def _saved(dense: PreTrainedModel, inputs: dict[str, Any]) -> bool | None:
    """Does a fresh process load a saved folder as the sparse class, with the same answers?"""
    sparse = sparse_hf.sparsify(dense, NARROW)
    wanted = tensors_of(sparse(**fresh(inputs)))
    with tempfile.TemporaryDirectory() as folder:
        sparse.save_pretrained(folder)
        if _alike(loaded_answers(Path(folder), inputs), wanted):
            return True
        dense.save_pretrained(folder)
        return False if _has_weights_of(_loaded(dense, Path(folder)), dense) else None


def _exported(dense: PreTrainedModel, inputs: dict[str, Any]) -> bool | None:
    """Does a converted folder go back to one of the dense class, with the answers of the first one?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense.save_pretrained(folder / "dense")
        convert(folder / "dense", folder / "sparse", NARROW, progress=False)
        export(folder / "sparse", folder / "back", "dense", progress=False)
        first, back = _loaded(dense, folder / "dense"), _loaded(dense, folder / "back")
        if _alike(*(tensors_of(model(**fresh(inputs))) for model in (back, first))):
            return True
        return False if _has_weights_of(first, dense) else None


def _loaded(dense: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return type(dense).from_pretrained(folder, attn_implementation=dense.config._attn_implementation).eval()


def _has_weights_of(loaded: PreTrainedModel, saved: PreTrainedModel) -> bool:
    """Has a dense model the weights that were saved? Some classes of older versions draw some of them anew."""
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


def _checkpointed(dense: PreTrainedModel, inputs: dict[str, Any]) -> bool | None:
    """Are gradients the same where activations are computed again?"""
    if not dense.supports_gradient_checkpointing:
        return None
    sparse = sparse_hf.sparsify(dense, NARROW)
    for module in sparse.modules():
        # nothing is drawn, though Transformers keeps activations in training alone
        for name in vars(module):
            if "drop" in name and isinstance(vars(module)[name], float) or name == "p":
                vars(module)[name] = 0.0
    # sounds are masked at random too
    vars(sparse.config)["apply_spec_augment"] = False
    sparse.train()
    wanted = _gradients_of(sparse, inputs)
    sparse.gradient_checkpointing_enable()
    return _alike(_gradients_of(sparse, inputs), wanted)


TESTS: dict[str, Callable[[PreTrainedModel, dict[str, Any]], bool | None]] = {
    "gradients": _gradients,
    "padding": _padding,
    "cache": _cached,
    "saved": _saved,
    "exported": _exported,
    "checkpointing": _checkpointed,
}


def _alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return False
    scale = max([1.0, *(float(t.detach()[t.isfinite()].abs().max()) for t in wanted if t[t.isfinite()].numel())])
    return all(
        torch.allclose(a, b, atol=TOLERANCE * scale, rtol=0, equal_nan=True) for a, b in zip(found, wanted, strict=True)
    )


def _reason(error: BaseException) -> str:
    """The message of a refusal in one line, without the list of what is supported and without the places of files."""
    text = _line(error).split("; supported are")[0].split("has no sparse counterpart: ")[-1]
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:240]


def _line(error: BaseException) -> str:
    """A message in one line, without the places of files."""
    return re.sub(r"<module '([\w.]+)' from '[^']*'>", r"\1", " ".join(str(error).split()))
