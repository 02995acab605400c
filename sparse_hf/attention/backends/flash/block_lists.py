"""Plans that are no window, on flash-attn-4's block-sparse kernels.

The kernels walk lists of 128 x 128 blocks: for each query block its key blocks, in the backward pass for each key block its query
blocks. Such a line may have many more blocks than others (global tokens): what is beyond a limit becomes lines of its own, whose
tokens are repeated after the end of the text, and whose results are then merged into those of the tokens they repeat.

Legend: B batch, H query heads, G key heads, Q queries, K keys, D head dim, S places of a block (128); inside, heads stand after
tokens: `[B, Q, H, D]`. R lines of a group, those of segments included; L long lines, N their segments at most; W widest list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ....plan import BlockPlan, remembered
from ....plan.tile_lists import Lists, tile_lists
from ...backend import AttentionCall, Given, Gradients, Results
from ...devices import generation
from ...strides import as_tokens_first
from . import window_kernels as flash

SIZE = 128
# blocks of a plan, over all its batch rows and patterns; tables take some tens of bytes for each
MAX_BLOCKS = 1 << 21
# share of blocks without a mask, and numbers in q, from which the kernels overtake `triton`: masks are looked up pair by pair
MIN_FULL_SHARE, MIN_ELEMENTS = 7 / 8, 1 << 26
# factors that are tried before a line gets more slots
FACTOR_TRIES = 16


def why_not(q: Tensor, plan: BlockPlan) -> str | None:
    """Why these kernels cannot run the call, besides what `fa` refuses anyway."""
    reason = flash.FA4.refuses(q)
    if reason or flash.kernels(q) is not flash.FA4:
        return reason or "lists of blocks need the kernels 'fa4'"
    if generation(q.device) != 9:
        return f"lists of blocks are for compute capability 9, and {torch.cuda.get_device_name(q.device)} has another"
    if q.shape[-1] > 128:
        return f"lists of blocks are for head dims up to 128, and that of q is {q.shape[-1]}"
    if torch.are_deterministic_algorithms_enabled():
        return "flash-attn-4 adds up the gradients of blocks in no fixed order on this GPU"
    if not plan.q_len or not plan.kv_len:
        return "there are no queries or no keys"
    if len(plan.columns) * max(1, plan.block_size // SIZE) ** 2 > MAX_BLOCKS:
        return f"the plan lists {len(plan.columns)} blocks of {plan.block_size}; up to {MAX_BLOCKS} of {SIZE} are taken"
    return None


def are_fastest(q: Tensor, plan: BlockPlan) -> bool:
    """Are these kernels faster than `triton`? Measured on an H200: with wide heads, on long texts and where few blocks need masks."""
    return q.shape[-1] > 64 and q.numel() > MIN_ELEMENTS and _share_of_full(plan) > MIN_FULL_SHARE


@remembered
def _share_of_full(plan: BlockPlan) -> float:
    return float(plan.full.float().mean()) if plan.block_size == SIZE and len(plan.full) else 0.0


def kernels() -> ModuleType:
    """`forward` and `backward` of block lists. CuTe is imported when it is first needed."""
    from . import block_list_kernels

    flash.quiet_fa4()
    return block_list_kernels


def forward(call: AttentionCall) -> Results:
    """Out `[B, H, Q, D]` and lse `[B, H, Q]` in float32."""
    plan = call.blocks
    walk = _walk(plan, True, *call.q.shape[:2])
    q, k, v = (as_tokens_first(t) for t in (call.q, call.k, call.v))
    out, lse = kernels().forward(walk.lengthened(q), k, v, walk, call.scoring.scale)
    out, lse = walk.merged(out, lse)
    return out[:, : plan.q_len].transpose(1, 2), lse[..., : plan.q_len].contiguous()


def backward(call: AttentionCall, given: Given) -> Gradients:
    """Gradients of q, k, v and no bias."""
    plan, lse, grad_lse = call.blocks, given.lse, given.grad_lse
    walk = _walk(plan, False, *call.q.shape[:2])
    q, k, v, out, grad_out = (as_tokens_first(t) for t in (call.q, call.k, call.v, given.out, given.some_grad_out))
    seen = lse > -torch.inf
    if grad_lse is not None:
        grad_lse = grad_lse.where(seen, 0).contiguous()
    # a row that sees nothing has weights exp(score - inf) = 0
    own = Given(out, lse.where(seen, torch.inf).contiguous(), grad_out, grad_lse)
    grad_q, *of_keys = kernels().backward(q, walk.lengthened(k), walk.lengthened(v), own, walk, call.scoring.scale)
    grad_k, grad_v = (walk.summed(g)[:, : plan.kv_len].transpose(1, 2) for g in of_keys)
    return grad_q.transpose(1, 2), grad_k, grad_v, None


@dataclass(frozen=True, eq=False)
class Walk:
    """What the kernels walk in one direction.

    Lists are the number of blocks with a mask of each line, which blocks they are (ascending), and the same of full blocks. A group
    is a pattern of a batch row.

    Which mask a block has is looked up by line and other block, without a table of all pairs. A line has two numbers in `lines`: a
    factor, and `begin << 5 | shift`. Block j of it has the slot `begin + (j * factor >> shift)`, in 32 bits without sign; those of
    its blocks differ. There `starts` has where the mask begins in `words`, and query x of the block sees key y if bit `y % 32` of the
    word `4 * x + y // 32` from there on is set.
    """

    # int32: [B, H or 1, R], [B, H or 1, R, W], and again
    lists: tuple[Tensor, Tensor, Tensor, Tensor]
    # int32: (H, R); the group of each head of a batch row, [B * H]; lines, [groups * R * 2]; starts; words
    masks: list[Tensor]
    # tokens after the last that make it whole blocks, then those of each segment; None without segments
    repeated: Tensor | None
    tiles: Tensor  # [L]: the long lines
    parts: Tensor  # [L, 1 + N]: such a line and its segments, all as lines
    exists: Tensor  # [L, 1 + N]: false beyond their number

    def lengthened(self, t: Tensor) -> Tensor:
        """`[B, length, heads, D]` with the tokens of segments."""
        return t if self.repeated is None else torch.cat((t, t.index_select(1, self.repeated)), 1)

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the segments of long lines in place: `out` and `lse` `[B, H, length]` are of a lengthened q."""
        if self.repeated is None:
            return out, lse
        lines, lse_lines = out.unflatten(1, (-1, SIZE)), lse.unflatten(2, (-1, SIZE))
        lses = lse_lines[:, :, self.parts].masked_fill(~self.exists[..., None], -torch.inf)  # [B, H, L, 1 + N, S]
        total = lses.logsumexp(3)
        weights = (lses - total.where(total > -torch.inf, 0)[:, :, :, None]).exp()
        weights = weights.permute(0, 2, 3, 4, 1)[..., None]  # [B, L, 1 + N, S, H, 1]
        lines[:, self.tiles] = (lines[:, self.parts] * weights).sum(2).to(out.dtype)
        lse_lines[:, :, self.tiles] = total
        return out, lse

    def summed(self, grad: Tensor) -> Tensor:
        """Add the segments of long lines to these in place: `grad` is of a lengthened k or v."""
        if self.repeated is not None:
            lines = grad.unflatten(1, (-1, SIZE))
            work = torch.promote_types(grad.dtype, torch.float32)
            counted = self.exists[:, :, None, None, None].to(work)
            lines[:, self.tiles] = (lines[:, self.parts] * counted).sum(2).to(grad.dtype)
        return grad


