"""What every sparse model class adds to its dense parent."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from .config import check_weights, own_implementation
from .input_checks import Limits
from .streaming_cache import StreamingCache
from .tensor_parallel import check_division

# what a cache is called, newest name first
CACHE_NAMES = ("cache", "past_key_values")
GLOBAL_MASK_DOC = """

    global_attention_mask (`torch.Tensor` of shape `(batch_size, key_length)`, *optional*):
        1 on the tokens that the pattern's `marked()` speaks of: they attend to all tokens and all attend to them."""


class SparseMixin:
    """Attention by the configuration's pattern, marks from `global_attention_mask` or `global_token_ids`.

    Comes before the dense class among the bases: `class SparseBertModel(SparseMixin, BertModel)`.
    """

    # the mean over this process's labels is turned into the mean over the whole step, see `_rescaled`
    accepts_loss_kwargs = True
    # heads whose parent already divides by `num_items_in_batch`
    _parent_scales_loss = False
    _supports_context_parallel = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedModel):
            parent = cls.__dict__.get("forward", super(cls, cls).forward)
            cls.forward = _with_marks(parent)
            # such heads hand `num_items_in_batch` to the loss of the library, which divides by it
            code = inspect.unwrap(parent).__code__
            cls._parent_scales_loss = issubclass(cls, GenerationMixin) and "loss_function" in code.co_names

    def post_init(self):
        super().post_init()
        adopt(self)

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
        # `generate` would make the mask ahead for static caches and take it for a tensor
        return attention_mask


class SparseEncoderMixin(SparseMixin):
    """For the encoder inside an encoder-decoder, which `generate` calls by itself, or inside heads that mark: it finds the marks."""


