"""What operators pass to each other: what is selected, what is stored. No operator imports another for a type."""

from .blocks import BLOCK_SIZES, Blocks, block_lengths, causal_pairs, check_shapes, listed, tile_pairs
from .bounds import PageBounds
from .cost import Cost
from .keep import Keep
from .ragged import RaggedKV
from .reads import Extra, Reads
from .state import Slot, State

__all__ = [
    "BLOCK_SIZES",
    "Blocks",
    "Cost",
    "Extra",
    "Keep",
    "PageBounds",
    "RaggedKV",
    "Reads",
    "Slot",
    "State",
    "block_lengths",
    "causal_pairs",
    "check_shapes",
    "listed",
    "tile_pairs",
]
