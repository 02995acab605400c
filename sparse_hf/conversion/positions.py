"""What becomes of positions when a model gets longer: tables grow, rotary angles are scaled if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.derived.tiny_config import tiny_config
from ..models.derived.tiny_model import apart
from ..models.hf.positions import Positions
from ..models.hf.register import Family
from .shards import DTYPES, Stored
from .weights import Change

# rows, columns of a table: L old length, N new length, D width


def tile(rows: Tensor, length: int) -> Tensor:
    """`[L, D]` -> `[N, D]` by tiled copy: row i is row i modulo L.

    Tiling keeps the local order that heads have learned, which interpolation would blur (Longformer, arXiv:2004.05150,
    section 5).
    """
    repeats = -(-length // rows.shape[0])
    return rows.repeat(repeats, *[1] * (rows.ndim - 1))[:length]


def interpolate(rows: Tensor, length: int) -> Tensor:
    """`[L, D]` -> `[N, D]` along straight lines between neighbours; the first and the last row stay what they are."""
    # whole numbers, because positions in single precision would be off by a hundredth of a row at 100,000 rows
    steps = torch.arange(length) * (rows.shape[0] - 1)
    low = steps // max(length - 1, 1)
    share = (steps - low * (length - 1)).to(torch.float32) / max(length - 1, 1)  # [N]
    old = rows.to(torch.float32)
    return torch.lerp(old[low], old[(low + 1).clamp(max=len(old) - 1)], share[:, None]).to(rows.dtype)


def sinusoidal(rows: Tensor, length: int) -> Tensor:
    """`[L, D]` -> `[N, D]` computed as Pegasus does: sines in the first half of each row, cosines in the second."""
    width = rows.shape[1]
    frequencies = 10000.0 ** (-2 * torch.arange((width + 1) // 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # [N, (D + 1) / 2]
    return torch.cat([angles.sin().to(rows.dtype), angles[:, : width // 2].cos().to(rows.dtype)], dim=1)


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"tile": tile, "interpolate": interpolate}
# `rope_type` of Transformers -> does it want to know the old length
ROPES = {"linear": False, "yarn": True}


def check_choice(positions: str, rope: str | None, max_length: int | None) -> None:
    """Refuse what no checkpoint can be converted with."""
    if positions not in METHODS:
        raise ValueError(f"positions is {positions!r}; it must be one of {', '.join(METHODS)}")
    if rope is not None and rope not in ROPES:
        raise ValueError(f"rope is {rope!r}; it must be one of {', '.join(ROPES)}, or None to leave the angles alone")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length is {max_length!r}; it must be a number of tokens")


def set_length(config, positions: Positions, max_length: int | None) -> tuple[int | None, int | None]:
    """Write the new length into a configuration; returns the old one and the new one, in tokens."""
    old = positions.length_of(config)
    if max_length is None or old is None:
        return old, old
    if max_length < old:
        raise ValueError(
            f"max_length is {max_length}; the checkpoint has {old} positions, and cutting them off loses weights"
        )
    # GPT-2 calls it n_positions, which `attribute_map` knows
    setattr(config, positions.limit, max_length + (positions.offset if positions.counted else 0))
    return old, max_length


def check_growth(positions: Positions, model: PreTrainedModel, max_length: int | None) -> None:
    """Refuse a greater length where nothing of what was found of a family's positions says how they grow.

    Args:
        model: the dense model, without weights.

    Raises:
        ValueError: a table of which nobody knows the rows, or whose content is computed in another way than ours.
    """
    old = positions.length_of(model.config)
    if max_length is None or max_length == old or not positions.has_table:
        return
    kind = type(model).__name__
    if old is None or not positions.grows or (positions.scheme == "learned" and not positions.tables):
        raise ValueError(
            f"max_length is {max_length}, and the positions of {kind} were not found to be a table of tokens in a row that could "
            "grow: leave max_length out"
        )
    if positions.scheme == "sinusoidal" and positions.tables and not _computes_alike(positions, model):
        raise ValueError(
            f"max_length is {max_length}, and the sinusoidal table of {kind} is not computed as Pegasus computes it: leave "
            "max_length out"
        )


def _computes_alike(positions: Positions, model: PreTrainedModel) -> bool:
    """Does a dense class fill its table as `sinusoidal` does? Seen on a tiny copy."""
    with apart():
        tiny = type(model)(tiny_config(model.config))
    tables = [table for name, table in tiny.state_dict().items() if name.endswith(positions.tables)]
    rows = [table[positions.offset :] for table in tables]
    return all(torch.allclose(table, sinusoidal(table, len(table)), atol=1e-4) for table in rows)


def scale_rope(config, family: Family, rope: str | None, old: int | None, new: int | None) -> None:
    """Write `rope_parameters` that spread the old angles over the new length."""
    if rope is None:
        return
    if family.positions.scheme != "rotary":
        raise ValueError(
            f"rope is {rope!r}; {family.dense_type} has {family.positions.scheme} positions, which have no angles to "
            "scale: leave rope out"
        )
    if new is None or old is None or new <= old:
        raise ValueError(
            f"rope is {rope!r}, and nothing gets longer; give a max_length beyond the model's {old} tokens"
        )
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if not parameters or any(isinstance(p, dict) for p in parameters.values()) and "full_attention" not in parameters:
        raise ValueError(
            f"rope is {rope!r}, and the configuration of {family.dense_type} has no rope_parameters that could be scaled as a whole: "
            "leave rope out"
        )
    if "full_attention" in parameters:
        # layers that slide over a window see no new distances
        parameters["full_attention"] = _scaled(parameters["full_attention"], rope, old, new)
    else:
        parameters = _scaled(parameters, rope, old, new)
    if hasattr(config, "original_max_position_embeddings"):
        # Phi-3 keeps it outside as well, and that one wins
        config.original_max_position_embeddings = old
    config.rope_parameters = parameters
    try:
        config.validate_rope()
    except ValueError as error:
        # Phi-3 knows a scaling of its own only
        raise ValueError(
            f"rope is {rope!r}, which {family.dense_type} does not take ({error}); leave rope out"
        ) from error


def _scaled(parameters: dict, rope: str, old: int, new: int) -> dict:
    current = parameters.get("rope_type", "default")
    if current != "default":
        raise ValueError(
            f"rope is {rope!r}; the checkpoint's angles are scaled already (rope_type {current!r}): leave rope out, which "
            "only raises the limit"
        )
    original = {"original_max_position_embeddings": old} if ROPES[rope] else {}
    return {**parameters, "rope_type": rope, "factor": new / old, **original}


def changes(
    tensors: Iterable[Stored], positions: Positions, old: int | None, new: int | None, method: str
) -> dict[str, Change]:
    """The tensors that grow from `old` to `new` tokens, by name.

    Raises:
        ValueError: learned positions are in no table that grows (Reformer's axial ones, those of images).
    """
    found: dict[str, Change] = {}
    if old is None or new is None or old == new:
        return found
    stretch = sinusoidal if positions.scheme == "sinusoidal" else METHODS[method]
    for tensor in tensors:
        if positions.tables and tensor.name.endswith(positions.tables):
            shape = (positions.offset + new, *tensor.shape[1:])
            found[tensor.name] = Change(shape, partial(_grown_table, stretch, positions.offset, new))
        elif positions.buffers and tensor.name.endswith(positions.buffers):
            shape = (*tensor.shape[:-1], tensor.shape[-1] + new - old)
            found[tensor.name] = Change(shape, partial(_grown_buffer, tensor.name, shape, DTYPES[tensor.dtype]))
    if positions.scheme == "learned" and not any(name.endswith(positions.tables) for name in found):
        raise ValueError(
            f"max_length is {new} and the model has {old} positions, but no table of positions that could grow: those of "
            "axial shapes and of images stay as they are; leave max_length out"
        )
    return found


def _grown_table(stretch: Callable[[Tensor, int], Tensor], offset: int, length: int, table: Tensor) -> Tensor:
    # the first `offset` rows are no positions
    rows = stretch(table[offset:], length)
    return torch.cat([table[:offset], rows]) if offset else rows


def _grown_buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, _old: Tensor) -> Tensor:
    """Saved by old versions: consecutive numbers, or zeros."""
    fresh = torch.arange(shape[-1]) if name.endswith("position_ids") else torch.zeros(shape[-1], dtype=torch.long)
    return fresh.to(dtype).expand(shape)
