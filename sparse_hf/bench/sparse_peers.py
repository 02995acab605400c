"""Sparse attention of other packages, timed beside ours where it is installed.

They are timed only if their pairs are positions known before the call, so that they can be compared
with rows in float64. So these are missing: fla's MoBA and NSA without given blocks, which choose
pairs from queries and keys, and LSG's sparse tokens, some of which are means of several.
flash-sparse-attn 2.0.6 needs a part of Triton's repository that no index has.

Legend: q `[1, H, n, D]`, k and v `[1, G, n, D]`, out like q. What others take is `[1, n, H, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..pattern import BlockTable, Chunk, First, Pattern, causal
from ..pattern.forms import read_window
from ..plan import BlockPlan, build_plan
from .peers import Peer

# keys per block that NSA is given, as in arXiv:2502.11089, section 4.1; fewer if the pattern's own
# blocks are smaller
NSA_BLOCK = 64
# products of Triton have at least so many rows: query heads of one key head, keys of one block
LEAST_ROWS = 16
# every query has a list of its blocks for NSA: so many numbers are as large as the 16 heads of 64
# in bf16 that share it
MOST_BLOCKS = 512


def sparse_peers(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[list[Peer], dict[str, str]]:
    """Those that can run a call here, and of other installed ones why they cannot."""
    able: list[Peer] = []
    left_out: dict[str, str] = {}
    for name, (package, load, make) in PACKAGES.items():
        if util.find_spec(package) is None:
            continue
        try:
            module = load()
        # what a package of other times does with the torch, Triton or Transformers of today
        except (ImportError, AttributeError, NameError) as error:
            left_out[name] = f"does not import: {type(error).__name__}: {error}"
            continue
        made = (
            "takes blocks that are known before the call" if pattern.uses_content else make(name, module, pattern, q, k)
        )
        if isinstance(made, Peer):
            able.append(made)
        else:
            left_out[name] = made
    return able, left_out


def _gpu_only(q: Tensor) -> str | None:
    return None if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else "runs on a GPU, in bf16 or fp16"


def _nsa(name: str, module: ModuleType, pattern: Pattern, q: Tensor, k: Tensor) -> Peer | str:
    """The selected branch of fla's native sparse attention.

    Its blocks are those in which the pattern has a pair, up to the query.
    """
    group = q.shape[1] // k.shape[1]
    if group < LEAST_ROWS or group & (group - 1):
        return f"takes 16, 32, 64, ... query heads per key head, and there are {group}"
    rows = _blocks(pattern, q.shape[2])
    if isinstance(rows, str):
        return rows
    refusal = _gpu_only(q)
    if refusal is not None:
        return refusal
    indices, counts = _nsa_lists(rows, q.shape[2], k.shape[1], q.device)

    def call(q, k, v):
        given = {"block_indices": indices, "block_counts": counts, "block_size": rows.size}
        return module.parallel_nsa(*(t.transpose(1, 2) for t in (q, k, v)), **given).transpose(1, 2)

    return Peer(name, rows & causal(), call, "blocks")


def _blocks(pattern: Pattern, n: int) -> BlockTable | str:
    """The blocks in which a causal pattern has pairs.

    Of a pattern made of blocks of 16 or more they hold no others.
    """
    size = math.gcd(pattern.grain, NSA_BLOCK)
    plan = build_plan(pattern, n, block_size=size if size >= LEAST_ROWS else NSA_BLOCK)
    if plan.heads:
        return "takes one pattern for all heads"
    size, columns, offsets = plan.block_size, plan.columns.tolist(), plan.row_offsets.tolist()
    rows = [columns[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    if any(row and row[-1] > i for i, row in enumerate(rows)) or _looks_ahead(plan, size, n):
        return "is causal, and the pattern is not"
    if max(map(len, rows)) > MOST_BLOCKS:
        return f"would take {max(map(len, rows))} blocks for a query; more than {MOST_BLOCKS} are not tried"
    return BlockTable(size, tuple(map(tuple, rows)))


def _looks_ahead(plan: BlockPlan, size: int, n: int) -> bool:
    """Has a query a key after itself in its own block?"""
    query = torch.arange(n)[:, None]
    key = query + torch.arange(1, size)  # [n, size - 1]
    held = plan.allows(torch.zeros_like(query), 0, query, key.clamp(max=n - 1))
    return bool((held & (key < n)).any())


def _nsa_lists(table: BlockTable, n: int, kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Key blocks of each query `[1, n, G, S]`, and how many they are `[1, n, G]`.

    S is a power of two, and -1 stands behind the last.
    """
    most = max(map(len, table.rows))
    most = 1 << (most - 1).bit_length()
    lists = torch.tensor([[*row, *[-1] * (most - len(row))] for row in table.rows], dtype=torch.int32, device=device)
    of_query = torch.arange(n, device=device) // table.size
    indices = lists[of_query][None, :, None].expand(1, n, kv_heads, most).contiguous()
    return indices, (indices >= 0).sum(-1, dtype=torch.int32)


def _lsg(name: str, module: ModuleType, pattern: Pattern, q: Tensor, k: Tensor) -> Peer | str:
    """LSG's layer without its sparse tokens: the query's block and its neighbours.

    Blocks are as wide as the window is.
    """
    shape = read_window(pattern, q.shape[2])
    if isinstance(shape, str):
        return shape
    if q.shape[1] != k.shape[1]:
        return "has as many key heads as query heads"
    window = shape.window
    if window is None or window.left is None or window.right is None or shape.marked or shape.first > 1:
        return "takes a window and at most one first token"
    is_causal = window.right == 0
    size = -(-max(window.left, window.right, 1) // 16) * 16
    # its causal mask counts keys in the dtype of q: those of a block, or all of a text of no more
    # than two blocks
    counted = size if q.shape[2] > 2 * size else q.shape[2]
    if is_causal and counted > 2 / torch.finfo(q.dtype).eps:
        return f"counts to {counted} in {q.dtype} for its causal mask, which is wrong"
    held = Chunk(size, 1) & causal() if is_causal else Chunk(size, 1, 1)
    if shape.first:
        held |= First(1) & causal() if is_causal else First(1)
    options = {"compute_global_attention": bool(shape.first), "is_causal": is_causal, "attention_dropout_prob": 0.0}
    return Peer(name, held, module.LSGSelfAttention(block_size=size, **options), "blocks")


def _lsg_layer() -> ModuleType:
    """The file of the layer, which needs torch alone.

    The package does not import under Transformers 4.45 and later.
    """
    package = util.find_spec("lsg_converter")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "attention_layers" / "lsg_self_attention.py"
    spec = util.spec_from_file_location("lsg_self_attention", file)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Make = Callable[[str, ModuleType, Pattern, Tensor, Tensor], "Peer | str"]
# name of the row -> the package, what loads it, and what makes a peer of it or says why it cannot
PACKAGES: dict[str, tuple[str, Callable[[], ModuleType], Make]] = {
    "fla_nsa": ("fla", partial(import_module, "fla.ops.nsa"), _nsa),
    "lsg": ("lsg_converter", _lsg_layer, _lsg),
}
