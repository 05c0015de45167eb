"""A YAML file as plain values, each with the line it stands on. Nothing in it is ever executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..results.files import brief, read_bytes

#: Larger files, and more values or levels than these, are no grid.
_MOST_BYTES, _MOST_VALUES, _DEEPEST = 1 << 20, 20_000, 20

Place = tuple[str | int, ...]


class Document:
    """The values of a YAML file.

    Attributes:
        path: the file, as it was typed.
        value: what it holds: mappings, lists, texts, numbers, booleans and None.
    """

    def __init__(self, path: Path):
        """Read a file. Raises `UserError` with the line of what is wrong."""
        self.path = path
        self._lines: dict[Place, int] = {}
        self._left = _MOST_VALUES
        text = read_bytes(path, most=_MOST_BYTES)
        try:
            loader = yaml.SafeLoader(text.decode("utf-8-sig"))
            try:
                node = loader.get_single_node()
                self.value = None if node is None else self._read(loader, node, (), set())
            finally:
                loader.dispose()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start + 1} is not UTF-8 text; a YAML file is expected") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}{_at(error)}: not YAML ({_said(error)})") from None
        except RecursionError:
            raise UserError(f"{path}: nested deeper than any grid is") from None

    def _read(self, loader: yaml.SafeLoader, node: yaml.Node, place: Place, above: set[int]) -> Any:
        """The value of a node, by the rules for plain values only: other tags, which ask for code, are refused."""
        line = node.start_mark.line + 1
        self._lines.setdefault(place, line)
        self._left -= 1
        if self._left < 0 or len(place) > _DEEPEST:
            raise UserError(f"{self.path}, line {line}: more or deeper values than any grid has")
        if id(node) in above:
            raise UserError(f"{self.path}, line {line}: an alias that holds itself")
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in _SCALARS:
                raise UserError(
                    f"{self.path}, line {line}: the tag {brief(node.tag)} is not accepted: plain values are"
                )
            try:
                return loader.construct_object(node)
            except (yaml.YAMLError, ValueError) as error:
                raise UserError(f"{self.path}, line {line}: {brief(node.value)} is no value ({_said(error)})") from None
        if node.tag not in _COLLECTIONS:
            raise UserError(f"{self.path}, line {line}: the tag {brief(node.tag)} is not accepted: plain values are")
        inside = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self._read(loader, one, (*place, at), inside) for at, one in enumerate(node.value)]
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, at = self._key(loader, key_node), key_node.start_mark.line + 1
            if key in found:
                raise UserError(f"{self.path}, line {at}: {key} stands here twice; the first is in line "
                                f"{self._lines[(*place, key)]}")  # fmt: skip
            self._lines[(*place, key)] = at
            found[key] = self._read(loader, value_node, (*place, key), inside)
        return found

    def _key(self, loader: yaml.SafeLoader, node: yaml.Node) -> str:
        """A key as text: `4k` and `4096` are both names of a length."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS or node.value == "<<":
            raise UserError(f"{self.path}, line {line}: a key is a plain name")
        return str(node.value)

    def holds(self, place: Place) -> bool:
        """Whether something stands at a place."""
        return place in self._lines

    def where(self, *place: str | int) -> str:
        """What messages about a value begin with: the file, its line, its key."""
        for end in range(len(place), -1, -1):
            if (line := self._lines.get(place[:end])) is not None:
                break
        else:
            line = 1
        names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
        name = "".join(names).removeprefix(".")
        return f"{self.path}, line {line}{f': {name}' if name else ''}"


_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_COLLECTIONS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}


def _at(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _said(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error)
    return " ".join(str(problem).split())[:200]
