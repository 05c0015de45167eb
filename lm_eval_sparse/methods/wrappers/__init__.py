"""Methods around a method: `method=twilight:quest` asks `twilight`, which asks `quest`. One file each."""

from .base import Wrapper

__all__ = ["Wrapper"]
