"""The one autograd node of attention, and backends that lean on autograd themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .backend import AttentionCall, Backend, Given, Gradients, Results
from .devices import is_autocast


class AutogradBackend(Backend):
    """A backend whose `forward` is made of differentiable operations of torch.

    Called eagerly, autograd differentiates what ran. Where autograd has been left behind, in an operator or for one part of
    a whole, `forward` runs again.
    """

    uses_autograd = True

    def backward(self, call: AttentionCall, given: Given) -> Gradients:
        out, lse = given.out, given.lse
        with recording():
            bias = call.scoring.bias
            q, k, v = (t.detach().requires_grad_() for t in (call.q, call.k, call.v))
            leaves = [q, k, v]
            if bias is not None:
                bias = bias.detach().requires_grad_()
                leaves.append(bias)
            part_out, part_lse = results = self.forward(call.on(q, k, v, bias))
        # what `forward` gave is a part of the whole: d out / d part_out is its share, and a change of part_lse moves the
        # share. Of a whole that is one part the share is 1
        share = (part_lse.detach() - lse.where(lse > -torch.inf, 0)).exp()
        of_out, change = torch.zeros_like(part_out), torch.zeros_like(part_lse)
        if given.grad_out is not None:
            of_out = (share[..., None] * given.grad_out).to(part_out.dtype)
            change = (given.grad_out.to(lse.dtype) * (part_out.detach().to(lse.dtype) - out)).sum(-1)
        if given.grad_lse is not None:
            change = change + given.grad_lse
        of_lse = (share * change).to(part_lse.dtype)
        grads = torch.autograd.grad(results, leaves, (of_out, of_lse))
        return grads[0], grads[1], grads[2], grads[3] if len(grads) > 3 else None


@contextmanager
def recording() -> Iterator[None]:
    """Have torch record operations for autograd, also inside an operator, where turning gradients on is not enough."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield


def attend(call: AttentionCall, backend: Backend) -> Results:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]` of a call, differentiable."""
    if is_autocast(call.q):
        # tensors have the dtype that autocast gave them, and a backend computes in the precision that it needs
        with torch.autocast(call.q.device.type, enabled=False):
            return attend(call, backend)
    if backend.uses_autograd or not call.trains:
        return backend.forward(call)
    return _Attention.apply(call.q, call.k, call.v, call.scoring.bias, call, backend)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, call: AttentionCall, backend: Backend):
        out, lse = backend.forward(call)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        # tensors are saved above, where hooks (checkpointing, offloading) see them
        ctx.backend, ctx.rest = backend, _without_tensors(call)
        # a gradient of lse that nobody asked for must not cost a pass
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        refuse_second_derivative_of(ctx.backend)
        q, k, v, bias, out, lse = ctx.saved_tensors
        pattern, q_offset, scoring, dropout, batch, recorded, plan = ctx.rest
        scoring = scoring if bias is None else replace(scoring, bias=bias)
        call = AttentionCall(q, k, v, pattern, q_offset, scoring, dropout, batch, True, recorded, plan)
        given = Given(out, lse, grad_out, grad_lse)
        if is_autocast(q):
            with torch.autocast(q.device.type, enabled=False):
                return *ctx.backend.backward(call, given), None, None
        return *ctx.backend.backward(call, given), None, None


def refuse_second_derivative(what: str, remedy: str = "call autograd without create_graph=True") -> None:
    """Raise RuntimeError if a backward pass of the caller's own is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivative; {remedy}")


def refuse_second_derivative_of(backend: Backend) -> None:
    """The same of attention by a backend."""
    refuse_second_derivative(f"backend {backend.name!r}", "use backend='reference' for create_graph=True")


def _without_tensors(call: AttentionCall) -> tuple:
    scoring = call.scoring if call.scoring.bias is None else replace(call.scoring, bias=None)
    return call.pattern, call.q_offset, scoring, call.dropout, call.batch, call.recorded, call.chosen_plan
