"""Outputs: which of them a caller wants."""

from __future__ import annotations

from transformers import PreTrainedConfig


def wanted_outputs(config: PreTrainedConfig, **given: bool | None) -> tuple[bool, ...]:
    """What the caller said of each (`output_attentions`, `return_dict`), or else the configuration."""
    return tuple(getattr(config, name) if value is None else value for name, value in given.items())
