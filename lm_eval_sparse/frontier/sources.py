"""What code writes documents: a hash of it keeps documents apart that were written before and after a change."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from functools import lru_cache
from pathlib import Path

from ..results.files import read_bytes

#: Larger files beside a recipe are not read for the fingerprint of its documents.
_LARGE = 64 * 2**20


@lru_cache(maxsize=64)
def sources(recipe_class: type) -> str:
    """SHA-256 of what writes documents: this package's code, and all files beside a recipe from elsewhere."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    if not recipe_class.__module__.startswith(f"{__package__}."):
        with contextlib.suppress(TypeError, OSError):  # typed into a console, it has no file
            folder = Path(inspect.getfile(recipe_class)).parent
            paths += sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size < _LARGE)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(read_bytes(path))
    return digest.hexdigest()
