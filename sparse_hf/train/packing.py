"""Rows of several whole documents that do not see each other.

Positions start anew at each document, which is where sparse models see it begin: a packed row gives
what its documents give by themselves, with every pattern, sinks and marks included.

Legend: B rows, L tokens of the longest row.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ..models.hf.register import find_family
from .columns import Collator, as_features, padded_like

# columns with one value per token; what else a data set holds does not fit a row of several
# documents
TOKEN_COLUMNS = ("input_ids", "token_type_ids", "special_tokens_mask", "labels", "global_attention_mask")
# columns that our collator pads, since a tokenizer does not; the position of padding is that of a
# first token
PADDED_COLUMNS = ("position_ids", "global_attention_mask")
IGNORED = -100


def first_position(config: PreTrainedConfig) -> int:
    """The position of a document's first token.

    It is 0, but for families that begin behind the padding id (RoBERTa).
    """
    family = find_family(config.model_type)
    return config.pad_token_id + 1 if family is not None and family.positions.counted else 0


class Piece(NamedTuple):
    """Tokens `start` to `end` of a document."""

    document: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PackDocuments:
    """Tokenized documents -> rows of at most `length` tokens, for `dataset.map`.

    The data set may be streamed:

        pack, names = PackDocuments(4096), documents.column_names
        rows = documents.map(pack, batched=True, remove_columns=names)

    Documents of one batch of `map` go to the fullest row that has room for them, the longest first.
    One that is longer than `length` is cut into pieces of `length`, each a document of its own with
    positions from the beginning, so that later pieces do not see earlier ones. Columns other than
    `input_ids`, `token_type_ids`, `special_tokens_mask`, `labels` and `global_attention_mask` are
    left out; `position_ids` are added. Batches are made with `PackedCollator`.

    Args:
        length: tokens of a row.
        first_position: the position of a document's first token, see `first_position`.

    Raises:
        ValueError: a bad length, no `input_ids`, or columns that have no value for each token.

    Examples:
        >>> rows = PackDocuments(8)({"input_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13]]})
        >>> rows["input_ids"]
        [[5, 6, 7, 10, 11, 12, 13], [8, 9]]
        >>> rows["position_ids"]
        [[0, 1, 2, 0, 1, 2, 3], [0, 1]]
    """

    length: int
    first_position: int = 0

    def __post_init__(self):
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length is {self.length!r}; a row must have at least one token")

    def __call__(self, documents: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[list[int]]]:
        columns = self._columns(documents)
        sizes = [len(ids) for ids in documents["input_ids"]]
        pieces = [
            Piece(document, start, min(start + self.length, size))
            for document, size in enumerate(sizes)
            for start in range(0, size, self.length)
        ]
        packed: dict[str, list[list[int]]] = {name: [] for name in (*columns, "position_ids")}
        for row in _rows(pieces, self.length):
            for name, column in columns.items():
                packed[name].append([value for p in row for value in column[p.document][p.start : p.end]])
            packed["position_ids"].append([self.first_position + i for piece in row for i in range(piece.size)])
        return packed

    def _columns(self, documents: Mapping[str, Any]) -> dict[str, Sequence]:
        if "input_ids" not in documents:
            raise ValueError(
                f"the data set has {sorted(documents)}; tokenize it before packing, so that it has input_ids"
            )
        columns = {name: documents[name] for name in TOKEN_COLUMNS if name in documents}
        for name, column in columns.items():
            for values, ids in zip(column, documents["input_ids"], strict=True):
                found = len(values) if hasattr(values, "__len__") else 1
                if found != len(ids):
                    raise ValueError(
                        f"{name} has {found} values for a document of {len(ids)} tokens; rows of several documents have room "
                        "for one value per token only: remove the column"
                    )
        return columns


def _rows(pieces: list[Piece], length: int) -> list[list[Piece]]:
    """Best fit, the longest first; rows keep the order of the documents."""
    rows: list[list[Piece]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for piece in sorted(pieces, key=lambda p: -p.size):
        size = piece.size
        fullest = bisect.bisect_left(free, (size, -1))
        if fullest < len(free):
            left, row = free.pop(fullest)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > size:
            bisect.insort(free, (left - size, row))
    return sorted(sorted(row) for row in rows)


@dataclass
class PackedCollator:
    """Batches of packed rows: what `inner` makes of them, and `position_ids`.

    They are `[B, L]`, padded on the same side.

    Args:
        inner: the collator that pads and makes labels.
        causal: the model predicts the next token, so that the first token of each document must
            have no label: the last token of the one before would predict it.

    Raises:
        ValueError: rows without `position_ids`, whose documents would see each other.

    Examples:
        >>> pad = DataCollatorWithPadding(AutoTokenizer.from_pretrained("my-bert"))
        >>> rows = [{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [8], "position_ids": [0]}]
        >>> PackedCollator(pad)(rows)["position_ids"].tolist()
        [[0, 1, 0], [0, 0, 0]]
    """

    inner: Collator
    causal: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        features = as_features(features)
        if any("position_ids" not in feature for feature in features):
            raise ValueError(
                f"features have {sorted(features[0])}, but no position_ids, which keep documents apart; pack with PackDocuments. "
                "Trainer takes them out if the model's forward knows none: such a model cannot be trained on packed rows"
            )
        columns = {
            name: [torch.as_tensor(feature.pop(name)) for feature in features]
            for name in PADDED_COLUMNS
            if name in features[0]
        }
        batch = dict(self.inner(features))
        positions = columns["position_ids"]
        # a document begins where positions stop growing
        starts = [torch.cat([torch.ones(1, dtype=torch.bool), p[1:] <= p[:-1]]) for p in positions]
        for name, column in columns.items():
            fill = int(positions[0].min()) if name == "position_ids" else 0
            padded = padded_like(batch, features, column, fill)
            batch[name] = padded if batch.get(name) is None else padded | batch[name].long()
        if self.causal and "labels" in batch:
            first = padded_like(batch, features, [s.long() for s in starts]).bool()
            batch["labels"] = batch["labels"].masked_fill(first, IGNORED)
        return batch
