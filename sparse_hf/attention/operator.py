"""Attention as operators of torch, so that compiled models stay full-graph; one registration for all of them.

The plan depends on the content of the batch (padding, packing, marks), which a graph cannot look at; inside an operator it
can. Eager code does not come here: it calls backends directly.

CUDA graphs record what runs once and replay it. So each operator comes twice: one that a graph may record, since what it
does depends on nothing but lengths, or on what only kernels look at; and one that is run between graphs.

Legend: B batch, H query heads, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..plan import made_apart
from .backend import AttentionCall, Backend, Given
from .strides import like, with_tokens_first

# recorded graphs read the tables of these for as long as they live
_RECORDED: set[Any] = set()

# from whether a graph may record it, and the arguments of an operator, to the call and what runs it
Prepare = Callable[..., "tuple[AttentionCall, Backend]"]


def has_no_content(q: Tensor) -> bool:
    """Is a call traced, or made of shapes alone, so that only an operator can stand for it?"""
    return torch.compiler.is_compiling() or q.is_meta or isinstance(q, FakeTensor)


def register(name: str, prepare: Prepare, tensors: str, values: str) -> tuple[Callable, Callable]:
    """Register the operators `sparse_hf::{name}`, run between graphs, and `sparse_hf::{name}_recorded`.

    Args:
        name: of the operator.
        prepare: from its arguments to the call and the backend that runs it; called again for the backward pass.
        tensors: the arguments that are tensors, of which q, k and v come first and the bias, if there is one, last.
        values: the others, as in torch's schemas.

    Returns:
        both, differentiable: `(*tensors, *values) -> (out, lse)`.
    """
    return _operator(name, prepare, tensors, values, False), _operator(
        f"{name}_recorded", prepare, tensors, values, True
    )


def _operator(name: str, prepare: Prepare, tensors: str, values: str, recorded: bool) -> Callable:
    tags = () if recorded else (torch.Tag.cudagraph_unsafe,)
    count = tensors.count("Tensor")
    bias_at = count - 1 if tensors.endswith("bias") else None
    arguments = f"{tensors}, {values}"
    given = "Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse"
    forward = torch.library.custom_op(
        f"sparse_hf::{name}", partial(_forward, prepare, recorded), mutates_args=(), tags=tags,
        schema=f"({arguments}) -> (Tensor, Tensor)",
    )  # fmt: skip
    backward = torch.library.custom_op(
        f"sparse_hf::{name}_backward", partial(_backward, prepare, recorded), mutates_args=(), tags=tags,
        schema=f"({arguments}, {given}) -> (Tensor, Tensor, Tensor, Tensor)",
    )  # fmt: skip
    forward.register_fake(_fake_forward)
    backward.register_fake(partial(_fake_backward, bias_at))

    def remember(ctx, inputs, output):
        # a gradient of lse that nobody asked for must not cost a pass
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count], *output)
        ctx.values = inputs[count:]

    def differentiate(ctx, grad_out, grad_lse):
        saved = ctx.saved_tensors
        *grads, grad_bias = backward(*saved[:count], *ctx.values, *saved[count:], grad_out, grad_lse)
        of_tensors: list[Any] = [*grads, *(None,) * (count - 3)]
        if bias_at is not None and saved[bias_at] is not None:
            of_tensors[bias_at] = grad_bias
        return *of_tensors, *(None,) * len(ctx.values)

    forward.register_autograd(differentiate, setup_context=remember)
    return forward


def _forward(prepare: Prepare, recorded: bool, *arguments) -> tuple[Tensor, Tensor]:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]`."""
    with made_apart(recorded and arguments[0].is_cuda):
        call, backend = prepare(recorded, *arguments)
        out, lse = backend.forward(call)
        _keep(call, backend)
    return with_tokens_first(out), lse.contiguous()


def _backward(prepare: Prepare, recorded: bool, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty without one)."""
    *own, out, lse, grad_out, grad_lse = arguments
    with made_apart(recorded and own[0].is_cuda):
        call, backend = prepare(recorded, *own)
        grad_q, grad_k, grad_v, grad_bias = backend.backward(call, Given(out, lse, grad_out, grad_lse))
        _keep(call, backend)
    of_bias = own[0].new_empty(0) if grad_bias is None else grad_bias.contiguous()
    return with_tokens_first(grad_q), with_tokens_first(grad_k), with_tokens_first(grad_v), of_bias


def _keep(call: AttentionCall, backend: Backend) -> None:
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        _RECORDED.add(backend.tables(call))


def _fake_forward(q, k, v, *rest):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return like(q, v.shape[-1]), lse


def _fake_backward(bias_at, *arguments):
    bias = None if bias_at is None else arguments[bias_at]
    of_bias = arguments[0].new_empty(0)
    if bias is not None:
        of_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return *map(like, arguments[:3]), of_bias
