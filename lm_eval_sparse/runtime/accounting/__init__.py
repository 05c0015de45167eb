"""Counting what attention did, per prompt, phase, layer and head, and turning the counts into figures.

The definitions are those of docs/accounting.md. `calls` says what a call of each phase counts, `rows` holds the counts
of a prompt, `ledger` those of many.
"""

from .calls import (
    COVERED,
    DecodeShape,
    count_answer,
    count_compaction,
    count_dense,
    count_eviction,
    count_memory,
    count_prefill,
    count_rows,
    count_step,
)
from .ledger import Ledger, compactions
from .rows import FIGURES, MEMORY, PHASES, PhaseCounts, RowCounts, settle

__all__ = [
    "COVERED",
    "FIGURES",
    "MEMORY",
    "PHASES",
    "DecodeShape",
    "Ledger",
    "PhaseCounts",
    "RowCounts",
    "compactions",
    "count_answer",
    "count_compaction",
    "count_dense",
    "count_eviction",
    "count_memory",
    "count_prefill",
    "count_rows",
    "count_step",
    "settle",
]
