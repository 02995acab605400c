"""The tiles that the kernels of chosen keys take, and how their programs are run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One side of a tile, the other being known, and how a program with such tiles is run."""

    side: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# keys of a tile of one query: of wide heads or in 32 bits, of few heads, and of many
WIDE, OF_FEW_HEADS, OF_MANY_HEADS = Tile(32, 4, 3), Tile(64, 2, 2), Tile(64, 4, 2)
# numbers of a block of keys that four warps hold
MAX_OF_FOUR_WARPS = 64 * 128
# rows of queries of a tile of a block that four warps hold, and of a larger one
FORWARD, BACKWARD = (Tile(64, 4, 2), Tile(64, 8, 2)), (Tile(32, 4, 2), Tile(32, 8, 2))


def of_query(heads: int, *, is_wide: bool, least_heads: int) -> Tile:
    """Keys of a tile that has so many heads of one query."""
    if is_wide:
        return WIDE
    return OF_FEW_HEADS if heads <= least_heads else OF_MANY_HEADS


def of_block(size: int, dim: int, *, backward: bool) -> Tile:
    """Rows of queries of a tile that has a block of keys of so many dimensions."""
    return (BACKWARD if backward else FORWARD)[size * dim > MAX_OF_FOUR_WARPS]
