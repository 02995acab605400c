"""Checks of what a batch may hold: ids of the vocabulary, labels of the head, positions of the table.

They come before torch fails over it. Values are read on the CPU only, since to read a GPU's is to wait for it: those are
checked before the batch leaves the CPU, by `sparse_hf.train.CheckedCollator`.

Rotary positions end nowhere, and Transformers lets them go on beyond `max_position_embeddings`. So does `forward` here, with one
warning; to train there unasked would be a mistake, so that the collator refuses such rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers.utils import logging

from .cache import given_cache

logger = logging.get_logger(__name__)

IGNORED = -100
# what a head's name ends with -> the configuration's number of answers
ANSWERS = {
    ("ForTokenClassification", "ForSequenceClassification"): "num_labels",
    ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"): "vocab_size",
}


def refuse_tracing() -> None:
    """Raise NotImplementedError while torch.jit.trace or an exporter by tracing runs a model."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage] - documented there
        raise NotImplementedError(
            "torch.jit.trace would keep the mask of the example for every later text; use torch.compile or torch.export "
            "(torch.onnx.export with dynamo=True)"
        )


@dataclass(frozen=True)
class Limits:
    """What a model can take: its configuration, the name of its class, and the ids that it has embeddings for."""

    config: Any
    head: str
    vocabulary: int | None

    @classmethod
    def of(cls, model) -> Limits:
        # if embeddings are resized, the configuration of a stack inside a model does not say so
        scheme = model.config.positions
        embeddings = None if scheme is None or scheme.checked_by_model else _embeddings(model)
        return cls(model.config, type(model).__name__, getattr(embeddings, "num_embeddings", None))

    def check(self, batch: Mapping[str, Any], beyond: bool = True) -> None:
        """Refuse what the model cannot take.

        Args:
            batch: arguments of `forward`.
            beyond: let rotary models go on beyond what they are configured for, with a warning.

        Raises:
            ValueError: ids, labels or positions out of range, or rows longer than the table of positions.
        """
        _check_labels(self.config, self.head, batch.get("labels"))
        if self.vocabulary is not None:
            for name in ("input_ids", "decoder_input_ids"):
                check_ids(self.vocabulary, batch.get(name), name)
        _check_types(self.config, self.vocabulary, batch.get("token_type_ids"))
        scheme = self.config.positions
        if scheme is not None and scheme.has_table and not scheme.checked_by_model:
            _check_positions(self.config, batch)
            _check_target(self.config, self.head, batch)
        elif scheme is not None and scheme.scheme == "rotary":
            _check_rotary(self.config, batch, beyond)