class SparseGenerationMixin(SparseMixin):
    """For heads that generate."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_length, *args):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_length, *args)
        max_length = max(max_length, getattr(generation_config, "max_cache_len", None) or 0)
        for name in CACHE_NAMES:
            if isinstance(model_kwargs.get(name), (DynamicCache, StaticCache)):
                _keep_all(model_kwargs[name], max_length)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        # the whole text so far is here, of which the model itself sees only the last token: marks are made here
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        given, config = kwargs.get("global_attention_mask"), self.config
        if config.uses_marks and not config.is_encoder_decoder and (given is not None or config.global_token_ids):
            short = 0 if given is None else input_ids.shape[1] - given.shape[1]
            given = given if not short else torch.nn.functional.pad(given, (0, short))
            inputs["global_attention_mask"] = _marks(config, input_ids, given)
        return inputs


def _with_marks(parent):
    """A forward with one more argument, `global_attention_mask`, visible to Trainer and to `generate`."""
    signature = inspect.signature(parent)
    cache_name = next((name for name in CACHE_NAMES if name in signature.parameters), None)
    names = list(signature.parameters)[1:]
    has_marks = "global_attention_mask" in names

    @functools.wraps(parent)
    def forward(self, *args, global_attention_mask=None, num_items_in_batch=None, **kwargs):
        if has_marks:
            # where it is one of the parent's own arguments, it may come by position
            kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, ()
            global_attention_mask = kwargs.pop("global_attention_mask", global_attention_mask)
        if kwargs.get("output_attentions"):
            check_weights(self.config._attn_implementation)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not torch.compiler.is_compiling():
            Limits.of(self).check({**kwargs, "input_ids": input_ids})
        marks = _forward_marks(self, input_ids, global_attention_mask, kwargs)
        if marks is not None:
            kwargs["global_attention_mask"] = marks
        if "streaming_cache" not in kwargs:
            kwargs |= _begin_streaming({**dict(zip(names, args, strict=False)), **kwargs})
        cached = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        if cache_name and not self.training and not cached and _makes_sliding_cache(self, kwargs):
            kwargs[cache_name] = DynamicCache()
        if num_items_in_batch is not None and self.training:
            # a step in which nothing has a label has a loss of 0; an evaluation has none (NaN)
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self._parent_scales_loss and num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        output = parent(self, *args, **kwargs)
        if kwargs.get("labels") is not None and self.accepts_loss_kwargs:
            output = _rescaled(self, output, kwargs["labels"], num_items_in_batch)
        return output

    extra = inspect.Parameter("global_attention_mask", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor)
    parameters = list(signature.parameters.values())
    place = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    added = [] if has_marks else [extra]
    forward.__signature__ = signature.replace(parameters=[*parameters[:place], *added, *parameters[place:]])
    forward.__doc__ = (parent.__doc__ or "") + GLOBAL_MASK_DOC * (not has_marks)
    return forward


def _begin_streaming(given: dict) -> dict[str, StreamingCache]:
    """Tell a cache that drops keys what comes, and the attention function of the cache: models hand it keys alone."""
    cache = next((given[name] for name in CACHE_NAMES if isinstance(given.get(name), StreamingCache)), None)
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if cache is None or tokens is None:
        return {}
    cache.begin(given.get("attention_mask"), tokens.shape[1])
    return {"streaming_cache": cache}


def _makes_sliding_cache(model, kwargs) -> bool:
    """Would the parent make a cache that drops keys, of a window that the pattern need not share?"""
    config = model.config
    wanted = kwargs.get("use_cache")
    wanted = getattr(config, "use_cache", False) if wanted is None else wanted
    return bool(wanted) and getattr(config, "sliding_window", None) is not None


def _keep_all(cache, max_length: int) -> None:
    """Have a cache that would drop keys keep them all. It begins anew: `generate` has the whole text to fill it from."""
    if any(isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) for layer in cache.layers):
        is_static = isinstance(cache, StaticCache)
        cache.layers = [StaticLayer(max_length) if is_static else DynamicLayer() for _ in cache.layers]


def _forward_marks(model, input_ids: Tensor | None, given: Tensor | None, kwargs) -> Tensor | None:
    config = model.config
    if not config.uses_marks:
        if given is not None:
            raise ValueError(f"global_attention_mask was given, but {config.why_no_marks}")
        return None
    if "encoder" in config.stacks or config.heads_mark:
        # marks are the encoder's, which finds those named by id itself
        if getattr(config, "is_decoder", False) or not isinstance(model, SparseEncoderMixin):
            return model.default_marks(input_ids) if given is None and input_ids is not None else given
    elif given is None and config.global_token_ids:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "global_token_ids cannot be found in a cache; pass global_attention_mask for all keys, [batch, cached + new]"
            )
    if given is None and config.global_token_ids and input_ids is None:
        raise ValueError("global_token_ids need input_ids; with inputs_embeds pass global_attention_mask")
    return _marks(config, input_ids, given)


def _marks(config, input_ids: Tensor | None, given: Tensor | None) -> Tensor | None:
    """Marks given by hand, and the tokens named in the configuration: bool of the shape of what was given."""
    found = None
    if config.global_token_ids and input_ids is not None:
        found = torch.isin(input_ids, torch.tensor(config.global_token_ids, device=input_ids.device))
    if given is None:
        return found
    given = given.bool()
    if found is None:
        return given
    # multiple choice flattens its ids on the way in; with a cache the ids are only the last of the keys
    given = given.reshape(*found.shape[:-1], given.shape[-1])
    return given | torch.nn.functional.pad(found, (given.shape[-1] - found.shape[-1], 0))


def _rescaled(model, output, labels: Tensor, num_items_in_batch):
    """Turn the mean over this batch's labels into its share of the mean over all labels of the optimizer step.

    Trainer passes their number and then neither divides by accumulation steps nor averages over processes, so that a head
    that keeps the plain mean would train with a loss that is too large by both. In training, a batch without labels has no
    share: its loss is 0 instead of the mean of nothing (NaN), with a graph behind it, which other processes wait for.
    """
    is_share = num_items_in_batch is not None
    if is_share and model._parent_scales_loss or not (is_share or model.training):
        return output
    # decoders of encoder-decoders take labels as they are, and compute their loss by themselves
    shifts = model._parent_scales_loss and model.loss_type == "ForCausalLM" and not model.config.is_encoder_decoder
    count = ((labels[..., 1:] if shifts else labels) != -100).sum()
    loss = output[0] if isinstance(output, tuple) else output.loss
    loss = torch.where(count > 0, loss, 0)
    if is_share:
        loss = loss * (count / torch.as_tensor(num_items_in_batch, device=count.device))
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


class FusedGELU(NewGELUActivation):
    """The same function in one kernel: written out, it keeps five tensors for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.gelu(input, approximate="tanh")


# dense class -> sparse class, filled by `register_family`
COUNTERPARTS: dict[type, type] = {NewGELUActivation: FusedGELU}


def adopt(model: PreTrainedModel) -> None:
    """Give the models inside `model` (the encoder inside a head) their sparse class too."""
    for module in model.modules():
        if type(module) in COUNTERPARTS:
            module.__class__ = COUNTERPARTS[type(module)]
        if hasattr(module, "number_layers"):
            module.number_layers()
