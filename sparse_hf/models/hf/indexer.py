"""The learned indexer that a layer gets which chooses keys by `topk(..., 'indexer')`: small heads that score the keys of the past.

As in DeepSeek V3.2 (arXiv:2512.02556) a score is the sum over the heads of the indexer of `weight * relu(query . key)`, all of
them projections of the states that the layer's attention is given. Angles of positions are those of the model, where it has any.

The module is `indexer` of the attention module, with the parameters `wq.weight`, `wk.weight`, `k_norm.weight`, `k_norm.bias` and
`weights_proj.weight`. A hook before the attention module has it make scores, and hands them to the attention function. Neighbouring
layers may share an indexer, as in GLM-5: the first of them has it, and the others go by its scores.

Legend: B batch, I heads of the indexer, Q queries, K keys, D width of a head of the indexer, R dims of the model's angles.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from ...attention.chosen import IndexerScores
from ...pattern.base import as_pattern
from ..derived.attention_modules import attention_modules
from .chosen_keys import learning, refuse_graphs
from .mask_request import MaskRequest

# the module of an attention module, and the argument by which its scores reach the attention function
NAME, INDEXED = "indexer", "indexed"
UNTRAINED = "indexers have new weights, which choose keys at random: train them with sparse_hf.train.train_indexer before the model is used"


class Indexer(nn.Module):
    """Scores the keys of a layer.

    Args:
        states: width of the states that the layer is given.
        heads: I.
        width: D.
        slot: the layer of a cache that holds its keys, behind those of the model.
    """

    def __init__(self, states: int, heads: int, width: int, slot: int):
        super().__init__()
        self.heads, self.width, self.slot = heads, width, slot
        # do later layers go by its scores?
        self.leads = False
        self.wq = nn.Linear(states, heads * width, bias=False)
        self.wk = nn.Linear(states, width, bias=False)
        self.k_norm = nn.LayerNorm(width)
        self.weights_proj = nn.Linear(states, heads, bias=False)

    def forward(self, states: Tensor, angles: tuple[Tensor, Tensor] | None, cache: Cache | None) -> IndexerScores:
        """What keys are scored by, those of the cache included, to which the new ones are added.

        Args:
            states: `[B, Q, states]`.
            angles: cosines and sines, `[B or 1, Q, R]` each; None of a model that has its positions in the states.
        """
        query = self.wq(states).unflatten(-1, (self.heads, self.width))  # [B, Q, I, D]
        key = self.k_norm(self.wk(states))[:, :, None]
        if angles is not None:
            query, key = (turned(t, angles) for t in (query, key))
        key = key.squeeze(2)
        if cache is not None:
            key = self._kept(key, cache)
        return IndexerScores(query, key, self.weights_proj(states) * self.heads**-0.5, self.width**-0.5)

    def _kept(self, key: Tensor, cache: Cache) -> Tensor:
        """The keys `[B, K, D]` of the cache, to which new ones are added: layers of its own behind those of the model."""
        like = cache.layers[0] if cache.layers else DynamicLayer()
        if not isinstance(like, (DynamicLayer, StaticLayer)) or like.is_sliding or getattr(cache, "offloading", False):
            raise NotImplementedError(
                f"a {type(cache).__name__} of {type(like).__name__} has no place for the keys of an indexer; use a DynamicCache or a "
                "StaticCache, without offloading"
            )
        # one without layers, which is made without a configuration, adds those of the model just so
        while len(cache.layers) <= self.slot:
            cache.layers.append(StaticLayer(like.max_cache_len) if isinstance(like, StaticLayer) else DynamicLayer())
        own: Any = cache.layers[self.slot]
        return own.update(key[:, None], key[:, None, :, :0])[0][:, 0]


class SharedIndexer(nn.Module):
    """Stands in a layer that goes by the scores which an earlier layer's indexer made in the same pass; it has no weights.

    Args:
        leader: the number of that layer.
    """

    def __init__(self, leader: int):
        super().__init__()
        self.leader = leader

    def forward(self, states: Tensor, request: Any) -> IndexerScores:
        """The scores, on the device of the layer's states."""
        scores = request.handed_on.get(self.leader) if isinstance(request, MaskRequest) else None
        if scores is None:
            raise NotImplementedError(
                f"a layer goes by the indexer of layer {self.leader}, which made no scores for it in this pass; give each layer one of its "
                "own, indexer={'share': 1}"
            )
        if scores.device == states.device:
            return scores
        query, key, weights = (t.to(states.device) for t in (scores.query, scores.key, scores.weights))
        return IndexerScores(query, key, weights, scores.scale)


