"""A decoder of a folder, and a text that it goes on with: what `generate` and `chat` share. Imported when one of them runs."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import sparse_hf

from ..bench import DTYPES, chosen_device
from ..models import SparseConfigMixin, StreamingCache

# what classes of models that continue a text are called
DECODERS = ("ForCausalLM", "LMHeadModel")
# tokens of a prompt that are read at a time
PIECE = 2048


@dataclass(frozen=True)
class Decoder:
    """A model, its tokenizer, and why its cache keeps all keys, if it does."""

    model: PreTrainedModel
    tokenizer: Any
    endless: str | None

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def new_cache(self) -> Cache:
        return StreamingCache(self.config) if self.endless is None else DynamicCache(config=self.config)


def load_decoder(folder: str, pattern: str | None, cache: str, dtype: str | None, device: str | None) -> Decoder:
    """Load a folder, sparse or dense, or a hub id.

    Args:
        pattern: for a dense decoder; without one it stays dense.
        cache: "auto" (streaming where patterns allow it), "streaming" or "dynamic".
        dtype: "fp32", "bf16" or "fp16"; by default what the weights are saved in.
        device: "cpu" or "cuda"; by default the GPU if there is one.

    Raises:
        ValueError: no decoder, a pattern for what has one already, or no streaming cache where one is asked for.
        OSError: no such folder, or none with a checkpoint and a tokenizer.
    """
    if cache not in ("auto", "streaming", "dynamic"):
        raise ValueError(f"cache is {cache!r}; the known ones are auto, streaming, dynamic")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; the known ones are {', '.join(DTYPES)}")
    target = chosen_device(device)
    config = AutoConfig.from_pretrained(folder)
    heads = config.architectures or []
    if not any(name.endswith(DECODERS) for name in heads):
        raise ValueError(
            f"{folder} holds {', '.join(heads) or 'no language model'}, which does not continue texts; decoders do "
            "(...ForCausalLM, ...LMHeadModel)"
        )
    is_sparse = isinstance(config, SparseConfigMixin)
    if is_sparse and pattern is not None:
        raise ValueError(f"{folder} is sparse already, and has a pattern of its own; leave --pattern out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else DTYPES[dtype])
    model.to(target).eval()
    if pattern is not None:
        model = sparse_hf.sparsify(model, pattern)
    return Decoder(model, tokenizer, _endless(model.config, cache))


def _endless(config: PreTrainedConfig, cache: str) -> str | None:
    """Why a cache keeps all keys; None if it need not."""
    if cache == "dynamic":
        return "--cache dynamic"
    if not isinstance(config, SparseConfigMixin) and cache == "auto":
        return "the model is dense; --pattern makes it sparse"
    try:
        StreamingCache(config)
    except ValueError as error:
        if cache == "streaming":
            raise
        return str(error)
    return None


@dataclass(frozen=True)
class Answer:
    """What became of a prompt.

    Attributes:
        read: tokens of the prompt that were read, of `asked`.
        tokens: new ones.
        seconds: that these took, the reading of the prompt apart.
        ended: "end" (the model ended its text), "length" or "interrupted".
    """

    asked: int
    read: int
    tokens: int
    seconds: float
    ended: str

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Speaker(TextStreamer):
    """Write an answer as it comes, word by word, and note when its first token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.began = write, 0.0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class Interrupts(StoppingCriteria):
    """Is the answer to stop? Ctrl-C says so between two tokens, so that the cache holds whole tokens; a second one ends all."""

    def __init__(self):
        self.asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass
class Text:
    """A text of any length behind one cache, to which prompts and answers are added.

    Args:
        settings: further arguments of `generate`.
    """

    decoder: Decoder
    settings: dict[str, Any] = field(default_factory=dict)
    interrupts: Interrupts = field(default_factory=Interrupts)

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.cache = self.decoder.new_cache()
        self.ids = torch.zeros(1, 0, dtype=torch.long, device=self.decoder.model.device)

    def forget_unread(self) -> None:
        """Have the text end where the cache does."""
        self.ids = self.ids[:, : int(self.cache.get_seq_length())]

    @property
    def seen(self) -> int:
        """Tokens of the text."""
        return self.ids.shape[1]

    @property
    def kept(self) -> int:
        """Tokens whose keys a layer holds, at most."""
        return min(self.seen, max((_slots(layer) for layer in self.cache.layers), default=0))

    def answer(
        self, ids: Sequence[int], write: Callable[[str], None], advance: Callable[[int], None] = lambda n: None
    ) -> Answer:
        """Add tokens, and what the model answers.

        Args:
            ids: of the prompt.
            write: takes the answer, piece by piece.
            advance: takes the numbers of tokens that are read of the prompt.
        """
        before = self.seen
        self.ids = torch.cat((self.ids, self.ids.new_tensor([list(ids)])), 1)
        with self.interrupts.listening():
            self._read(advance)
            if self.interrupts.asked:
                self.forget_unread()
                return Answer(len(ids), self.seen - before, 0, 0.0, "interrupted")
            return self._generate(len(ids), write)

    def _read(self, advance: Callable[[int], None]) -> None:
        """Have the cache hold all tokens but the last."""
        new = self.ids[:, int(self.cache.get_seq_length()) : -1]
        model = self.decoder.model
        keep: dict[str, Any] = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        for piece in new.split(PIECE, 1) if new.shape[1] else ():
            if self.interrupts.asked:
                return
            with torch.no_grad():
                model(input_ids=piece, use_cache=True, **self._named_cache(), **keep)
            advance(piece.shape[1])

    def _named_cache(self) -> dict[str, Cache]:
        # Transformers 5.24 calls it otherwise than 5.17
        takes = inspect.signature(self.decoder.model.forward).parameters
        return {"cache" if "cache" in takes else "past_key_values": self.cache}

    def _generate(self, asked: int, write: Callable[[str], None]) -> Answer:
        model: Any = self.decoder.model
        given = {**self._named_cache(), "attention_mask": torch.ones_like(self.ids), **self.settings}
        given["streamer"] = Speaker(self.decoder.tokenizer, write)
        begin, length = time.perf_counter(), self.seen
        self.ids = model.generate(self.ids, stopping_criteria=StoppingCriteriaList([self.interrupts]), **given)
        seconds, tokens = time.perf_counter() - begin, self.seen - length
        ended = "interrupted" if self.interrupts.asked else "length"
        if int(self.ids[0, -1]) in _ends(model):
            # the cache does not hold it, and what comes next may end the answer in its own way
            self.ids, ended = self.ids[:, :-1], "end"
        return Answer(asked, asked, tokens, seconds, ended)


def _slots(layer: Any) -> int:
    return 0 if layer.keys is None else layer.keys.shape[-2]


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])
