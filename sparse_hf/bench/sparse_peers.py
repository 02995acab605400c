"""Sparse attention of other packages, timed beside ours where it is installed.

They are timed only if their pairs are known, so that they can be compared with rows in float64: by
position, as blocks that ours chose, or as blocks that they choose by a rule that ours has too, as
fla's MoBA does. So these are missing: fla's NSA without given blocks, whose scores are its own, and
LSG's sparse tokens, some of which are means of several. flash-sparse-attn 2.0.6 needs a part of
Triton's repository that no index has.

Legend: q `[1, H, n, D]`, k and v `[1, G, n, D]`, out like q. What others take is `[1, n, H, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..attention.composite.chosen import ChoicePlan
from ..attention.composite.chosen_tiles import ChosenTiles
from ..attention.dispatch import content_plan
from ..pattern import BlockTable, Chunk, First, Pattern, TopKBlocks, causal
from ..pattern.forms import read_content, read_window
from ..plan import BlockPlan, build_plan
from .exactness import plain_call
from .peers import Peer, leaves_out_future

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
        if pattern.uses_content:
            make = OF_CHOICES.get(name, _refuse_choices)
        made = make(name, module, pattern, q, k)
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
    rows = _nsa_refusal(q, k) or _blocks(pattern, q.shape[2])
    if isinstance(rows, str):
        return rows
    refusal = _gpu_only(q)
    if refusal is not None:
        return refusal
    lists = _nsa_lists(rows, q.shape[2], k.shape[1], q.device)
    return Peer(name, rows & causal(), _nsa_call(module, lists, rows.size), "blocks")


def _nsa_refusal(q: Tensor, k: Tensor) -> str | None:
    group = q.shape[1] // k.shape[1]
    if group < LEAST_ROWS or group & (group - 1):
        return f"takes 16, 32, 64, ... query heads per key head, and there are {group}"
    return None


def _nsa_call(module: ModuleType, lists: tuple[Tensor, Tensor], size: int) -> Callable[..., Tensor]:
    given = {"block_indices": lists[0], "block_counts": lists[1], "block_size": size}

    def call(q, k, v):
        return module.parallel_nsa(*(t.transpose(1, 2) for t in (q, k, v)), **given).transpose(1, 2)

    return call


def _chosen_nsa(name: str, module: ModuleType, pattern: Pattern, q: Tensor, k: Tensor) -> Peer | str:
    """The same on the very blocks that a pattern of ours has chosen, which takes no time here."""
    form = read_content(pattern)
    content = form.chosen[0].content
    if len(form.chosen) > 1 or not isinstance(content, TopKBlocks) or form.positions != First(0):
        return "takes topk_blocks(...) alone"
    refusal = _nsa_refusal(q, k)
    if refusal is not None:
        return refusal
    if not content.shares_heads:
        return "takes one choice for all query heads of a key head, per='group'"
    if not leaves_out_future(pattern) or pattern != content & causal():
        return "is causal, and the pattern is not, or is cut further"
    refusal = _gpu_only(q)
    if refusal is not None:
        return refusal
    with torch.no_grad():
        plan = content_plan(plain_call(q, k, k, pattern))
    blocks, size = _chosen_blocks(plan, content, q.shape[2])
    counts = (blocks >= 0).sum(-1, dtype=torch.int32)
    most = 1 << (blocks.shape[-1] - 1).bit_length()
    indices = torch.nn.functional.pad(blocks, (0, most - blocks.shape[-1]), value=-1).contiguous()
    return Peer(name, pattern, _nsa_call(module, (indices, counts), size), "blocks")


def _chosen_blocks(plan: Any, content: TopKBlocks, n: int) -> tuple[Tensor, int]:
    """The blocks of each query `[1, n, G, S]` int32, -1 behind the last, and their size: that of tiles, where there are tiles."""
    if isinstance(plan, ChoicePlan):
        last = plan.chosen.index.unflatten(-1, (-1, content.size)).amax(-1)  # [1, G, n, S]
        found, size = last.where(last < 0, last // content.size), content.size
    else:
        tiles = plan.chosen
        assert isinstance(tiles, ChosenTiles) and tiles.codes is not None
        size, lines = tiles.block_size, len(tiles.patterns) * tiles.q_blocks
        line, column = tiles.codes // tiles.kv_blocks, tiles.codes % tiles.kv_blocks
        counts = torch.bincount(line, minlength=lines)
        place = torch.arange(len(line), device=line.device) - (counts.cumsum(0) - counts)[line]
        found = torch.full((lines, int(counts.max())), -1, dtype=torch.int32, device=line.device)
        found[line, place] = column.int()
        found = found.unflatten(0, (1, -1, tiles.q_blocks)).repeat_interleave(size, 2)[:, :, :n]
    # those that there are come first
    there = found >= 0
    found = found.where(there, n).sort(-1).values
    return found.masked_fill(found == n, -1).int().transpose(1, 2), size


def _chosen_moba(name: str, module: ModuleType, pattern: Pattern, q: Tensor, k: Tensor) -> Peer | str:
    """fla's MoBA, which chooses by means of keys, as ours does, and rounds these to the dtype of keys."""
    form = read_content(pattern)
    content = form.chosen[0].content
    rule = ("mean", 1, False)
    if not isinstance(content, TopKBlocks) or (content.scores, content.queries, content.shares_heads) != rule:
        return "takes topk_blocks(count, size) alone, by means and for each head"
    if not leaves_out_future(pattern) or pattern != content & causal():
        return "is causal, and the pattern is not, or has more"
    if q.shape[1] != k.shape[1]:
        return "has as many key heads as query heads"
    if content.count < 2 or q.shape[2] <= content.size:
        return "is dense attention where nothing is chosen beside a query's own block"
    refusal = _gpu_only(q)
    if refusal is not None:
        return refusal
    n, given = q.shape[2], {"chunk_size": content.size, "topk": content.count}
    ends = torch.tensor([0, n], dtype=torch.int32, device=q.device)

    def call(q, k, v):
        tokens_first = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return module.parallel_moba(*tokens_first, cu_seqlens=ends, max_seqlen=n, **given).transpose(1, 2)

    return Peer(name, pattern, call, "blocks", chosen_by=partial(_rounded_means, size=content.size))


