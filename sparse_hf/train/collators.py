"""Collators that add `global_attention_mask`, the marks of `marked()`, to batches.

Each wraps any collator of Transformers (padding, masked language modelling, seq2seq) or another one
of these, whose marks it adds to. Marks are found before the inner collator runs, so that masking
tokens hides none:

    collator = MarkTokens(DataCollatorForLanguageModeling(tokenizer), [tokenizer.cls_token_id])

`marks(feature)` gives the marks of one feature, for `dataset.map` or for a plain loop.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .columns import Collator, Feature, as_features, padded_like, real_tokens, tokens

# columns that only we read, and that no collator of Transformers can pad
TEXT_COLUMNS = ("text", "offset_mapping")


@dataclass
class Marks:
    """What these collators share: marks of each feature, padded like the batch.

    Features may bring a `global_attention_mask` of their own, whose marks are kept. The result is
    what `inner` makes and `global_attention_mask`, `[B, L]` of 0 and 1.
    """

    inner: Collator

    def marks(self, feature: Feature) -> Tensor:
        """True on the tokens of one feature to mark, `[n]`."""
        raise NotImplementedError

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        features = as_features(features)
        found = [self.marks(feature) & real_tokens(feature) for feature in features]
        given = [feature.pop("global_attention_mask", None) for feature in features]
        found = [f if g is None else f | torch.as_tensor(g).bool() for f, g in zip(found, given, strict=True)]
        passed: list[Feature] = features
        if not isinstance(self.inner, Marks):
            passed = [{k: v for k, v in feature.items() if k not in TEXT_COLUMNS} for feature in features]
        batch = dict(self.inner(passed))
        mask = padded_like(batch, features, found)
        before = batch.get("global_attention_mask")
        batch["global_attention_mask"] = mask if before is None else mask | before.long()
        return batch


@dataclass
class MarkTokens(Marks):
    """Marks every token with one of these ids, as `[CLS]` or separators.

    Args:
        inner: the collator that pads and makes labels.
        token_ids: ids to mark.

    Raises:
        ValueError: no ids, or ids that are no numbers (a tokenizer without that special token gives
            None).

    Examples:
        >>> tokenizer = AutoTokenizer.from_pretrained("my-bert")
        >>> collator = MarkTokens(DataCollatorWithPadding(tokenizer), [tokenizer.cls_token_id])
        >>> collator([tokenizer("a whale")])["global_attention_mask"]
        tensor([[1, 0, 0, 0]])
    """

    token_ids: Sequence[int]

    def __post_init__(self):
        wrong = [i for i in self.token_ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if wrong or not self.token_ids:
            raise ValueError(
                f"token_ids is {list(self.token_ids)}; it must list ids of the vocabulary (does the tokenizer have that token?)"
            )

    def marks(self, feature: Feature) -> Tensor:
        ids = tokens(feature)
        return torch.isin(ids, torch.tensor(list(self.token_ids), dtype=ids.dtype))


@dataclass
class MarkQuestion(Marks):
    """Marks the question: every token before the first separator.

    The class token is marked too, as in Longformer (arXiv:2004.05150).

    Args:
        inner: the collator that pads and makes labels.
        separator_id: the token between question and text, `tokenizer.sep_token_id`.

    Raises:
        ValueError: no separator is named, or a row has none.

    Examples:
        >>> tokenizer = AutoTokenizer.from_pretrained("my-bert")
        >>> collator = MarkQuestion(DataCollatorWithPadding(tokenizer), tokenizer.sep_token_id)
        >>> collator([tokenizer("a whale", "the old ship")])["global_attention_mask"]
        tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    """

    separator_id: int

    def __post_init__(self):
        if isinstance(self.separator_id, bool) or not isinstance(self.separator_id, int):
            raise ValueError(f"separator_id is {self.separator_id!r}; it must be a token id, as tokenizer.sep_token_id")

    def marks(self, feature: Feature) -> Tensor:
        separators = tokens(feature) == self.separator_id
        if not separators.any():
            raise ValueError(
                f"a row has no separator ({self.separator_id}), so its question has no end; tokenize question and text as a "
                "pair, tokenizer(question, text)"
            )
        return separators.cumsum(0) == 0


@dataclass
class MarkHeaders(Marks):
    """Marks the tokens of section headers, by a regular expression.

    A token is marked if it shares a character with a match.

    The text and the offsets of each token in it are read from the columns `text` and
    `offset_mapping`, which a fast tokenizer gives with `return_offsets_mapping=True`; both come to
    the collator only with `remove_unused_columns=False`. Without them, the tokens are decoded with
    `tokenizer`, if decoding and tokenizing again gives the same tokens and keeps lines. In
    `dataset.map`, `{"global_attention_mask": headers.marks(example).long()}` makes a column that
    Trainer keeps.

    Args:
        inner: the collator that pads and makes labels.
        pattern: a regular expression, like `r"^(Article|Section) \\d+.*$"`; `^` and `$` are ends
            of lines.
        tokenizer: a fast tokenizer to decode with.

    Raises:
        ValueError: no expression, columns that are missing, or a tokenizer that text cannot be got
            back from.

    Examples:
        >>> tokenizer, text = AutoTokenizer.from_pretrained("my-bert"), "Article 1\\na party who pays"
        >>> collator = MarkHeaders(DataCollatorWithPadding(tokenizer), r"^Article \\d+$")
        >>> collator([{**tokenizer(text, return_offsets_mapping=True), "text": text}])["global_attention_mask"]
        tensor([[0, 1, 1, 0, 0, 0, 0, 0, 0]])
    """

    pattern: str
    tokenizer: PreTrainedTokenizerBase | None = None
    _regex: re.Pattern = field(init=False, repr=False)

    def __post_init__(self):
        try:
            self._regex = re.compile(self.pattern, re.MULTILINE)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from error

    def marks(self, feature: Feature) -> Tensor:
        if all(name in feature for name in TEXT_COLUMNS):
            text, offsets = feature["text"], torch.as_tensor(feature["offset_mapping"])
        else:
            text, offsets = self._decoded(feature)
        if offsets.shape != (len(tokens(feature)), 2):
            raise ValueError(
                f"offset_mapping has shape {tuple(offsets.shape)} for {len(tokens(feature))} tokens; want [n, 2]"
            )
        # matched characters up to each one, so that a token has some if the count grows over it
        inside = torch.zeros(len(text) + 1, dtype=torch.long)
        for match in self._regex.finditer(text):
            inside[match.start() + 1 : match.end() + 1] = 1
        count = inside.cumsum(0)
        return count[offsets[:, 1]] > count[offsets[:, 0]]

    def _decoded(self, feature: Feature) -> tuple[str, Tensor]:
        remedy = (
            "keep the columns `text` and `offset_mapping` (return_offsets_mapping=True), and with Trainer set "
            "remove_unused_columns=False"
        )
        if self.tokenizer is None:
            raise ValueError(
                f"features have {sorted(feature)}; to find headers, {remedy}, or pass a tokenizer to decode with"
            )
        if not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} is no fast tokenizer and gives no offsets; {remedy}")
        if "\n" not in self.tokenizer.decode(self.tokenizer("a\nb", add_special_tokens=False).input_ids):
            raise ValueError(f"this tokenizer drops line breaks, so headers cannot be found in decoded text; {remedy}")
        text, offsets, special = "", [], set(self.tokenizer.all_special_ids)
        # special tokens are no text: what stands between them begins a line
        for is_special, run in itertools.groupby(tokens(feature).tolist(), special.__contains__):
            ids = list(run)
            if is_special:
                offsets += [(0, 0)] * len(ids)
                continue
            decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            # one row of ids gives one text
            assert isinstance(decoded, str)
            again = self.tokenizer(decoded, add_special_tokens=False, return_offsets_mapping=True)
            if again.input_ids != ids:
                raise ValueError(f"decoding and tokenizing again gives other tokens for a text of {len(ids)}; {remedy}")
            offsets += [(start + len(text), end + len(text)) for start, end in again.offset_mapping]
            text += decoded + "\n"
        return text, torch.tensor(offsets, dtype=torch.long).reshape(-1, 2)
