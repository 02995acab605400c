"""The modules inside a Reformer that compute by patterns: local and hashed attention.

Legend: B batch, N tokens, H heads, D head dim, E hidden size, R rounds of hashing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention, ReformerDynamicCache

from ...attention.devices import is_autocast
from ...attention.hashed.reformer import chunked_attention, chunked_weights
from ...pattern import LSHChunks, MarkedKeys, Pattern, Ring
from ...plan import NOTHING, BatchInfo, of_batch
from ...plan.hash_order import Chunking, hash_vectors
from ..hf.config import SparseConfigMixin
from ..hf.own_modules import attend_by_pattern, backend_of

# a vector is divided by its length, which may be 0; as in Transformers
EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Text:
    """What a batch says of its tokens and what its caller wants, read once per forward pass for all layers."""

    real: Tensor | None  # [B, N] bool, cached tokens included
    multiple: int  # Transformers pads texts of more than `least` tokens to a multiple of this
    least: int
    rounds: int | None  # of hashing, if the caller wants others than the configuration
    with_weights: bool
    # the batch as plans want it; that of a ring, which right padding belongs to and nobody sees, says so by marks
    batch: BatchInfo
    ring_batch: BatchInfo

    @classmethod
    def read(cls, real: Tensor | None, sizes: tuple[int, int], rounds: int | None, with_weights: bool) -> Text:
        multiple, least = sizes
        if real is None:
            return cls(None, multiple, least, rounds, with_weights, NOTHING, NOTHING)
        batches = of_batch(real, None, None), of_batch(real.int().cumsum(1) > 0, None, real)
        return cls(real, multiple, least, rounds, with_weights, *batches)

    def to(self, device: torch.device | str | int) -> Text:
        """On a device; layers that are spread over several share what was moved."""
        device = torch.empty(0, device=device).device
        if self.real is None or self.real.device == device:
            return self
        if device not in self.batch.memo:
            sizes = self.multiple, self.least
            self.batch.remember(device, Text.read(self.real.to(device), sizes, self.rounds, self.with_weights))
        return self.batch.memo[device]

    def chunking(self, size: int, left: int, right: int) -> Chunking:
        return Chunking(size, left, right, self.multiple, self.least)


class SparseReformerCache(ReformerDynamicCache):
    """Keys and values `[B, H, N, 2 D]` of the local layers before the first hashed one, whose inputs `[B, N, 2 E]` follow.

    Hashed layers sort the whole text, so that a new token may change what earlier ones see: from the first of them on,
    all tokens are computed again, and the answers are those without a cache.
    """

    def extended(self, layer: int, states: Tensor, dim: int) -> Tensor:
        """Add the states of new tokens to those of a layer, and return them all."""
        if len(self.states_cache) <= layer:
            self.states_cache.append(states)
        else:
            self.states_cache[layer] = torch.cat([self.states_cache[layer], states], dim=dim)
        return self.states_cache[layer]

    def get_start_idx(self) -> int:
        return self.states_cache[0].shape[-2] if self.states_cache else 0

    def update(self, *_, **__):
        raise NotImplementedError("a SparseReformerCache is filled by its model; call extended(layer, states, dim)")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.states_cache = [states.index_select(0, beam_idx.to(states.device)) for states in self.states_cache]


class SparseLSHSelfAttention(LSHSelfAttention):
    """Hashed attention with shared queries and keys, by `lsh_chunks(...)`. `config` is set by the model around it."""

    config: SparseConfigMixin

    def forward(
        self, hidden_states: Tensor, text: Text, rotations: Tensor | None = None, buckets: Tensor | None = None, **_
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`[B, N, E]` to `[B, N, H * D]`, the weights `[B, H, N, N]` if asked for, and the buckets `[B, H, R, N]`.

        Args:
            rotations: as drawn by `draw_rotations`; None draws them here.
            buckets: those of an earlier pass over the same states, which are not hashed again.
        """
        size, left, right, _, number, _ = chunks_of(self.config.layer_pattern(self.layer_idx))
        chunking = text.chunking(size, left, right)
        query, value = (_heads(project(hidden_states), self) for project in (self.query_key, self.value))
        with _without_autocast(query):
            if chunking.tiles(query.shape[2]) > 1 and buckets is None:
                rotations = self.draw_rotations(hidden_states, text) if rotations is None else rotations
                assert rotations is not None
                number = self._number(chunking, number, query.shape[2])
                buckets = hash_vectors(query, rotations.to(query.dtype), number).int()
            out, weights = self._attend(query, value, chunking, buckets, text)
        return out.transpose(1, 2).flatten(2), weights, buckets

    def _attend(
        self, query: Tensor, value: Tensor, chunking: Chunking, buckets: Tensor | None, text: Text
    ) -> tuple[Tensor, Tensor | None]:
        # heads after tokens, as they stand in memory: the kernel reads numbers side by side
        by_token = query.transpose(1, 2)
        key = torch.nn.functional.rms_norm(by_token, by_token.shape[-1:], eps=EPSILON).transpose(1, 2)
        how = {
            "buckets": buckets, "real": text.real, "is_causal": self.is_decoder, "sees_itself": False,
            "scale": self.attention_head_size**-0.5,
        }  # fmt: skip
        dropout = self.dropout if self.training else 0.0
        backend = backend_of(self.config)
        out, lse = chunked_attention(query, key, value, chunking, **how, dropout=dropout, backend=backend)
        alone = lse == -torch.inf
        if text.real is not None:
            alone = alone & text.real[:, None]
        # a token that sees nothing else sees itself
        out = torch.where(alone[..., None], value, out)
        if not text.with_weights:
            return out, None
        return out, chunked_weights(query, key, chunking, **how) + torch.diag_embed(alone.to(query.dtype))

    def draw_rotations(self, states: Tensor, text: Text) -> Tensor | None:
        """The random directions `[H, D, R, S / 2]` of a pass, those that Transformers draws; None for one chunk.

        They have the dtype that projections of `states` will have. With a seed they come from a generator of their own:
        torch's is left alone.
        """
        size, left, right, rounds, number, seed = chunks_of(self.config.layer_pattern(self.layer_idx))
        chunking = text.chunking(size, left, right)
        if chunking.tiles(states.shape[1]) == 1:
            return None
        number = self._number(chunking, number, states.shape[1])
        rounds = rounds if text.rounds is None else text.rounds
        width = number if isinstance(number, int) else sum(number)
        shape = [self.num_attention_heads, self.attention_head_size, rounds, width // 2]
        dtype, device = _projected_dtype(states), states.device
        if seed is None:
            return torch.randn(shape, dtype=dtype, device=device)
        return seeded_rotations(torch.empty(0, dtype=dtype, device=device), shape, seed)

    def _number(self, chunking: Chunking, given: int | tuple[int, ...] | None, length: int) -> int | tuple[int, ...]:
        """The number of buckets; where none is given that of Transformers: two per chunk, rounded to a power of two."""
        if given is not None:
            return given
        power = (2 * chunking.tiles(length)).bit_length() - 1
        limit = 2 * max(int((self.config.max_position_embeddings // chunking.size) ** 0.5), chunking.size)
        return 2**power if 2**power <= limit else (2 ** (power // 2), 2 ** (power - power // 2))


@torch.library.custom_op(
    "sparse_hf::seeded_rotations",
    mutates_args=(),
    schema="(Tensor like, SymInt[] shape, int seed) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def seeded_rotations(like, shape, seed):
    """Normal numbers of a generator with this seed, in dtype and on the device of `like`. No graph can make one, of CUDA neither."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


@seeded_rotations.register_fake
def _(like, shape, seed):
    return like.new_empty(shape)


class SparseLocalSelfAttention(LocalSelfAttention):
    """Attention to neighbouring chunks, or by any other pattern of positions. `config` is set by the model around it."""

    config: SparseConfigMixin
    layer_idx: int

    def forward(
        self, hidden_states: Tensor, text: Text, cache: SparseReformerCache | None = None, **_
    ) -> tuple[Tensor, Tensor | None, None]:
        """`[B, N, E]` of the new tokens to `[B, N, H * D]`, and the weights `[B, H, N, K]` if asked for."""
        q, k, v = (_heads(project(hidden_states), self) for project in (self.query, self.key, self.value))
        if cache is not None:
            k, v = cache.extended(self.layer_idx, torch.cat([k, v], dim=-1), dim=2).chunk(2, dim=-1)
        chunking = self._special(text, k.shape[2]) if q.shape == k.shape else None
        with _without_autocast(q):
            if chunking is None:
                out, weights = self._attend(q, k, v, text)
            else:
                out, weights = self._attend_in_ring(q, k, v, chunking, text)
        return out.transpose(1, 2).flatten(2), weights, None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, text: Text) -> tuple[Tensor, Tensor | None]:
        """By the pattern, as a set of pairs."""
        pattern, batch = self._pattern(text)
        dropout = self.dropout if self.training else 0.0
        return attend_by_pattern(
            self.config, (q, k, v), pattern, batch, dropout=dropout, wants_weights=text.with_weights
        )

    def _attend_in_ring(
        self, q: Tensor, k: Tensor, v: Tensor, chunking: Chunking, text: Text
    ) -> tuple[Tensor, Tensor | None]:
        """Chunk by chunk, where a chunk may be met twice."""
        how = {"real": text.real, "is_causal": self.is_decoder, "scale": self.attention_head_size**-0.5}
        dropout, backend = self.dropout if self.training else 0.0, backend_of(self.config)
        backend = backend if backend == "reference" else "auto"
        out, _ = chunked_attention(q, k, v, chunking, **how, dropout=dropout, backend=backend)
        if not text.with_weights:
            return out, None
        return out, chunked_weights(q, k, chunking, buckets=None, sees_itself=True, **how)

    def _special(self, text: Text, length: int) -> Chunking | None:
        """How chunks stand where Transformers' ring is no set of pairs: so short that it meets chunks twice, or padded.

        The ring closes behind the padding to a common multiple of all layers' chunks.
        """
        ring = ring_of(self.config.layer_pattern(self.layer_idx))
        if ring is None:
            return None
        size, left, right = ring
        chunking = text.chunking(size, left, right)
        tiles, own = chunking.tiles(length), -(-length // size)
        is_special = left + right >= tiles > 1 or (not self.is_decoder and own != tiles)
        return chunking if is_special else None

    def _pattern(self, text: Text) -> tuple[str, BatchInfo]:
        """The pattern, and the batch in the form that it asks for."""
        pattern = self.config.layer_pattern(self.layer_idx, self.is_decoder)
        if text.real is None or self.is_decoder or ring_of(pattern) is None:
            return pattern, text.batch
        # Transformers' ring closes where the batch ends
        return seen_part(pattern), text.ring_batch


def _without_autocast(t: Tensor) -> AbstractContextManager:
    """Tensors have the dtype that autocast gave them, and what computes with them takes the precision that it needs."""
    return torch.autocast(t.device.type, enabled=False) if is_autocast(t) else nullcontext()


def _projected_dtype(states: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(states.device.type) if is_autocast(states) else states.dtype


def _heads(states: Tensor, module) -> Tensor:
    """`[B, N, H * D]` as `[B, H, N, D]`."""
    return states.unflatten(-1, (module.num_attention_heads, module.attention_head_size)).transpose(1, 2)


# a graph takes the answers as constants instead of tracing the parser
@torch.compiler.assume_constant_result
def chunks_of(text: str) -> tuple[int, int, int, int, int | tuple[int, ...] | None, int | None]:
    """The values of `lsh_chunks(...)`."""
    pattern = _parsed(text)
    assert isinstance(pattern, LSHChunks)
    return pattern.size, pattern.left, pattern.right, pattern.rounds, pattern.buckets, pattern.seed


@torch.compiler.assume_constant_result
def ring_of(text: str) -> tuple[int, int, int] | None:
    """The values of `ring(...)`, or None if the pattern is another."""
    pattern = _parsed(text)
    return (pattern.size, pattern.left, pattern.right) if isinstance(pattern, Ring) else None


@torch.compiler.assume_constant_result
def seen_part(text: str) -> str:
    """Of a pattern's pairs those whose key is marked."""
    return str(_parsed(text) & MarkedKeys())


@lru_cache(maxsize=256)
def _parsed(text: str) -> Pattern:
    return Pattern.parse(text)


def is_hashed(pattern: Pattern) -> bool:
    return isinstance(pattern, LSHChunks)