def _rounded_means(k: Tensor, size: int) -> Tensor:
    """Keys whose blocks have the means of those of `k`, rounded to its dtype."""
    means = torch.nn.functional.pad(k, (0, 0, 0, -k.shape[2] % size)).unflatten(2, (-1, size)).mean(3)
    return means.repeat_interleave(size, 2)[:, :, : k.shape[2]]


def _moba() -> ModuleType:
    """fla's MoBA, on the FlashAttention 2 that torch carries where flash-attn, which has no wheel, is not installed."""
    module = import_module("fla.ops.moba.parallel")
    if vars(module)["flash_attn_varlen_func"] is None:
        # the first is for texts of one block, which are not timed, but looked for in any call
        vars(module).update(
            flash_attn_varlen_func=_fa2_forward,
            _flash_attn_varlen_forward=_fa2_forward,
            _flash_attn_varlen_backward=_fa2_backward,
        )
    return module


def _fa2_forward(
    *, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, dropout_p
):  # fmt: skip
    """As flash-attn 2 has it, and `_fa2_backward` too: names and results are its own."""
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False, scale=softmax_scale
    )
    return out, lse, unused, state


def _fa2_backward(
    *, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
    causal, dropout_p, **_
):  # fmt: skip
    # random state of a dropout that there is none of
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    found = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, state,
        unused, scale=softmax_scale,
    )  # fmt: skip
    for to, grad in zip((dq, dk, dv), found, strict=True):
        to.copy_(grad)


def _refuse_choices(name: str, module: ModuleType, pattern: Pattern, q: Tensor, k: Tensor) -> str:
    return "takes pairs that are known by their positions"


def _refuse_positions(name: str, module: ModuleType, pattern: Pattern, q: Tensor, k: Tensor) -> str:
    return "chooses its blocks by content"


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
    "fla_moba": ("fla", _moba, _refuse_positions),
    "lsg": ("lsg_converter", _lsg_layer, _lsg),
}
# of patterns that choose blocks from queries and keys
OF_CHOICES: dict[str, Make] = {"fla_nsa": _chosen_nsa, "fla_moba": _chosen_moba}
