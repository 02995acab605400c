"""A text over several processes: what each is given of a batch, and one loss of all.

Legend: B batch rows, N tokens of the whole text, n of this process, S processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.hf.documents import BOUNDS, documents_of_bounds, number_documents
from ..models.hf.inner_padding import has_inner_padding
from ..models.hf.marks import find_marks
from ..models.hf.mask_request import said_in_pass
from ..models.hf.model_mixin import SparseMixin
from ..models.hf.text_parts import TEXT_PART
from ..models.longformer.tokens import GLOBAL
from ..parallel import Ranks, SplitAttention, SplitText, even_parts
from ..plan import of_batch
from .distillation import shifts, unwrapped

logger = logging.get_logger(__name__)

# the attribute of a model that holds its SplitSequence
KEPT_AS = "_split_sequence"
IGNORED = -100
# arguments that say where documents begin in the whole row; layers of a part are told otherwise
OF_DOCUMENTS = (*BOUNDS, "max_length_q", "max_length_k", "seq_idx")
# arguments of decoding
OF_DECODING = ("cache", "past_key_values", "cache_position", "read_index")


@dataclass
class SplitSequence:
    """What `split_sequence` changed, until `remove()` or the end of a `with`.

    Attributes:
        model: the model that was given.
        ranks: the processes that share a text.
        parts: how many tokens each gets of a text, from the length and the number of processes.
        is_on: whether texts are split.
    """

    model: nn.Module
    ranks: Ranks
    parts: Callable[[int, int], list[int]] = field(default=even_parts, repr=False)
    is_on: bool = True
    _forward: Callable | None = field(default=None, repr=False)

    @property
    def bytes_exchanged(self) -> int:
        """Bytes that this process has sent to the others since the split, gradients of keys and values included."""
        return self.ranks.bytes_sent

    def average_gradients(self) -> None:
        """Average gradients over the processes that share a text, which DDP and FSDP do by themselves.

        Raises:
            ValueError: parameters that something has spread over processes already.
        """
        for name, parameter in self.model.named_parameters():
            if type(parameter.data) is not Tensor or hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"{name} is spread over processes by FSDP or the like, which averages gradients itself"
                )
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(grad, group=self.ranks.group)
                parameter.grad = grad.div_(self.ranks.size)

    def part_of(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This process's tokens of a tensor of all, along a dimension."""
        sizes = self._sizes(whole.shape[dim])
        return whole.split(sizes, dim)[self.ranks.rank].contiguous()

    def remove(self) -> None:
        """Make the model what it was; doing it twice does nothing more."""
        base = unwrapped(self.model)
        self.is_on = False
        if vars(base).get(KEPT_AS) is self:
            vars(base).pop(KEPT_AS)
            # somebody may have wrapped it since, as accelerate does
            if vars(base).get("forward") is self._forward:
                vars(base).pop("forward")

    def __enter__(self) -> SplitSequence:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def _sizes(self, length: int) -> list[int]:
        sizes = list(self.parts(length, self.ranks.size))
        if len(sizes) != self.ranks.size or sum(sizes) != length or min(sizes) < 1:
            raise ValueError(
                f"a text of {length} tokens has parts of {sizes} tokens for {self.ranks.size} processes; each needs one token at least, "
                "and all together the whole text"
            )
        return sizes


def split_sequence(
    model: nn.Module, group: Any = None, *, parts: Callable[[int, int], list[int]] = even_parts
) -> SplitSequence:
    """Have the processes of a group share each text: every one computes a contiguous part of all rows.

    All of them call the model with the same whole batch, and each gets the outputs of its own part:
    logits and hidden states `[B, n, ...]`, and the loss of the whole text, the same on all. Attention
    fetches what its pattern reaches beyond a part. Gradients are to be averaged over the processes,
    as DDP and FSDP do; `average_gradients()` of the handle does it without them. With
    `num_items_in_batch` the loss is, as ever, a share, to be multiplied by the number of processes.

        >>> handle = split_sequence(model)
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> handle.average_gradients()
        >>> handle.remove()

    Args:
        model: a sparse decoder or encoder, bare or wrapped by PEFT, DDP or FSDP2.
        group: the processes that share a text: a process group of torch.distributed, or a mesh of one
            dimension; None is all of them.
        parts: tokens of each process, from the tokens of a text and the number of processes.

    Returns:
        A handle, also for `with`, that undoes it and counts the bytes that are exchanged.

    Raises:
        ValueError: no process group, a model that is not sparse, or one that is split already.
        NotImplementedError: a model whose layers do not say what they need of other parts.
    """
    base = _checked(unwrapped(model))
    ranks = Ranks(group.get_group() if hasattr(group, "get_group") else group)
    handle = SplitSequence(model, ranks, parts)
    function = base.forward

    @wraps(function)
    def forward(*args, **kwargs):
        return _Pass(handle, base).run(function, args, kwargs) if handle.is_on else function(*args, **kwargs)

    handle._forward = forward
    # neither a parameter nor a module: state dicts, classes and folders stay as they are
    setattr(base, "forward", forward)  # noqa: B010 - to a type checker a method is no attribute
    setattr(base, KEPT_AS, handle)
    return handle