@remembered
def _walk(plan: BlockPlan, by_query: bool, batch: int, num_heads: int) -> Walk:
    found = tile_lists(plan, SIZE, batch, num_heads)
    sides = (found.by_query, plan.q_len), (found.by_key, plan.kv_len)
    (lists, length), (other, _) = sides if by_query else sides[::-1]
    return _made(plan, _on_cpu(lists), other.lines, length, batch, num_heads, (found.group_of, _words(found.masks)))


def _on_cpu(lists: Lists) -> Lists:
    """The small tables of which others are made in many small steps."""
    named = ("offsets", "masked", "others", "masks", "segments", "long")
    return replace(lists, **{name: getattr(lists, name).long().cpu() for name in named})


def _made(
    plan: BlockPlan, lists: Lists, others: int, length: int, batch: int, num_heads: int, shared: tuple[Tensor, Tensor]
) -> Walk:
    groups = plan.batch_rows * len(plan.patterns)
    # each line as a tile and the number of a segment: whole tiles, then what is cut off them
    tile = torch.cat((torch.arange(lists.lines), lists.segments[:, 0]))
    done = torch.cat((torch.zeros(lists.lines, dtype=torch.long), lists.segments[:, 1])) * lists.limit
    counts, masked = (t.view(groups, lists.lines)[:, tile] - done for t in (lists.offsets.diff(), lists.masked))
    counts = counts.clamp(0, lists.limit)  # [groups, R]
    masked = masked.clamp(min=0).minimum(counts)
    begin = lists.offsets[:-1].view(groups, lists.lines)[:, tile] + done
    partial, entry = _table(lists.others, begin, masked)
    full, _ = _table(lists.others, begin + masked, counts - masked)
    line = torch.arange(begin.numel()).repeat_interleave(masked.flatten())
    starts = lists.masks[entry] * (SIZE * SIZE // 32)
    lines, starts = _hashed(line, lists.others[entry], starts, begin.numel(), others)
    sizes = torch.tensor((num_heads, len(tile)))
    heads = list(plan.heads) or [0]
    sizes, lines, starts = (t.int().to(plan.device) for t in (sizes, lines, starts))

    def listed(t: Tensor) -> Tensor:
        t = t.unflatten(0, (plan.batch_rows, -1))[:, heads]
        # kernels are compiled apart for dimensions without a stride: batch rows always have one
        return t.expand(batch, *t.shape[1:]).int().contiguous().to(plan.device)

    repeated, tiles, segments, exists = _long(lists, length)
    return Walk(
        (listed(masked), listed(partial), listed(counts - masked), listed(full)),
        [sizes, shared[0], lines, starts, shared[1]],
        None if repeated is None else repeated.to(plan.device),
        tiles.to(plan.device),
        segments.to(plan.device),
        exists.to(plan.device),
    )


def _table(others: Tensor, begin: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Entries `begin .. begin + counts` of each line side by side, `[groups, R, W]`, and where each of them was."""
    place = torch.arange(max(1, int(counts.max())))
    exists = place < counts[..., None]
    entry = (begin[..., None] + place)[exists]
    table = torch.zeros(exists.shape, dtype=torch.long)
    table[exists] = others[entry]
    return table, entry


def _long(lists: Lists, length: int) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """`repeated`, `tiles`, `parts` and `exists` of a `Walk`."""
    tiles, first, more = lists.long.unbind(1)
    place = torch.arange(int(more.max()) if len(more) else 0)
    exists = torch.nn.functional.pad(place < more[:, None], (1, 0), value=True)
    parts = torch.cat((tiles[:, None], lists.lines + first[:, None] + place), 1).where(exists, tiles[:, None])
    if not len(tiles):
        return None, tiles, parts, exists
    ragged = torch.full((-length % SIZE,), length - 1)
    tokens = (lists.segments[:, :1] * SIZE + torch.arange(SIZE)).clamp(max=length - 1)
    return torch.cat((ragged, tokens.flatten())), tiles, parts, exists


def _hashed(line: Tensor, other: Tensor, value: Tensor, lines: int, others: int) -> tuple[Tensor, Tensor]:
    """`lines` and `starts` of `Walk.masks`, of entries: each the line, the other block and what to find for them.

    The first factor tried moves a number's last bits up to where they are read: with enough of them that always does.
    """
    counts = line.bincount(minlength=lines)
    enough = max(1, (others - 1).bit_length())
    bits = (counts.square() / 8).clamp(min=2).log2().ceil().long().clamp(max=enough)
    factors, mine, into = 1 << 32 - bits, line, other
    drawn = torch.randint(1 << 32, (FACTOR_TRIES,), generator=torch.Generator().manual_seed(0)) | 1
    while len(mine):
        for factor in (0, *drawn.tolist()):
            factors[mine] = factor or 1 << 32 - bits[mine]
            place = ((mine << 32) + _slot(into, factors[mine], bits[mine])).sort().values
            crowded = torch.zeros(lines, dtype=torch.bool)
            crowded[place[1:][place.diff() == 0] >> 32] = True
            mine, into = mine[crowded[mine]], into[crowded[mine]]
        bits[crowded] += 1
    sizes = 1 << bits
    begin = sizes.cumsum(0) - sizes
    starts = torch.zeros(int(sizes.sum()), dtype=torch.long)
    assert len(starts) < 1 << 27, "too many slots for their numbers to share an int32 with a shift"
    starts[begin[line] + _slot(other, factors[line], bits[line])] = value
    return _as_int32(torch.stack((factors, begin << 5 | 32 - bits), 1).flatten()), starts


def _slot(other: Tensor, factor: Tensor, bits: Tensor) -> Tensor:
    return (other * factor & 0xFFFFFFFF) >> 32 - bits


def _as_int32(unsigned: Tensor) -> Tensor:
    """Numbers below 2^32 as int32 of the same bits."""
    return ((unsigned ^ 1 << 31) - (1 << 31)).int()


def _words(masks: Tensor) -> Tensor:
    """`[M, S, S]` of 0 and 1, uint8, as bits of int32."""
    flags = masks.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8, device=masks.device)
    return flags.sum(-1, dtype=torch.uint8).view(torch.int32)
