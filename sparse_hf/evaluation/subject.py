"""The model that is evaluated: what it can be asked, and how long a text it takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..models.hf.config import SparseConfigMixin
from ..models.hf.indexer import has_new_indexers
from ..models.hf.register import family_of
from ..models.hf.sparsify import sparsify
from ..pattern import full
from .candidates import DENSE, Candidate
from .settings import Settings

# what a model gives: the next token, hidden tokens, or states alone
Kind = Literal["decoder", "masked", "encoder"]
CAUSAL, MASKED = ("ForCausalLM", "LMHeadModel"), ("ForMaskedLM", "ForPreTraining")
# numbers of each parameter that tell weights apart
SAMPLED = 8


@dataclass(frozen=True, eq=False)
class Contender:
    """A candidate with its model. `weights` tells its weights and pattern apart from others.

    `is_untrained` says that it chooses keys by indexers whose weights are new.
    """

    name: str
    model: PreTrainedModel
    weights: str
    is_untrained: bool = False

    @property
    def config(self) -> SparseConfigMixin:
        assert isinstance(self.model.config, SparseConfigMixin)
        return self.model.config

    @property
    def is_dense(self) -> bool:
        return self.name == DENSE

    def layer_patterns(self, is_causal: bool) -> list[str]:
        """The pattern of each layer, cut to the past where the model sees nothing else."""
        return [self.config.layer_pattern(layer, is_causal) for layer in range(self.config.stacks[""])]


@dataclass(frozen=True, eq=False)
class Subject:
    """The model, its tokenizer, and the contenders that share its weights: first the dense one.

    `limit` is the number of tokens beyond which it has no positions, `trained` that for which it was made.
    """

    name: str
    kind: Kind
    tokenizer: PreTrainedTokenizerBase
    contenders: tuple[Contender, ...]
    limit: int | None
    trained: int | None

    @property
    def dense(self) -> Contender:
        return self.contenders[0]

    @property
    def is_causal(self) -> bool:
        return self.kind == "decoder"

    @property
    def device(self) -> torch.device:
        return self.dense.model.device


def open_subject(
    model: PreTrainedModel | str | PathLike[str],
    candidates: list[Candidate],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> Subject:
    """Load what is a folder, and make each candidate sparse around the weights that are there.

    Raises:
        ValueError: an encoder-decoder, a family that is sparse by itself, tokenizers that differ, or no pattern.
    """
    loaded = model if isinstance(model, PreTrainedModel) else _load(model, settings.dtype)
    kind = _kind(loaded)
    if isinstance(loaded.config, SparseConfigMixin) and loaded.config.sparse_attention is not None:
        # what the folder has by itself comes first
        candidates = [Candidate("as saved"), *candidates]
    if not candidates:
        raise ValueError(
            "patterns is empty and the model is dense; give at least one, like 'window(255, 0) | first(4)'"
        )
    dense = sparsify(loaded, full()).eval()
    contenders = [Contender(DENSE, dense, fingerprint(dense))]
    for candidate in candidates:
        contenders.append(_contender(candidate, loaded, tokenizer, settings))
    config: Any = contenders[0].config
    positions = config.positions
    limit = positions.length_of(config) if positions.has_table else None
    return Subject(
        Path(_name(model)).name or "model", kind, tokenizer, tuple(contenders), limit, positions.reach_of(config)
    )


def _load(source: str | PathLike[str], dtype: str | None) -> PreTrainedModel:
    """The model of a folder or a hub id; without a dtype on the GPU in its own numbers, on the CPU in float32."""
    config = AutoConfig.from_pretrained(source)
    named = (config.architectures or [""])[0]
    auto: Any = AutoModelForCausalLM if named.endswith(CAUSAL) else AutoModel
    auto = AutoModelForMaskedLM if named.endswith(MASKED) else auto
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return auto.from_pretrained(source, dtype=dtype or ("auto" if device.type == "cuda" else "float32")).to(device)


def _kind(model: PreTrainedModel) -> Kind:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; evaluate reads decoders and encoders")
    if (
        getattr(model.config, "implies_pattern", False)
        or family_of(model.config.model_type).config_class.implies_pattern
    ):
        raise ValueError(
            f"{name} is sparse by itself, so that there is no dense model to stand beside; evaluate reads families that are dense"
        )
    if name.endswith(CAUSAL):
        return "decoder"
    return "masked" if name.endswith(MASKED) else "encoder"


def _name(model: PreTrainedModel | str | PathLike[str]) -> str:
    return (model.name_or_path or "") if isinstance(model, PreTrainedModel) else str(model)


def tokenizer_of(model: PreTrainedModel | str | PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: there is none.
        OSError: there is no model either.
    """
    name = _name(model)
    if not isinstance(model, PreTrainedModel):
        AutoConfig.from_pretrained(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no tokenizer in {name!r}; give one as tokenizer=") from error


def _contender(
    candidate: Candidate, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Contender:
    if candidate.folder is None:
        if candidate.pattern is None:
            # a model that is sparse already keeps its own
            spec = model.config.sparse_attention
            marks = spec.get("global_token_ids") or ()
            sparse = sparsify(model, full(), _saved_layers(spec), marks, spec.get("decode"))
        else:
            marks = settings.global_token_ids if "marked" in f"{candidate.pattern} {candidate.layers}" else ()
            sparse = sparsify(model, candidate.pattern, candidate.layers, marks, candidate.decode)
    else:
        _check_alike(candidate.folder, model, tokenizer)
        sparse: Any = _load(candidate.folder, settings.dtype)
        sparse = sparse.to(model.device)
    is_untrained = candidate.folder is None and has_new_indexers(sparse, model)
    return Contender(candidate.name, sparse.eval(), fingerprint(sparse), is_untrained)


def _saved_layers(spec: dict) -> list[str]:
    return [spec["patterns"][name] for name in spec["layers"]]


def _check_alike(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless a checkpoint can stand beside the model: answers are compared token by token."""
    config: Any = AutoConfig.from_pretrained(folder)
    if not isinstance(config, SparseConfigMixin):
        named = (config.architectures or [type(config).__name__])[0]
        raise ValueError(f"{folder} holds a dense {named}; give a sparse checkpoint, or a pattern")
    if config.stacks != family_of(model.config.model_type).config_class.from_dense(model.config, full()).stacks:
        raise ValueError(f"{folder} has another number of layers than {type(model).__name__}")
    if tokenizer_of(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer of {folder} has other tokens than that of the model, so that no answer can be compared; convert the "
            "model that is evaluated"
        )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's class, pattern and weights, of which a few numbers each are read."""
    digest = hashlib.sha256(f"{type(model).__name__} {model.config.sparse_attention}".encode())
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