def turned(t: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """`[B, Q, I, D]` turned by the model's angles, or by evenly many of them where they are more than a head holds."""
    cos, sin = angles
    if not isinstance(cos, Tensor) or cos.ndim != 3 or cos.is_complex():
        raise NotImplementedError(
            "the model hands its layers positions in a form of its own, by which no indexer can be turned; use topk(...) without one"
        )
    dims = min(cos.shape[-1], t.shape[-1]) // 2 * 2
    # cosines are there twice, and each pair of dims is turned by one
    which = torch.linspace(0, cos.shape[-1] // 2 - 1, dims // 2, device=cos.device).round().long()
    cos, sin = (part[:, :, None, which].to(t.dtype) for part in (cos, sin))  # [B or 1, Q, 1, dims / 2]
    one, other, rest = t.split([dims // 2, dims // 2, t.shape[-1] - dims], dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1)


def fit_indexers(model: nn.Module, config: Any) -> None:
    """Give each layer whose pattern asks for it an indexer, with new weights, and take it from those whose pattern does not.

    Raises:
        ValueError: a family without attention modules that an indexer can stand before, or whose layers see what comes; layers of
            different kinds that were to share one.
    """
    patterns, wanted = config.layer_patterns() if set(config.stacks) == {""} else [], 0
    layers = [number for number, pattern in enumerate(patterns) if as_pattern(pattern).uses_indexer]
    share = config.indexer.get("share", 1)
    leaders = layers[::share]
    for number in leaders if share > 1 else ():
        _check_kinds(config, layers[layers.index(number) :][:share])
    sizes = {name: value for name, value in config.indexer.items() if name != "share"}
    for _, module in attention_modules(model):
        number = vars(module).get("layer_idx")
        if number not in layers:
            _take(module)
            continue
        place = layers.index(number) // share
        wanted, slot, own = wanted + 1, len(patterns) + place, module._modules.get(NAME)
        if isinstance(own, Indexer) and number in leaders and {"heads": own.heads, "width": own.width} == sizes:
            own.slot, own.leads = slot, share > 1
            continue
        _take(module)
        _check(module, config)
        if number in leaders:
            _give(module, config, slot, share > 1)
        else:
            module.add_module(NAME, SharedIndexer(leaders[place]))
        module.register_forward_pre_hook(_score, with_kwargs=True)
    if wanted < len(layers):
        raise ValueError(f"{config.model_type} has no attention modules that an indexer could stand before{_INSTEAD}")


def has_new_indexers(sparse: nn.Module, model: nn.Module) -> bool:
    """Has a sparse model indexers that the model does not have around whose weights it was made?"""
    known = {id(parameter) for parameter in model.parameters()}
    return any(isinstance(module, Indexer) and id(module.wq.weight) not in known for module in sparse.modules())


def _check_kinds(config: Any, layers: list[int]) -> None:
    """Raise ValueError where layers that are to share an indexer do not see by the same mask of the family."""
    types = getattr(config, "layer_types", None)
    kinds = dict.fromkeys(types[number] for number in layers) if types else ()
    if len(kinds) > 1:
        raise ValueError(
            f"layers {', '.join(map(str, layers))} are to share an indexer, and are of several kinds: {', '.join(kinds)}; give each its "
            "own, indexer={'share': 1}, or name with layers= which have one"
        )


_INSTEAD = "; use topk(...) without 'indexer', which needs none"


def _check(module: nn.Module, config: Any) -> None:
    names = _signature(type(module)).parameters
    if "hidden_states" not in names or not any(one.kind is one.VAR_KEYWORD for one in names.values()):
        raise ValueError(
            f"{type(module).__name__} of {config.model_type} takes no states, or hands its attention nothing, so that no indexer can stand "
            f"before it{_INSTEAD}"
        )
    if not getattr(module, "is_causal", False):
        raise ValueError(
            f"{config.model_type} is no decoder, and its layers see what comes: an indexer scores the past{_INSTEAD}"
        )


def _give(module: nn.Module, config: Any, slot: int, leads: bool) -> None:
    like = next(parameter for parameter in module.parameters())
    dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
    said = config.indexer
    made = Indexer(config.hidden_size, said["heads"], said["width"], slot).to(dtype)
    made.leads = leads
    module.add_module(NAME, made if like.is_meta else made.to(like.device))


def _take(module: nn.Module) -> None:
    if isinstance(module._modules.get(NAME), (Indexer, SharedIndexer)):
        del module._modules[NAME]
        for number, hook in list(module._forward_pre_hooks.items()):
            if hook is _score:
                del module._forward_pre_hooks[number]


def _score(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an attention module with the scores of its indexer among them."""
    refuse_graphs()
    given = _signature(type(module)).bind_partial(module, *args, **kwargs).arguments
    own, request = getattr(module, NAME), given.get("attention_mask")
    if isinstance(own, SharedIndexer):
        return args, {**kwargs, INDEXED: own(given["hidden_states"], request)}
    # families call it by several names
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    angles = given.get("position_embeddings")
    with torch.set_grad_enabled(learning() is not None and torch.is_grad_enabled()):
        # what a model learns otherwise passes no indexer
        angles = (
            None if angles is None else tuple(part.detach() if isinstance(part, Tensor) else part for part in angles)
        )
        scores = own(given["hidden_states"].detach(), angles, cache)
    if own.leads and isinstance(request, MaskRequest):
        if not torch.is_grad_enabled():
            # the group before is done; a backward pass may come back to it
            request.handed_on.clear()
        request.handed_on[vars(module)["layer_idx"]] = scores
    return args, {**kwargs, INDEXED: scores}


@cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)
