"""What every sparse model class adds to its dense parent."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .cache import (
    LAYERS_SEE,
    begin_streaming,
    check_cache_name,
    check_is_used,
    check_static,
    decoding_patterns,
    emptied_cache,
    given_cache,
    keep_all,
    lost_cache,
    named_streaming,
    new_tokens,
    over_slots,
    prepare_cache,
    read_in_pieces,
)
from .compiled import draft_on, lean_config
from .config import SparseConfigMixin, check_weights, own_implementation
from .counterparts import adopt
from .documents import check_bounds
from .indexer import fit_indexers
from .inner_padding import CHECKED, counts_positions, has_padding_in_the_way
from .input_checks import Limits, check_no_positions, refuse_tracing
from .layers import layer_numbers
from .loss import at_least_one, rescaled
from .marks import (
    check_spelling,
    forward_marks,
    generation_marks,
    prompt_length,
    remember_marks,
    step_marks,
    whole_marks,
)
from .mask_request import FLEETING, padding_in, said_in_pass, said_of
from .pages import bounds_of_pages, make_manager
from .saving import SavedByOthers
from .short_angles import hold_angles
from .stop_check import pop_last_positions, sample_late, why_not_asked_again, why_not_late
from .streaming_cache import StreamingCache
from .tensor_parallel import check_division
from .turning import begin_turning
from .whole_pass import check_fits, whole_pass

logger = logging.get_logger(__name__)

# mixins stand before a dense class, whose methods a type checker finds here
if TYPE_CHECKING:
    _Model, _GeneratingModel = PreTrainedModel, GenerationMixin
else:
    _Model = _GeneratingModel = object

# arguments of ours that layers read
READ_BY_LAYERS = (
    "global_attention_mask", "document_positions", "streaming_cache", "turned_sinks", LAYERS_SEE, CHECKED,
)  # fmt: skip
# what `generate` calls before each pass
PREPARES = "prepare_inputs_for_generation"
GLOBAL_MASK_DOC = """

    global_attention_mask (`torch.Tensor` of shape `(batch_size, key_length)`, *optional*):
        1 on the tokens that the pattern's `marked()` speaks of: they attend to all tokens and all attend to them."""


