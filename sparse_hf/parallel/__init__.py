"""A text over several processes: each holds a contiguous part of every row, and fetches what its pattern reaches."""

from .attention import SplitAttention
from .exchange import Ranks
from .needs import Needs, find_needs, keys_sent
from .text import SplitText, even_parts

__all__ = ["Needs", "Ranks", "SplitAttention", "SplitText", "even_parts", "find_needs", "keys_sent"]