def _embeddings(model) -> Any:
    """The embeddings of tokens; None of a model that takes none, of images or sounds."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def check_no_positions(config: Any, head: str) -> None:
    """Refuse `position_ids` for a class whose forward has none: its tokens would stay where they are in the row.

    Of relative positions (T5's encoder) nothing stays, and documents are kept apart.

    Raises:
        ValueError: positions that a table would not follow, or of an encoder-decoder, whose two texts they would both be.
    """
    scheme = config.positions
    if config.is_encoder_decoder or scheme is None or scheme.has_table:
        raise ValueError(
            f"position_ids were given, and {head} takes none: its positions count from the beginning of a row, so that packed "
            "documents cannot begin anew; give it one text to a row"
        )


def _check_labels(config, head: str, labels: Tensor | None) -> None:
    count = next((getattr(config, field) for ends, field in ANSWERS.items() if head.endswith(ends)), None)
    # one label is a number to be met, and floating ones are several at a time
    if count is None or count == 1 or not _is_readable(labels):
        return
    wrong = labels[((labels < 0) | (labels >= count)) & (labels != IGNORED)]
    if wrong.numel():
        raise ValueError(
            f"labels hold {int(wrong[0])}; those of {head} are 0 to {count - 1}, or {IGNORED} where there is none: check the "
            "column of labels, or num_labels or vocab_size of the configuration"
        )


def check_ids(vocabulary: int, ids: Tensor | None, name: str = "input_ids") -> None:
    """Raise ValueError if `ids` hold what is not one of `vocabulary`."""
    if not _is_readable(ids):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name} hold {low if low < 0 else high}; the vocabulary is 0 to {vocabulary - 1}: use the model's own "
            "tokenizer, or model.resize_token_embeddings(len(tokenizer)) for new tokens"
        )


def _check_types(config, vocabulary: int | None, types: Tensor | None) -> None:
    # GPT-2 looks types up in the table of ids
    field = "type_vocab_size" if getattr(config, "type_vocab_size", None) else "vocab_size"
    count = vocabulary if field == "vocab_size" else config.type_vocab_size
    if not count or not _is_readable(types):
        return
    low, high = (int(value) for value in types.aminmax())
    if low < 0 or high >= count:
        raise ValueError(
            f"token_type_ids hold {low if low < 0 else high}; {config.model_type} has the types 0 to {count - 1} "
            f"({field}): leave them out, or use the model's own tokenizer"
        )


def check_positions(rows: int, position_ids: Tensor | None, model_type: str = "this model") -> None:
    """Raise ValueError if `position_ids` hold what a table of so many rows has not."""
    if _is_readable(position_ids) and int(position_ids.max()) >= rows:
        raise ValueError(
            f"position_ids hold {int(position_ids.max())}; {model_type} has a table of {rows}: truncate, or convert the "
            "dense checkpoint with a greater max_length"
        )


def _check_positions(config, batch: Mapping[str, Any]) -> None:
    scheme, positions = config.positions, batch.get("position_ids")
    most = scheme.length_of(config)
    # of an encoder-decoder, tokens in a cache are the target's
    cached = 0 if config.is_encoder_decoder else _cached_tokens(batch)
    found = _tokens(config, batch.get("input_ids"), batch.get("attention_mask"), cached) if positions is None else 0
    if found > most:
        raise ValueError(
            f"a row has {found} tokens; {config.model_type} has positions for {most}: truncate, or convert the dense "
            f"checkpoint with max_length={found}"
        )
    check_positions(getattr(config, scheme.limit), positions, config.model_type)


def _check_target(config, head: str, batch: Mapping[str, Any]) -> None:
    """Refuse a target that is longer than the decoder's table, wherever it comes from."""
    # encoders and decoders inside a model have no target
    if not config.is_encoder_decoder or head.endswith(("Encoder", "Decoder", "Stack", "Wrapper")):
        return
    most = getattr(config, "max_decoder_position_embeddings", config.positions.length_of(config))
    given = next((batch[n] for n in ("decoder_input_ids", "decoder_inputs_embeds") if batch.get(n) is not None), None)
    labels, text = batch.get("labels"), batch.get("input_ids")
    if given is not None:
        found = _cached_tokens(batch) + given.shape[1]
    elif labels is not None and head.endswith("ForConditionalGeneration"):
        found = labels.shape[-1]
    else:
        found = 0 if text is None else text.shape[-1]
        if found > most:
            raise ValueError(
                f"no decoder_input_ids are given, so that they are made of the text, which has {found} tokens; the decoder of "
                f"{config.model_type} has positions for {most}: pass decoder_input_ids"
            )
    if found > most:
        raise ValueError(
            f"a target has {found} tokens; {config.model_type} has positions for {most} in its decoder: truncate it, or generate "
            "fewer tokens"
        )


def _cached_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens in the cache of a forward pass; 0 where a device would have to be waited for."""
    cache = given_cache(batch)
    count = 0 if cache is None else cache.get_seq_length()
    return int(count) if not isinstance(count, Tensor) or _is_readable(count) else 0


def _check_rotary(config, batch: Mapping[str, Any], beyond: bool) -> None:
    positions, most = batch.get("position_ids"), config.positions.reach_of(config)
    if positions is None:
        found = _tokens(config, batch.get("input_ids"), None)
    else:
        found = int(positions.max()) + 1 if _is_readable(positions) else 0
    if most is None or found <= most:
        return
    limit = f"{config.model_type} is configured for {most} (max_position_embeddings)"
    if not beyond:
        raise ValueError(
            f"a row has {found} tokens; {limit}: truncate, convert the dense checkpoint with max_length={found}, or set "
            "config.max_position_embeddings if the model shall learn what lies beyond"
        )
    # without the length of the row, so that it is said once
    logger.warning_once(
        f"a row has more tokens than {limit}; rotary positions go on, but few models answer well there: truncate, or convert the "
        "dense checkpoint with a greater max_length, scaled by rope or trained on"
    )


def _tokens(config, ids: Tensor | None, real: Tensor | None, cached: int = 0) -> int:
    """Tokens that take a position: of a row with its padding, if that takes some too."""
    if ids is None or ids.is_floating_point():
        return 0
    scheme, count = config.positions, cached + ids.shape[-1]
    real = ids != config.pad_token_id if scheme.counted and not cached else real
    if not scheme.skips_padding or real is None or count <= scheme.length_of(config):
        return count
    is_whole = _is_readable(real) and real.shape == (*ids.shape[:-1], count)
    # an older mask has 2 on global tokens
    return int((real > 0).sum(-1).max()) if is_whole else 0


def _is_readable(values: Any) -> TypeGuard[Tensor]:
    """Are these whole numbers that can be read without waiting for a device?"""
    return (
        isinstance(values, Tensor)
        and not isinstance(values, FakeTensor)
        and values.device.type == "cpu"
        and not values.dtype.is_floating_point
        and bool(values.numel())
    )
