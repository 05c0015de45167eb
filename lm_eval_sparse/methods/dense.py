"""Full attention, the reference of every comparison and the default of each phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True)
class Dense(Method):
    """Attend to everything."""

    name: ClassVar[str] = "dense"
    phase: ClassVar[str] = "any"
    unit: ClassVar[str] = "-"
    importance: ClassVar[str] = "-"
    allocation: ClassVar[str] = "-"
    kv: ClassVar[str] = "full cache"
    reference: ClassVar[str] = "Vaswani et al., 2017"
