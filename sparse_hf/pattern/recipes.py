"""The patterns of the literature, by the names of their papers. Units are converted here, once."""

from __future__ import annotations

from .base import Pattern
from .blocks import RandomBlocks
from .per_head import PerHead
from .primitives import Chunk, First, Fixed, Last, Stride, Summary, Window, causal, full
from .words import recipe


@recipe
def longformer(attention_window: int = 512, num_global: int = 1, dilation: int = 1) -> Pattern:
    """Longformer (arXiv:2004.05150, section 3.1): a window, dilated if asked, and global tokens at the start.

    `attention_window` is the total width, so each side is half of it; a dilated window reaches `dilation` times as far.

    Examples:
        >>> str(longformer(512))
        'window(256, 256) | first(1)'
    """
    side = attention_window // 2 * dilation
    window = Window(side, side) if dilation == 1 else Window(side, side) & Stride(dilation)
    return window | First(num_global)


@recipe
def bigbird(block_size: int = 64, num_random_blocks: int = 3, num_global_blocks: int = 1, seed: int = 0) -> Pattern:
    """BigBird, ITC (arXiv:2007.14062, section 2): three blocks of window, global blocks at both ends, random blocks.

    All is aligned to blocks, as in the paper: the window is the query's block and one on each side. The last blocks are
    the sequence's own, whatever its length; a causal model has none.

    Examples:
        >>> str(bigbird(64, 3))
        'chunk(64, 1, 1) | first(64) | last(1, 64) | random_blocks(3, 64, 0)'
    """
    ends = First(num_global_blocks * block_size) | Last(num_global_blocks, block_size)
    return Chunk(block_size, 1, 1) | ends | RandomBlocks(num_random_blocks, block_size, seed)


@recipe
def sparse_transformer(stride: int = 128, mode: str = "strided", summary: int = 8, part: int | None = None) -> Pattern:
    """Sparse Transformer (arXiv:1904.10509, section 4.2), causal: "strided" or "fixed".

    Strided: the last `stride` positions, and every `stride`-th before. Fixed: the query's block of `stride` positions, and
    the last `summary` of each earlier block. Both reach every earlier token in two layers.

    The pair of patterns of which it is made can stand in layers or heads of their own (section 5.2): `part` 1 is the near
    one, 2 the far one; None is both in one ("merged"). In the far one of "fixed" a query sees itself too, without which
    those before the first summary would see nothing. See `sparse_transformer_layers` and `sparse_transformer_heads`.

    Examples:
        >>> str(sparse_transformer(stride=128, mode="strided"))
        '(window(128, 0) | stride(128)) & window(None, 0)'
    """
    if mode not in ("strided", "fixed"):
        raise ValueError(f"sparse_transformer: mode is {mode!r}; it must be 'strided' or 'fixed'")
    near, far = {
        "strided": lambda: (Window(stride, 0), Stride(stride)),
        "fixed": lambda: (Chunk(stride), Summary(stride, min(summary, stride)) | Window(0, 0)),
    }[mode]()
    merged = near | far if mode == "strided" else Fixed(stride, min(summary, stride))
    parts = {None: merged, 1: near, 2: far}
    if part not in parts:
        raise ValueError(f"sparse_transformer: part is {part!r}; it must be 1 (near), 2 (far), or None for both")
    return parts[part] & causal()


def sparse_transformer_layers(
    num_layers: int, stride: int = 128, mode: str = "strided", summary: int = 8
) -> list[Pattern]:
    """The two parts of `sparse_transformer` by turns, one a layer (arXiv:1904.10509, section 5.2): what `layers` takes.

    The near part comes first: of "fixed", two layers reach every earlier token in this order only.

    Examples:
        >>> [str(one) for one in sparse_transformer_layers(2, stride=128)]
        ['window(128, 0) & window(None, 0)', 'stride(128) & window(None, 0)']
    """
    return [sparse_transformer(stride, mode, summary, part=1 + layer % 2) for layer in range(num_layers)]


@recipe
def sparse_transformer_heads(num_heads: int, stride: int = 128, mode: str = "strided", summary: int = 8) -> Pattern:
    """The two parts of `sparse_transformer` by turns, one a head (arXiv:1904.10509, section 5.2).

    Examples:
        >>> str(sparse_transformer_heads(2, stride=128))
        'per_head(window(128, 0) & window(None, 0), stride(128) & window(None, 0))'
    """
    return PerHead(*(sparse_transformer(stride, mode, summary, part=1 + head % 2) for head in range(num_heads)))


@recipe
def sliding_window(size: int) -> Pattern:
    """Mistral (arXiv:2310.06825): `size` keys, the query's own included, so `size - 1` before it.

    Examples:
        >>> str(sliding_window(4096))
        'window(4095, 0)'
    """
    return Window(size - 1, 0)


@recipe
def streaming(window: int = 1024, sinks: int = 4) -> Pattern:
    """StreamingLLM (arXiv:2309.17453): the last `window` keys, the query's own included, and the first `sinks`.

    Examples:
        >>> str(streaming(window=1024, sinks=4))
        'window(1023, 0) | first(4) & window(None, 0)'
    """
    return Window(window - 1, 0) | First(sinks) & causal()


def hybrid(num_layers: int, window: int = 1024, sinks: int = 4, every: int | None = 4, first: int = 0) -> list[Pattern]:
    """Dense layers among sliding ones (arXiv:2512.10411): what `layers` takes.

    Layers slide over the last `window` keys, the query's own included, and see the first `sinks`. The last of every `every` layers
    stays dense, as in Gemma 3, None for no such layer, and so do the first `first` layers. With `decode="dense"` beside it
    (`sparsify`, `convert`), prompts are read so, and what is generated sees all keys in every layer.

    Raises:
        ValueError: `every` or `first` outside the model.

    Example: `sparsify(model, recipes.streaming(1024), layers=recipes.hybrid(30, 1024, every=4, first=1), decode="dense")`.

    Examples:
        >>> [str(one) for one in hybrid(3, window=1024, sinks=0, every=3)]
        ['window(1023, 0)', 'window(1023, 0)', 'window(None, None)']
    """
    if every is not None and every < 1:
        raise ValueError(f"hybrid: every is {every}; it must be at least 1, or None for no such layer")
    if not 0 <= first <= num_layers:
        raise ValueError(f"hybrid: first is {first}; the model has {num_layers} layers")
    sliding = streaming(window, sinks) if sinks else sliding_window(window)
    dense = [layer < first or every is not None and layer % every == every - 1 for layer in range(num_layers)]
    return [full() if is_dense else sliding for is_dense in dense]
