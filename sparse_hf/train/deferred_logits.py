"""Logits that are computed in pieces, and never whole unless something asks for them.

An output layer gives `DeferredLogits`: hidden states, the weight that would make logits of them,
and what is done to logits next. `torch.nn.functional.cross_entropy`, which losses of Transformers
call, is computed piece by piece. All else makes the logits whole first.

Legend: T tokens, D hidden size, V vocabulary, ... any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.utils import logging

from .first_order import first_order

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How hidden states become logits, beside weight and bias.

    Attributes:
        piece: tokens whose logits exist at a time.
        autocast: the dtype that autocast gives the output layer, None without autocast.
        steps: what is done to logits then, each a function and its further arguments.
    """

    piece: int
    autocast: torch.dtype | None
    steps: tuple[tuple[Callable, tuple], ...] = ()

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., D]` to `[..., V]`."""
        # a cast that is remembered belongs to a graph that is gone with its piece
        with torch.autocast(
            hidden.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):  # fmt: skip
            made = F.linear(hidden, weight, bias)
        return self.finished(made)

    def finished(self, logits: Tensor) -> Tensor:
        for function, args in self.steps:
            logits = function(logits, *args)
        return logits

    def before_casts(self, dtype: torch.dtype) -> Recipe:
        """Without casts at the end that keep all digits; `dtype` is that of hidden states.

        A loss computes in float32 at least, whatever it is given.
        """
        recipe = self
        while recipe.steps and recipe.steps[-1][0] is Tensor.to:
            shorter = replace(recipe, steps=recipe.steps[:-1])
            before = shorter.finished(torch.empty(0, 1, dtype=self.autocast or dtype)).dtype
            after = recipe.steps[-1][1][0]
            if torch.promote_types(before, after) != after:
                break
            recipe = shorter
        return recipe


class DeferredLogits(Tensor):
    """Logits `[..., V]` that are not made yet.

    It is a tensor for all that asks: shape, dtype and gradients are those of the logits. Its
    elements are made when something other than a loss wants them, and then kept.

        >>> logits = defer(hidden, weight, None, Recipe(piece=1024, autocast=None))
        >>> loss = torch.nn.functional.cross_entropy(logits.float().view(-1, vocabulary), labels)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    recipe: Recipe
    made: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe):
        # no rows: what the steps make of the dtype
        sample = torch.empty(0, len(weight), dtype=recipe.autocast or hidden.dtype, device=hidden.device)
        shape = (*hidden.shape[:-1], len(weight))
        dtype = recipe.finished(sample).dtype
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)  # type: ignore[attr-defined]
        self.hidden, self.weight, self.bias, self.recipe, self.made = hidden, weight, bias, recipe, None
        return self

    def whole(self, asked_by: str) -> Tensor:
        """The logits as any other tensor, made once."""
        if self.made is None:
            per_token = self.shape[-1] * self.element_size()
            logger.warning_once(
                f"`{asked_by}` needs whole logits, which take {per_token:,} bytes for each token; "
                "sparse_hf.train.long_text computes torch.nn.functional.cross_entropy in pieces, and nothing else"
            )
            with torch.set_grad_enabled(self.requires_grad):
                self.made = self.recipe.logits(self.hidden, self.weight, self.bias)
        return self.made

    def moved(self, hidden: Tensor, *steps: tuple[Callable, tuple]) -> Tensor:
        """Logits of `hidden` instead, with further steps."""
        return defer(hidden, self.weight, self.bias, replace(self.recipe, steps=(*self.recipe.steps, *steps)))

    def of(self, rows: Tensor) -> Tensor:
        """Logits `[n, V]` of some rows of `[T, V]`, without those of others and without a graph."""
        with torch.no_grad():
            return self.recipe.logits(self.hidden[rows], self.weight, self.bias)

    def __repr__(self, *, tensor_contents=None):
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        attribute = func.__self__.__name__ if getattr(func, "__name__", "") == "__get__" else None
        if func in ABOUT or attribute is not None and attribute not in OF_ELEMENTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        # in the forward of an autograd function, what comes out has another past than what goes in
        may_defer = torch.is_grad_enabled() or func is F.cross_entropy
        if (
            func in RULES
            and isinstance(first, DeferredLogits)
            and first.made is None
            and (may_defer or not first.requires_grad)
        ):
            found = RULES[func](func, first, *args[1:], **kwargs)
            if found is not NotImplemented:
                return found
        name = attribute or getattr(func, "__name__", str(func))
        args, kwargs = tree_map(lambda x: x.whole(name) if isinstance(x, DeferredLogits) else x, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """What reaches tensors below `__torch_function__`, as in a custom autograd function."""
        args, kwargs = tree_map(
            lambda x: x.recipe.logits(x.hidden, x.weight, x.bias) if isinstance(x, DeferredLogits) else x,
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    """Makes logits that are not made yet a node of the graph: a gradient of theirs, which is whole, goes on."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, recipe):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.recipe = recipe
        return DeferredLogits(hidden, weight, bias, recipe)

    @staticmethod
    @first_order
    def backward(ctx, grad):  # type: ignore[override]
        leaves = [_leaf(*both) for both in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
        with torch.enable_grad():
            logits = ctx.recipe.logits(*leaves)
        return *_grads(logits, leaves, grad), None


def defer(hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """Logits of `hidden` `[..., D]` that are not made yet, for `weight` `[V, D]` and `bias` `[V]`."""
    result = _Defer.apply(hidden, weight, bias, recipe)
    assert isinstance(result, Tensor)
    return result


def _leaf(tensor: Tensor | None, is_wanted: bool) -> Any:
    """A copy without a past, which wants a gradient or not."""
    return None if tensor is None else tensor.detach().requires_grad_(is_wanted)


def _grads(output: Tensor, leaves, grad: Tensor | None = None) -> list[Tensor | None]:
    """One gradient for each leaf, None where none is wanted."""
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad))
    return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


@dataclass(frozen=True)
class PieceLoss:
    """A loss that is a sum over rows, computed for some rows at a time.

    Attributes:
        sum: logits `[n, V]`, in float32 at least, and the numbers of their rows `[n]`, to their loss.
        with_gradient: the same of logits in any dtype, which it may write over, with the gradient of the logits; None has
            autograd find it.
        rows: the rows that count.
        divisor: what the sum is divided by.
        dtype: that of the loss.
        with_grad: will gradients be asked for?
    """

    sum: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    divisor: int
    dtype: torch.dtype
    with_grad: bool
    with_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def of(self, recipe: Recipe, leaves: list[Any], rows: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The loss of some rows, and gradients of hidden states, weight and bias where they are wanted."""
        wants_grad = any(leaf is not None and leaf.requires_grad for leaf in leaves)
        with torch.set_grad_enabled(wants_grad):
            logits = recipe.logits(*leaves)
            if self.with_gradient is None or not wants_grad:
                piece = self.sum(logits.to(torch.promote_types(logits.dtype, torch.float32)), rows)
                return piece.detach(), _grads(piece, leaves) if wants_grad else []
        given = logits.detach()
        # what steps keep for their gradients may be the logits themselves
        piece, grad = self.with_gradient(given.clone() if recipe.steps else given, rows)
        return piece, _grads(logits, leaves, grad)


class _PieceByPiece(torch.autograd.Function):
    """A loss of logits that are made piece by piece, with its gradients.

    Gradients are computed at once, since logits of a piece are gone when the next is made.
    """

    # torch's linear_cross_entropy does the same for a plain linear layer, from torch 2.13 on. It
    # takes no soft caps, scales or casts, which many families have

    @staticmethod
    def forward(ctx, hidden, weight, bias, recipe: Recipe, loss: PieceLoss):
        needed = [loss.with_grad and n for n in ctx.needs_input_grad[:3]]
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needed[0] else None
        # sums over pieces are kept in float32, as a matrix product keeps them
        sums = [torch.zeros_like(t, dtype=wide) if n else None for t, n in ((weight, needed[1]), (bias, needed[2]))]
        for rows in loss.rows.split(recipe.piece):
            leaves = [_leaf(*both) for both in zip((hidden[rows], weight, bias), needed, strict=True)]
            piece, grads = loss.of(recipe, leaves, rows)
            total += piece
            if not grads:
                continue
            found, *others = grads
            if grad_hidden is not None and found is not None:
                grad_hidden[rows] = found
            for grad_sum, grad in zip(sums, others, strict=True):
                if grad_sum is not None and grad is not None:
                    grad_sum += grad
        ctx.save_for_backward(grad_hidden, *sums)
        ctx.divisor, ctx.dtype = loss.divisor, weight.dtype
        # the mean of nothing is NaN, as in torch
        return (total / loss.divisor if loss.divisor else total / torch.zeros_like(total)).to(loss.dtype)

    @staticmethod
    @first_order
    def backward(ctx, grad):  # type: ignore[override]
        grad_hidden, *sums = ctx.saved_tensors
        scale = grad / max(ctx.divisor, 1)
        scaled = [None if s is None else (s * scale).to(ctx.dtype) for s in sums]
        return None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype), *scaled, None, None


def piece_by_piece(logits: DeferredLogits, recipe: Recipe, loss: PieceLoss) -> Tensor:
    """The loss of logits `[T, V]`, made by `recipe`."""
    result = _PieceByPiece.apply(logits.hidden, logits.weight, logits.bias, recipe, loss)
    assert isinstance(result, Tensor)
    return result


def _cross_entropy(
    func, logits: DeferredLogits, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0,
):  # fmt: skip
    # a loss of each token is computed in pieces where nobody asks for its gradient, as in evaluations
    known = ("mean", "sum") if logits.requires_grad and torch.is_grad_enabled() else ("mean", "sum", "none")
    is_plain = weight is None and size_average is None and reduce is None and reduction in known
    if not is_plain or logits.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return NotImplemented
    if len(logits) != len(target):
        raise ValueError(f"there are logits of {len(logits)} tokens, and {len(target)} labels")
    # autocast may give another dtype than that of logits
    sample = torch.zeros(1, 2, dtype=logits.dtype, device=logits.device)
    dtype = func(sample, torch.zeros(1, dtype=torch.long, device=logits.device)).dtype
    rows = (target != ignore_index).nonzero().squeeze(1)

    if reduction == "none":
        each = torch.zeros(len(target), dtype=dtype, device=logits.device)
        for some in rows.split(logits.recipe.piece):
            kept = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            each[some] = func(logits.of(some), target[some], reduction="none", **kept)
        return each

    def summed(piece: Tensor, some: Tensor) -> Tensor:
        return func(piece, target[some], ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing)

    def with_gradient(piece: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        labels = target[some][:, None]
        log_p = torch.log_softmax(piece, -1, dtype=torch.promote_types(piece.dtype, torch.float32))
        of_labels = log_p.gather(1, labels)
        grad = torch.exp(log_p, out=piece)
        # p - 1 is rounded once
        return -of_labels.sum(), grad.scatter_(1, labels, of_labels.expm1().to(grad.dtype))

    divisor = len(rows) if reduction == "mean" else 1
    known = None if label_smoothing else with_gradient
    loss = PieceLoss(summed, rows, divisor, dtype, torch.is_grad_enabled(), known)
    recipe = logits.recipe.before_casts(logits.hidden.dtype)
    return piece_by_piece(logits, recipe, loss)


def _index(func, logits: DeferredLogits, index):
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (list, bool)) for i in index):
        return NotImplemented
    taken = [0 if i is None or i is Ellipsis else i.dim() if _is_mask(i) else 1 for i in index]
    where = next((n for n, i in enumerate(index) if i is Ellipsis), None)
    rest = (slice(None),) * (logits.dim() - sum(taken))
    index = (*index, *rest) if where is None else (*index[:where], *rest, *index[where + 1 :])
    # a vocabulary that is cut is no vocabulary
    return logits.moved(logits.hidden[index]) if index[-1] == slice(None) else NotImplemented


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _reshape(func, logits: DeferredLogits, *shape, **named):
    if named or any(isinstance(s, torch.dtype) for s in shape):
        return NotImplemented
    sizes = list(shape[0]) if shape and not isinstance(shape[0], int) else list(shape)
    if sizes and sizes[-1] == -1:
        sizes[-1] = logits.numel() // max(math.prod(sizes[:-1]), 1)
    if not sizes or sizes[-1] != logits.shape[-1]:
        return NotImplemented
    return logits.moved(logits.hidden.reshape(*sizes[:-1], logits.hidden.shape[-1]))


def _leading(func, logits: DeferredLogits, *dims, **named):
    """`flatten` and `transpose` of two leading dimensions."""
    dims = [d % logits.dim() for d in dims]
    is_leading = len(dims) == 2 and not named and logits.dim() - 1 not in dims
    return logits.moved(func(logits.hidden, *dims)) if is_leading else NotImplemented


def _same(func, logits: DeferredLogits, **kwargs):
    return logits.moved(logits.hidden)


def _detached(func, logits: DeferredLogits):
    bias = None if logits.bias is None else logits.bias.detach()
    return defer(logits.hidden.detach(), logits.weight.detach(), bias, logits.recipe)


def _cast(func, logits: DeferredLogits, *args, **kwargs):
    sample = func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs)
    if not isinstance(sample, Tensor) or sample.device != logits.device:
        return NotImplemented
    return logits.moved(logits.hidden, (Tensor.to, (sample.dtype,)))


def _pointwise(func, logits: DeferredLogits, *args, **named):
    """What is done to each logit alike, or to those of one word."""
    if named:
        return NotImplemented
    for arg in args:
        is_number = isinstance(arg, (int, float))
        if not is_number and not (isinstance(arg, Tensor) and not arg.requires_grad and _is_row(arg, logits)):
            return NotImplemented
    return logits.moved(logits.hidden, (func, args))


def _is_row(other: Tensor, logits: Tensor) -> bool:
    """Is it one number, or one for each word?"""
    if isinstance(other, DeferredLogits) or other.dim() > logits.dim():
        return False
    # rows of a piece have two dimensions
    return other.dim() == 0 or other.dim() <= 2 and other.numel() == other.shape[-1] == logits.shape[-1]


# what a tensor says about itself, for which nothing has to be made
ABOUT: set[Callable] = {
    *(getattr(Tensor, name) for name in (
        "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "register_hook", "get_device",
        "__len__", "__hash__",
    )),
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
# attributes that are made of elements, unlike shape, dtype, ...
OF_ELEMENTS = {"data", "T", "mT", "H", "mH", "real", "imag"}
# what logits that are not made can do: rule(function, logits, ...), NotImplemented where it cannot
RULES: dict[Callable, Callable] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _index,
    Tensor.detach: _detached,
    **dict.fromkeys((Tensor.view, Tensor.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten, Tensor.transpose, torch.transpose), _leading),
    **dict.fromkeys((Tensor.contiguous, Tensor.clone, torch.clone), _same),
    **dict.fromkeys((Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16), _cast),
    **dict.fromkeys(
        (
            Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__, torch.div, Tensor.add,
            Tensor.__add__, Tensor.__radd__, torch.add, Tensor.tanh, torch.tanh,
        ),
        _pointwise,
    ),
}  # fmt: skip
