"""Read the YAML files of tasks without importing anything: functions are their names. Refuses what breaks readers.

lm-eval reads the same files afterwards, so what is refused here never reaches it. Knows nothing of tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..results.files import brief, read_bytes, why

#: Bounds of a file, each far above what any task has: bytes, values with all aliases written out, levels of nesting.
_MOST_BYTES = 10 * 2**20
_MOST_VALUES = 200_000
_DEEPEST = 50


def leaf_files(folder: str | Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name -> (file, content) of all that the YAML files under `folder` define, with what they include merged in.

    Raises `UserError` for a file that is no YAML.
    """
    found = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        if "__pycache__" in path.parts or ".ipynb_checkpoints" in path.parts:
            continue
        content = read(path)
        name = content.get("task") if isinstance(content.get("task"), str) else content.get("group")
        if isinstance(name, str):
            found[name] = (path, content)
    return found


def read(path: Path, seen: set[Path] | None = None) -> dict[str, Any]:
    """The mapping in a file, with the files that it includes. Raises `UserError`."""
    seen = set() if seen is None else seen
    # As in lm-eval, which includes no file twice.
    if (here := path.absolute()) in seen:
        raise UserError(f"{path} is included twice, or includes itself")
    seen.add(here)
    content = _load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, such as `task: frontier_name_4k`, but holds {brief(content)}")
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        if not isinstance(other, str) or not other.strip():
            raise UserError(f"{path} includes {brief(other)}, which is no file's name")
        merged |= read(path.parent / other, seen)
    return merged | content


def _load(path: Path) -> Any:
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        pass

    Loader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")
    try:
        text = read_bytes(path, most=_MOST_BYTES).decode("utf-8")
        content = yaml.load(text, Loader=Loader)
    except Exception as error:  # dates, numbers and flags that are none raise whatever Python's own readers do
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200] or why(error)}") from None
    if not _is_bounded(content):
        raise UserError(
            f"{path} cannot be read as YAML: it is nested more than {_DEEPEST} levels deep, or has more than "
            f"{_MOST_VALUES:,} values once its aliases are written out"
        )
    return content


def _is_bounded(content: Any) -> bool:
    """Whether everything that walks through `content` comes to an end: an alias may stand for what it is in."""
    values, level, now = 0, 0, [content]
    while now:
        values, level = values + len(now), level + 1
        if level > _DEEPEST:
            return False
        inner: list[Any] = []
        for item in now:
            if isinstance(item, dict | list | tuple | set):
                inner += item.values() if isinstance(item, dict) else item
                if values + len(inner) > _MOST_VALUES:
                    return False
        now = inner
    return True
