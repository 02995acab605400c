"""Projections of the same states, joined: one product instead of one for each, forward and backward.

On short texts a GPU waits for the host, which takes as long to launch a small product as a large one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

# numbers in the states of a batch up to which a GPU that computes in half precision is done sooner than the host: there the
# fewest operations win, beyond it the least work
MAX_HOST_BOUND_ELEMENTS = 1 << 23
# weights of libraries (quantized, sharded) are subclasses; replicas of `nn.DataParallel` have plain tensors
PLAIN_TENSORS = (nn.Parameter, Tensor)
OWN_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "forward")


def is_host_bound(states: Tensor) -> bool:
    """Does a GPU wait for the host at this size? Never said of a graph, which the host does not walk through."""
    if not states.is_cuda or torch.compiler.is_compiling() or states.numel() > MAX_HOST_BOUND_ELEMENTS:
        return False
    # autocast leaves float64 alone
    return states.element_size() <= 2 or torch.is_autocast_enabled("cuda") and states.dtype == torch.float32


def are_plain(modules: Sequence[nn.Module], with_bias: bool = True) -> bool:
    """Are these linear layers whose weights say all: no adapter, no quantized or sharded weight, no hook?

    Whoever reads weights instead of calling the module must ask it first.

    Args:
        with_bias: has each of them a bias, or none?
    """
    return not hooks._has_any_global_hook() and all(_is_plain(module, with_bias) for module in modules)


def _is_plain(module: nn.Module, with_bias: bool) -> bool:
    if type(module) is not nn.Linear or any(map(vars(module).get, OWN_CALLS)):
        return False
    weight, bias = module.weight, module.bias
    return type(weight) in PLAIN_TENSORS and (type(bias) in PLAIN_TENSORS if with_bias else bias is None)


def joined(states: Tensor, modules: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each of `modules`, all of them plain, makes of `states` `[..., E]`."""
    weight = torch.cat([module.weight for module in modules])
    bias = torch.cat([module.bias for module in modules])
    sizes = [module.out_features for module in modules]
    return nn.functional.linear(states, weight, bias).split(sizes, dim=-1)