def _checked(base: Any) -> SparseMixin:
    """A model that can be split; raises what `split_sequence` says of others."""
    if not isinstance(base, SparseMixin) or not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{type(base).__name__} is no sparse model, whose patterns say what a part needs of others; make it sparse with "
            "sparse_hf.sparsify(model, 'window(1023, 0) | first(4)')"
        )
    if KEPT_AS in vars(base):
        raise ValueError("the model is split already; call remove() of what split_sequence returned first")
    if "forward" in vars(base):
        raise ValueError(f"{type(base).__name__}.forward was replaced by something else; call split_sequence before it")
    config = base.config
    if config.is_encoder_decoder:
        raise NotImplementedError(
            f"{config.model_type} has two texts, of which a split knows one; use data parallelism or FSDP"
        )
    scheme = None if config.positions is None else config.positions.scheme
    if scheme in ("relative", "alibi"):
        raise NotImplementedError(
            f"{config.model_type} has a bias by distance, made for the tokens of one process; a text can be split over processes in "
            "models with rotary positions, or with positions in the embeddings"
        )
    return base


@dataclass
class _Pass:
    """One forward pass of a part."""

    handle: SplitSequence
    base: SparseMixin

    def run(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = _by_name(function, args, kwargs)
        _check_arguments(self.base.config, given)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise ValueError(
                "a text is split by input_ids or inputs_embeds, [batch, tokens, ...], and neither was given"
            )
        rows, length = tokens.shape[:2]
        sizes = self.handle._sizes(length)
        given = {name: value for name, value in given.items() if value is not None}
        part = SplitAttention(self.handle.ranks, self._text(given, rows, sizes))
        is_share, labelled = given.get("num_items_in_batch") is not None, given.get("labels") is not None
        if labelled:
            self._prepare_labels(given, rows, length)
        self._prepare_positions(given, tokens)
        self._check_same(tokens, given)
        cut = {name: self._cut(name, value, rows, length) for name, value in given.items() if name not in OF_DOCUMENTS}
        if "use_cache" in inspect.signature(function).parameters:
            cut["use_cache"] = False
        with said_in_pass(self.base.config, {TEXT_PART: part}):
            output = function(**cut)
        layers = self.base.config.get_text_config().num_hidden_layers
        if part.calls < layers:
            raise NotImplementedError(
                f"{type(self.base).__name__} has {layers} layers, and {part.calls} asked for what lies beyond their part of the text; "
                "layers that mix tokens otherwise cannot be split over processes"
            )
        if isinstance(output, Mapping) and output.get("pooler_output") is not None:
            # of the first token of a part
            output["pooler_output"] = None  # pyright: ignore[reportIndexIssue]
        return self._shared(output, is_share) if labelled else output

    def _text(self, given: dict[str, Any], rows: int, sizes: list[int]) -> SplitText:
        """What is said of all tokens, before anything is cut."""
        length = sum(sizes)
        real, positions = given.get("attention_mask"), given.get("position_ids")
        real = None if real is None else real.cpu() != 0
        if real is not None and bool(real.all()):
            real = None
        bounds = next((given[name] for name in BOUNDS if given.get(name) is not None), None)
        documents = None
        if bounds is not None:
            documents = documents_of_bounds(bounds.cpu(), length)
        elif positions is not None and positions.ndim == 2:
            documents = number_documents(positions.cpu(), real)
        documents = None if documents is None or not bool(documents.any()) else documents.expand(rows, -1)
        if real is not None and bool(has_inner_padding(real, documents)):
            raise NotImplementedError(
                "attention_mask has padding inside a row, between real tokens, which a text that is split over processes cannot count "
                "around; pad on the left or on the right"
            )
        config, marks = self.base.config, None
        if config.uses_marks:
            ids = given.get("input_ids")
            marks = find_marks(config, ids, given.get("global_attention_mask"))
            if marks is None and ids is not None:
                marks = self.base.default_marks(ids)
            mask = given.get("attention_mask")
            if config.heads_mark and mask is not None and mask.dtype != torch.bool and bool((mask == GLOBAL).any()):
                marks = mask == GLOBAL if marks is None else marks.bool() | (mask == GLOBAL)
            if marks is not None:
                given["global_attention_mask"] = marks.long()
                marks = marks.cpu().bool()
                marks = marks if real is None else marks & real
        return SplitText(sizes, rows, of_batch(real, documents, marks))

    def _prepare_labels(self, given: dict[str, Any], rows: int, length: int) -> None:
        """Shift labels of a decoder before they are cut, and count them all."""
        labels = given["labels"]
        if tuple(labels.shape) != (rows, length):
            raise NotImplementedError(
                f"labels have shape {tuple(labels.shape)}; a text that is split over processes is trained with a label for each token, "
                f"[batch, tokens] = {(rows, length)}"
            )
        counted = labels
        if shifts(self.base):
            if not self.base._parent_scales_loss:
                raise NotImplementedError(
                    f"{type(self.base).__name__} shifts labels by itself, across the ends of parts"
                )
            counted = given.setdefault("shift_labels", pad(labels, (0, 1), value=IGNORED)[:, 1:])
        if given.get("num_items_in_batch") is None:
            given["num_items_in_batch"] = (counted != IGNORED).sum()

    def _prepare_positions(self, given: dict[str, Any], tokens: Tensor) -> None:
        """Positions of the whole text, where the model would count them from the begin of its part."""
        scheme = self.base.config.positions
        if given.get("position_ids") is not None or scheme is None or scheme.scheme == "none":
            return
        if "position_ids" not in inspect.signature(type(self.base).forward).parameters:
            raise NotImplementedError(
                f"{type(self.base).__name__} takes no position_ids, by which a part would know where it begins"
            )
        rows, length = tokens.shape[:2]
        positions = torch.arange(length, device=tokens.device)[None]
        if scheme.skips_padding:
            positions = self._without_padding(given, tokens)
        given["position_ids"] = positions.expand(rows, -1)

    def _without_padding(self, given: dict[str, Any], tokens: Tensor) -> Tensor:
        """Positions of families whose padding takes none, as they count themselves."""
        padding_id = self.base.config.pad_token_id
        if self.base.config.model_type.endswith("opt"):
            mask = given.get("attention_mask")
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.long) if mask is None else mask
            return (mask.long().cumsum(1) * mask - 1).long()
        if tokens.ndim > 2:
            return torch.arange(tokens.shape[1], device=tokens.device)[None] + padding_id + 1
        real = (tokens != padding_id).long()
        return real.cumsum(1) * real + padding_id

    def _check_same(self, tokens: Tensor, given: dict[str, Any]) -> None:
        """Raise ValueError if processes that share a text were given different ones."""
        values = [float(n) for n in tokens.shape[:2]]
        for name in ("input_ids", "attention_mask", "labels"):
            value = given.get(name)
            if isinstance(value, Tensor):
                step = torch.arange(1, value.shape[-1] + 1, device=value.device) % 1009
                values.append(float((value.long() * step).sum() % (1 << 40)))
        self.handle.ranks.check_same(values, tokens.device)

    def _cut(self, name: str, value: Any, rows: int, length: int) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.shape[0] in (1, rows) and value.shape[1] == length:
            return self.handle.part_of(value)
        raise NotImplementedError(
            f"{name} has shape {tuple(value.shape)}, and a text that is split over processes takes tensors [batch, tokens, ...] = "
            f"{(rows, length)}"
        )

    def _shared(self, output: Any, is_share: bool) -> Any:
        """The output with the loss of all parts."""
        ranks = self.handle.ranks
        loss = output[0] if isinstance(output, tuple) else output.loss
        loss = ranks.mean(loss)
        loss = loss if is_share else loss * ranks.size
        if isinstance(output, tuple):
            return (loss, *output[1:])
        output.loss = loss
        return output


def _by_name(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(function).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_arguments(config: Any, given: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError("a text that is split over processes cannot be compiled; run without torch.compile")
    decoding = next((name for name in OF_DECODING if given.get(name) is not None), None)
    if decoding is not None:
        raise NotImplementedError(
            f"{decoding} was given, and decoding takes a whole model; call remove() of what split_sequence returned first"
        )
    if given.get("output_attentions"):
        raise NotImplementedError(
            "attention weights are those of the whole text, of which a process has a part; ask for none"
        )
    if given.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise NotImplementedError(
            "the loss that balances experts is one of all tokens, of which a process has a part; set output_router_logits=False"
        )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise NotImplementedError(
            "attention_mask is no [batch, tokens] mask; a mask of pairs speaks of the whole text, which is split over processes"
        )