class SparseMixin(SavedByOthers, _Model):
    """Attention by the configuration's pattern, marks from `global_attention_mask` or `global_token_ids`.

    Comes before the dense class among the bases: `class SparseBertModel(SparseMixin, BertModel)`.

    Examples:
        >>> from sparse_hf import SparseBertConfig, SparseBertModel
        >>> config = SparseBertConfig(num_hidden_layers=1, sparse_attention={"patterns": {"all": "window(8, 8)"}, "layers": ["all"]})
        >>> SparseBertModel(config)(torch.tensor([[5, 6, 7]])).last_hidden_state.shape
        torch.Size([1, 3, 768])
    """

    config: SparseConfigMixin
    # does `forward` find tokens named by id itself, though marks are the encoder's?
    finds_marks = False
    # the mean over this process's labels is turned into the mean over the whole step, see `rescaled`
    accepts_loss_kwargs = True
    # heads whose parent already divides by `num_items_in_batch`
    _parent_scales_loss = False
    _supports_context_parallel = False
    # does the dense class keep from its layers the arguments that it does not know?
    keeps_arguments = False
    # which model a graph is of, see `lean_config`
    graph_version = ""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            parent = cls.__dict__.get("forward", super(cls, cls).forward)
            cls.forward = _with_marks(parent)
            # such heads hand `num_items_in_batch` to the loss of the library, which divides by it
            code = inspect.unwrap(parent).__code__
            cls._parent_scales_loss = issubclass(cls, GenerationMixin) and "loss_function" in code.co_names

    def post_init(self):
        # before weights are initialized
        fit_indexers(self, self.config)
        super().post_init()
        hold_angles(self, self.config)
        adopt(self)
        if self.config.sparse_attention is None and not self.config.implies_pattern:
            logger.warning_once(
                f"this {type(self.config).model_type} model has no pattern, and each of its layers sees what the dense model's sees; give "
                f"one to the configuration, {type(self.config).__name__}(pattern='window(255, 255) | first(1)'), or to sparse_hf.sparsify"
            )

    def save_pretrained(self, *args, **kwargs):
        """As Transformers'; `sparse_attention` names a pattern for each layer that there is by then."""
        with self.config.saved_as(layer_numbers(self, self.config.stacks)):
            super().save_pretrained(*args, **kwargs)

    def default_marks(self, input_ids: Tensor) -> Tensor | None:
        """What a head marks by itself where no `global_attention_mask` is given."""
        return None

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        # stacks of T5 hold configurations of their own, which older versions leave as they are
        for module in self.modules():
            if isinstance(module, SparseMixin):
                module.config._attn_implementation = self.config._attn_implementation

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        return super().get_correct_attn_implementation(own_implementation(requested_attention), is_init_check)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        return super()._check_and_adjust_attn_implementation(own_implementation(attn_implementation), *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers searches the source of the class's module for it, which is not where the dense code is
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        dense = next(c for c in cls.__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, SparseMixin))
        return dense._can_set_experts_implementation()

    @classmethod
    def maybe_distribute_model(cls, model, *args, **kwargs):
        model = super().maybe_distribute_model(model, *args, **kwargs)
        check_division(model)
        return model

    @classmethod
    def is_custom_code(cls) -> bool:
        # weights are initialized and renamed as in the dense family, whose code this is
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: the configuration names every class in `auto_map`, and no source file is copied."""

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """The mask of tokens as it is: `generate` would make one of pairs ahead for static caches, and take it for a tensor.

        Of tokens behind a prompt it covers all slots of the cache, so that a graph of a step serves all steps.
        """
        return over_slots(attention_mask, kwargs)


class SparseEncoderMixin(SparseMixin):
    """For the encoder inside an encoder-decoder, which `generate` calls by itself, or inside heads that mark."""

    finds_marks = True


class SparseGenerationMixin(SparseMixin, _GeneratingModel):
    """For heads that generate.

    Transformers' protocol of what generates asks for attributes that no class of its own declares, which a type checker minds.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # classes of users that derive from a head of ours call ours
        if issubclass(cls, PreTrainedModel) and SparseGenerationMixin in cls.__bases__:
            parent = cls.__dict__.get(PREPARES) or getattr(super(cls, cls), PREPARES)
            setattr(cls, PREPARES, _with_own_inputs(parent))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_length, *args):
        parent = super()._prepare_cache_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        check_is_used(given_cache(model_kwargs), generation_config)
        check_static(self.config, generation_config.cache_implementation)
        streaming = named_streaming(self, generation_config, model_kwargs)
        if streaming is not None and generation_config.is_assistant:
            streaming.activate_past_recording()
        parent(generation_config, model_kwargs, mode, batch_size, max_length, *args)
        max_length = max(max_length, getattr(generation_config, "max_cache_len", None) or 0)
        prepare_cache(given_cache(model_kwargs), max_length, model_kwargs.get("attention_mask"))
        _look_at_padding(self.config, generation_config, model_kwargs)
        prompt = prompt_length(generation_config, model_kwargs)
        marks = whole_marks(self.config, model_kwargs, prompt, assists=bool(generation_config.is_assistant))
        if marks is not None:
            model_kwargs["global_attention_mask"] = marks

    def get_compiled_call(self, compile_config):
        """As Transformers'; what graphs ask of the model is asked here, once a call of `generate`."""
        config = compile_config or self._default_compile_config()
        return super().get_compiled_call(lean_config(self, config))  # pyright: ignore[reportAttributeAccessIssue]

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """As Transformers'; whether a token was the last is asked while the next pass is under way, where that can be."""
        sample = super()._sample  # pyright: ignore[reportAttributeAccessIssue]
        why_not = why_not_asked_again((*logits_processor, *stopping_criteria)) or why_not_late(
            self, input_ids, generation_config, stopping_criteria.max_length, kwargs
        )
        given = input_ids, logits_processor, stopping_criteria, generation_config, *args
        if why_not is None:
            return sample_late(sample.__func__, self, *given, **kwargs)
        logger.debug("each token is waited for: %s", why_not)
        return sample(*given, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        last = pop_last_positions(given_cache(model_kwargs), model_kwargs)
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # pyright: ignore
        return model_kwargs if last is None else {**model_kwargs, "position_ids": last + 1}

    def _validate_model_kwargs(self, model_kwargs):
        decode = model_kwargs.pop("decode", None)
        if decode is not None:
            self.config.check_decode(decode)
        super()._validate_model_kwargs(model_kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        outputs = draft_on(self, input_ids, generation_config, model_kwargs)
        if outputs is not None:
            return outputs
        # a prompt that comes in pieces is not compiled: each length of a piece would be a graph
        size, disabled = generation_config.prefill_chunk_size, generation_config.disable_compile
        left = None if size is None else read_in_pieces(self, input_ids, size, model_kwargs)
        if left is not None:
            input_ids, generation_config.prefill_chunk_size = left, None
        generation_config.disable_compile = True
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore
        finally:
            generation_config.disable_compile, generation_config.prefill_chunk_size = disabled, size

    @torch.no_grad()
    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """As Transformers', for `generate_batch` and `transformers serve --continuous-batching`; each request is computed as alone.

        Raises:
            NotImplementedError: a model whose requests would be computed otherwise; the message says why.
        """
        known = getattr(self, "_cached_continuous_batching_manager", None)
        return known or make_manager(self, generation_config, continuous_batching_config, workload_hints)


def _look_at_padding(config: SparseConfigMixin, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Look at a prompt's mask once, for compiled steps behind it, where each look would wait for the device.

    Args:
        generation_config: `disable_compile` is set, with a warning, where compiled steps could not count positions.
        kwargs: of the model in `generate`, with the cache, which remembers for this call what was seen.
    """
    cache, mask = (
        given_cache(kwargs),
        kwargs.get("decoder_attention_mask" if config.is_encoder_decoder else "attention_mask"),
    )
    if cache is None or not cache.is_compileable or mask is None or mask.ndim != 2:
        return
    if isinstance(cache, StreamingCache):
        # it looks itself, and keeps what it saw
        return
    is_outer = not has_padding_in_the_way(mask)
    setattr(cache, CHECKED, is_outer)
    stack = "decoder" if config.is_encoder_decoder else ""
    if (
        not is_outer
        and not generation_config.disable_compile
        and any(map(counts_positions, config.layer_patterns(stack)))
    ):
        generation_config.disable_compile = True
        logger.warning_once(
            "attention_mask has padding behind or between a prompt's real tokens, which compiled code cannot count around: this call "
            "runs without compilation; pad on the left for speed"
        )


def _with_own_inputs(parent: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`prepare_inputs_for_generation` with marks and the user's cache; `generate` reads the parent's signature off it."""
    names = list(inspect.signature(parent).parameters)[2:]

    @functools.wraps(parent)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = parent(self, input_ids, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        lost, cache = lost_cache(self, given, inputs), given_cache(given)
        if lost is not None and isinstance(cache, StreamingCache) and cache.holds_angles:
            # no angle changes, and nothing is computed again
            plain: Any = GenerationMixin
            inputs, lost = plain.prepare_inputs_for_generation(self, input_ids, *args, **kwargs), None
        if lost is not None and given.get("next_sequence_length") is not None:
            # older versions forget that all tokens are needed then
            inputs = parent(self, input_ids, *args, **{**kwargs, "next_sequence_length": None})
        if getattr(given_cache(given), CHECKED, False):
            inputs[CHECKED] = True
        if isinstance(given_cache(given), StreamingCache):
            inputs["global_attention_mask"] = step_marks(self.config, input_ids, given, inputs)
        else:
            marks = generation_marks(self.config, input_ids, given.get("global_attention_mask"), given)
            if marks is not None:
                inputs["global_attention_mask"] = over_slots(marks, given)
        if lost is not None:
            inputs[lost] = emptied_cache(self, input_ids, given, inputs)
        decoding_patterns(self, inputs, given, is_anew=lost is not None)
        return inputs

    return prepare_inputs_for_generation


def _with_marks(parent: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with one more argument, `global_attention_mask`, visible to Trainer and to `generate`."""
    signature = inspect.signature(parent)
    names = list(signature.parameters)[1:]
    has_marks = "global_attention_mask" in names
    takes_more = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    @functools.wraps(parent)
    def forward(self, *args, global_attention_mask=None, num_items_in_batch=None, **kwargs):
        if has_marks:
            # where it is one of the parent's own arguments, it may come by position
            kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, ()
            global_attention_mask = kwargs.pop("global_attention_mask", global_attention_mask)
        if num_items_in_batch is not None and self.training:
            num_items_in_batch = at_least_one(num_items_in_batch)
        if torch.compiler.is_compiling():
            # asked, so that a graph is of this version
            assert self.graph_version is not None
        else:
            refuse_tracing()
            check_spelling(kwargs, signature.parameters)
            check_cache_name(kwargs, signature.parameters)
        if kwargs.get("read_index") is not None:
            # continuous batching, whose row has no mask, marks or cache of a single text
            if "page_bounds" not in kwargs:
                kwargs["page_bounds"] = bounds_of_pages(kwargs)
            return parent(self, *args, **kwargs)
        if not takes_more:
            kwargs.pop(CHECKED, None)
        # the first argument is the text, whatever the dense class calls it
        given = {"input_ids": args[0] if args else None, **dict(zip(names, args, strict=False)), **kwargs}
        given["attention_mask"] = padding_in(given.get("attention_mask"))
        if given.get("position_ids") is not None:
            if "position_ids" not in names:
                check_no_positions(self.config, type(self).__name__)
            elif takes_more and given["position_ids"].ndim == 2:
                # where documents begin; some dense classes keep `position_ids` from their layers
                kwargs.setdefault("document_positions", given["position_ids"])
        kwargs |= _own_arguments(self, given, global_attention_mask)
        if self._parent_scales_loss and num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        with whole_pass(given), _said(self, kwargs, given_cache(given) is not None):
            output = parent(self, *args, **kwargs)
        if kwargs.get("global_attention_mask") is not None and given_cache(given) is None:
            # one that the dense class has made
            remember_marks(output, kwargs["global_attention_mask"])
        if kwargs.get("labels") is not None and self.accepts_loss_kwargs:
            output = rescaled(self, output, kwargs["labels"], num_items_in_batch)
        return output

    # what `inspect.signature` gives
    forward.__dict__["__signature__"] = signature if has_marks else with_marks_signature(signature)
    forward.__doc__ = (parent.__doc__ or "") + GLOBAL_MASK_DOC * (not has_marks)
    return forward


def _said(model: SparseMixin, kwargs: dict[str, Any], has_cache: bool) -> AbstractContextManager[None]:
    """Have layers know of arguments that the dense class may keep from them.

    Args:
        model: of the pass.
        kwargs: its arguments.
        has_cache: behind a cache nobody asks where documents begin.

    Raises:
        NotImplementedError: arguments in a compiled graph, where the class keeps them.
    """
    said = {name: kwargs[name] for name in READ_BY_LAYERS if kwargs.get(name) is not None}
    if not said:
        return nullcontext()
    if torch.compiler.is_compiling():
        # a decoder's positions reach its layers under another name, and that padding was checked saves a look at most
        is_decoder = isinstance(model, GenerationMixin) or has_cache
        harmless = {CHECKED, "document_positions"} if is_decoder else {CHECKED}
        if "streaming_cache" in said:
            # layers have the cache, which has the rest
            harmless |= {"streaming_cache", "turned_sinks", "global_attention_mask"}
        lost = [name for name in said if name not in harmless]
        if lost and model.keeps_arguments:
            raise NotImplementedError(
                f"{type(model).__name__} keeps {lost[0]} from its layers in a compiled graph; run without torch.compile"
            )
        return nullcontext()
    # asked of every module, so only if somebody wants to know
    return said_in_pass(model.config, {**said, FLEETING: functools.cache(functools.partial(_checkpoints, model))})


def _checkpoints(model: SparseMixin) -> bool:
    """Will layers of a model be computed again for their gradients?"""
    # under its name in newer versions, or in older ones
    name = next(n for n in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(type(model), n))
    return model.training and getattr(model, name)


def with_marks_signature(signature: inspect.Signature) -> inspect.Signature:
    """The signature with `global_attention_mask` before `**kwargs`."""
    extra = inspect.Parameter("global_attention_mask", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor)
    parameters = list(signature.parameters.values())
    index = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    return signature.replace(parameters=[*parameters[:index], extra, *parameters[index:]])


def _own_arguments(model: SparseMixin, given: dict[str, Any], marks: Tensor | None) -> dict[str, Any]:
    """Check the arguments of `forward`, and give those that attention needs beside them.

    Args:
        given: all of them by name, but for marks and the number of labels.
        marks: the caller's `global_attention_mask`.
    """
    if given.get("output_attentions"):
        check_weights(model.config._attn_implementation)
    own: dict[str, Any] = {}
    # what a head has said of the same pass, and its dense class has not handed on
    known = said_of(model.config)
    marks = known.get("global_attention_mask") if marks is None else marks
    if not torch.compiler.is_compiling():
        Limits.of(model).check(given)
        check_bounds(model.config, given)
        tokens = new_tokens(given)
        keep_all(given_cache(given), 0 if tokens is None else tokens.shape[1])
        check_fits(model.config, given_cache(given), given, 0 if tokens is None else tokens.shape[1])
    marks = forward_marks(model, given["input_ids"], marks, given)
    if marks is not None:
        own["global_attention_mask"] = marks
    if "streaming_cache" not in given and "streaming_cache" not in known:
        own |= begin_streaming(model.config, given, marks)
    decode = given.get("decode")
    if decode is not None:
        model.config.check_decode(decode)
        own["decode"] = None
        if decode == "dense":
            own[LAYERS_SEE] = model.config.dense_patterns()
    if "turned_sinks" not in given and "turned_sinks" not in known:
        own |= begin_turning(model, given)
    return own
