"""`Tokens`: what one batch says of its tokens, read once per forward pass for all layers of Longformer and LED.

Legend: B batch, N tokens, M most marked tokens of any batch row, T marked tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import BatchInfo, of_batch
from ..hf.documents import number_documents
from ..hf.text_parts import TextPart

# what Transformers' first Longformer wrote into `attention_mask` for a global token
GLOBAL = 2


@dataclass(frozen=True, eq=False)
class MarkedRows:
    """Where the marked tokens stand, and what they see; absent in a graph, which cannot read values.

    A batch row with fewer marked tokens than M is filled up with others of its own, whose rows nobody writes.
    """

    index: Tensor  # [B * M] int64: tokens in the B * N of all rows
    marked: Tensor  # [T] int64: those that are marked
    slots: Tensor | None  # [T] int64: where they stand in `index`; None if each row has M of them
    seen: Tensor | None  # [B, 1 or M, N] bool: the keys that each sees; None if all do
    hidden: Tensor | None  # the opposite of `seen`

    def to(self, device: torch.device) -> MarkedRows:
        index, marked = self.index.to(device), self.marked.to(device)
        optional = (None if t is None else t.to(device) for t in (self.slots, self.seen, self.hidden))
        return MarkedRows(index, marked, *optional)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a batch says of its tokens, in the form that plans want and in the form that marked rows want.

    `batch` holds padding, packed documents and marks of real tokens, each None where there is nothing to say.
    """

    batch: BatchInfo
    order: Tensor | None = None  # [B, N] int64: indices of marked tokens, then of other real ones, then of padding
    rows: MarkedRows | None = None
    part: TextPart | None = None  # of a text that several processes hold

    @property
    def real(self) -> Tensor | None:
        """`[B, N]` bool."""
        return self.batch.padding

    @property
    def marks(self) -> Tensor | None:
        """`[B, N]` bool."""
        return self.batch.marks

    def halves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Which tokens are marked, `[B, N, 1]` bool, and 1 in the half of rows that each token is of, `[B, N, 2, 1]`: all, or marked."""
        own = "halves", dtype
        if own not in self.batch.memo:
            assert self.marks is not None
            marks = self.marks[..., None]
            self.batch.remember(own, (marks, torch.cat((~marks, marks), dim=2).to(dtype)[..., None]))
        return self.batch.memo[own]

    def to(self, device: torch.device | str | int) -> Tokens:
        """On a device; layers that are spread over several share what was moved."""
        device = torch.empty(0, device=device).device
        given = next((t for t in self.batch.tensors if t is not None), None)
        if given is None or given.device == device:
            return self
        if device not in self.batch.memo:
            batch = of_batch(*(None if t is None else t.to(device) for t in self.batch.tensors))
            order = None if self.order is None else self.order.to(device)
            moved = Tokens(batch, order, None if self.rows is None else self.rows.to(device))
            self.batch.remember(device, moved)
        return self.batch.memo[device]

    def sorted(self) -> Tokens:
        """The same tokens in `order`."""
        assert self.order is not None and self.marks is not None
        real = None if self.real is None else self.real.gather(1, self.order)
        return Tokens(of_batch(real, None, self.marks.gather(1, self.order)))


def read_tokens(
    states: Tensor,
    attention_mask: Tensor | None,
    global_attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
) -> Tokens:
    """Read the masks of a forward pass.

    Args:
        states: `[B, N, ...]`, for its sizes.
        attention_mask: `[B, N]`: 0 on padding, 1 on real tokens, 2 on those that are global too.
        global_attention_mask: `[B, N]`: 1 on global tokens.
        position_ids: `[B or 1, N]`: a packed document begins where they stop growing.

    Raises:
        ValueError: a mask of another shape, or with other values.
    """
    mask = _checked("attention_mask", attention_mask, states)
    marks = _checked("global_attention_mask", global_attention_mask, states)
    real = None if mask is None else mask > 0 if mask.dtype != torch.bool else mask
    marks = None if marks is None else marks.bool()
    older = None if mask is None or mask.dtype == torch.bool else mask == GLOBAL
    documents = None if position_ids is None else number_documents(position_ids, real).expand(states.shape[:2])
    if torch.compiler.is_compiling():
        if older is not None and marks is None:
            said = "attention_mask holds 2; under torch.compile pass global_attention_mask"
            torch.ops.aten._assert_async.msg(~older.any(), said)
        marks = marks if marks is None or older is None else marks | older
        return _in_graph(real, marks, documents)
    if older is not None:
        marks = older if marks is None else marks | older
    return _read(real, marks if marks is None or real is None else marks & real, documents, mask)


def _checked(name: str, mask: Tensor | None, states: Tensor) -> Tensor | None:
    if mask is None:
        return None
    shape = tuple(states.shape[:2])
    if tuple(mask.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; it must be [batch, tokens], {shape}, prompts and other embeddings in front of "
            "the text included"
        )
    return mask.to(states.device).expand(shape)


def _in_graph(real: Tensor | None, marks: Tensor | None, documents: Tensor | None) -> Tokens:
    if marks is None:
        return Tokens(of_batch(real, documents, None))
    marks = marks if real is None else marks & real
    return Tokens(of_batch(real, documents, marks), _order(real, marks))


def _read(real: Tensor | None, marks: Tensor | None, documents: Tensor | None, mask: Tensor | None) -> Tokens:
    asked: dict[str, Tensor] = {}
    if mask is not None and real is not None:
        asked |= dict(zip(("lowest", "highest"), (t.long() for t in mask.aminmax()), strict=True))
        asked["is_all_real"] = real.all().long()
    if marks is not None:
        asked |= dict(zip(("least", "most"), marks.sum(1).aminmax(), strict=True))
    if documents is not None:
        asked["last_document"] = documents.max()
    # the host waits for a GPU once, not number by number
    found = dict(zip(asked, torch.stack(list(asked.values())).tolist(), strict=True)) if asked else {}
    for value in (found.get("lowest", 0), found.get("highest", 0)):
        if not 0 <= value <= GLOBAL:
            raise ValueError(f"attention_mask holds {value}; it takes 0 (padding), 1 and {GLOBAL} (a global token)")
    real = None if found.get("is_all_real") else real
    documents = documents if found.get("last_document") else None
    if marks is None or not found["most"]:
        return Tokens(of_batch(real, documents, None))
    order = _order(real, marks)
    rows = _rows(real, marks, documents, order[:, : found["most"]], found["least"] == found["most"])
    return Tokens(of_batch(real, documents, marks), order, rows)


def _order(real: Tensor | None, marks: Tensor) -> Tensor:
    rank = marks.int() if real is None else marks.int() + real
    return rank.argsort(dim=1, descending=True, stable=True)


def _rows(real: Tensor | None, marks: Tensor, documents: Tensor | None, index: Tensor, are_alike: bool) -> MarkedRows:
    batch, length = marks.shape
    flat = (index + length * torch.arange(batch, device=index.device)[:, None]).flatten()
    slots = None if are_alike else marks.gather(1, index).flatten().nonzero().flatten()
    marked = flat if slots is None else flat[slots]
    seen = None if real is None else real[:, None]
    if documents is not None:
        own = documents.gather(1, index)[:, :, None] == documents[:, None]
        seen = own if seen is None else own & seen
    if seen is None:
        return MarkedRows(flat, marked, slots, None, None)
    # a row of padding sees all: it must give no NaN, and nobody writes it
    seen = seen | ~seen.any(-1, keepdim=True)
    return MarkedRows(flat, marked, slots, seen, ~seen)
