"""The scored level: a method writes a score, its base class makes the selection.

The class says what its unit is, which parts are always read, and how the budget is divided (`Allocation`); the base
class forces those parts, breaks ties towards recent keys, solves for the budget, refuses prompts that are too short for
what is forced, lets forced defaults shrink, and counts what selecting costs by default.
"""

from .allocation import Allocation, PerLayer, Pooled, TopP, Uniform
from .decode import ScoredDecode
from .eviction import ScoredEviction
from .prefill import ScoredPrefill

__all__ = ["Allocation", "PerLayer", "Pooled", "ScoredDecode", "ScoredEviction", "ScoredPrefill", "TopP", "Uniform"]
