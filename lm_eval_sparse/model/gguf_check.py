"""Is this GGUF file whole? Read its header, never its weights, and say so before anything heavy starts.

A copy that stopped half-way otherwise shows up as a traceback deep inside a loader, or not before minutes of
work. Knows the GGUF container (versions 2 and 3) and nothing about models, transformers or torch. The file may be
anyone's: nothing in it decides how much is read or kept, or how long that takes, beyond the bounds below.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .. import paths
from ..errors import UserError, nearest
from ..results.files import brief, opened

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_AGAIN = "copy or download it again"

#: Bounds, each some ten times what the largest models have: bytes of the header, metadata values and tensors (of
#: either), items of all lists (vocabulary, merges), bytes of one tensor, the alignment of tensors.
_MOST_BYTES = 2**28
_MOST_ROWS = 100_000
_MOST_ITEMS = 6_000_000
#: A list in a list costs as much as so many numbers.
_LIST = 100
_LARGEST = 2**62
_MOST_ALIGNMENT = 2**20
_CHUNK = 2**22


class _EndsEarly(Exception):
    """The header asks for bytes up to `needed`, and the file has fewer."""

    def __init__(self, needed: int):
        self.needed = needed


class _Damaged(Exception):
    """The header holds a value that no GGUF writer produces."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself: `metadata` by key, and the file size (bytes) its tensors call for."""

    metadata: dict[str, Any]
    n_tensors: int
    bytes_needed: int


def check(path: Path) -> None:
    """Raise `UserError` (one line) unless `path` is a GGUF file with all its bytes.

    Costs milliseconds: strings are stepped over, weights are not touched.
    """
    metadata = read_header(Path(path), strings=False).metadata
    parts, part = metadata.get("split.count", 1), metadata.get("split.no", 0)
    for key, value in (("split.count", parts), ("split.no", part)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(
                f"GGUF file {path} has a damaged header ({key} is {brief(value)}, not a whole number of at least 0); "
                f"{_AGAIN}"
            )
    if parts > 1:
        # A loader that sees one part fills the tensors of the others with random numbers.
        raise UserError(
            f"{path} is part {part + 1} of a GGUF model split into {parts} files, and only whole files load; "
            "join them with `llama-gguf-split --merge` and give the joined file"
        )


def read_header(path: Path, strings: bool = True) -> Header:
    """Parse the header of `path` and check the file is as long as its tensor table says.

    `strings=False` leaves arrays of strings (vocabulary, merges) out of `metadata`, which is all that takes time.
    Raises `UserError` when the file is missing, is no GGUF file, is damaged or is truncated.
    """
    path = Path(path)
    if paths.is_dir(path):
        raise UserError(f"{path} is a folder, not a GGUF file; name the file{_gguf_files(path)}")
    if not os.path.islink(path) and not paths.exists(path):
        paths.expand(f"GGUF file {path}", path)  # says so where no file can have this name
        near = nearest(path.name, (p.name for p in _listing(path.parent)))
        raise UserError(f"GGUF file {path} does not exist{near or _gguf_files(path.parent)}")
    try:
        with opened(path) as (file, size):
            magic = file.read(4)
            header = _Reader(file, size).header(strings) if magic == b"GGUF" else None
    except UserError as error:
        raise UserError(f"GGUF file {error}") from None
    except _EndsEarly as short:
        raise UserError(
            f"GGUF file {path} is truncated inside its header: {size:,} bytes on disk, "
            f"at least {short.needed:,} needed; {_AGAIN}"
        ) from None
    except _Damaged as error:
        raise UserError(f"GGUF file {path} has a damaged header ({error}); {_AGAIN}") from None
    if header is None:
        found = f"it starts with {magic!r}" if magic else "it is empty"
        raise UserError(f"{path} is not a GGUF file: {found}, not b'GGUF'; {_AGAIN}, or give another file")
    if size < header.bytes_needed:
        raise UserError(
            f"GGUF file {path} is truncated: {size:,} bytes on disk, {header.bytes_needed:,} needed "
            f"({header.bytes_needed - size:,} missing); {_AGAIN}"
        )
    return header


class _Reader:
    """Walks the header front to back. Every length is checked against the file before it is used.

    The file is read, not mapped: where another process shortens a mapped file, ours would be ended by a signal.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.pos, self.order = file, size, 4, "<"
        self.data, self.items = bytearray(b"GGUF"), 0

    def take(self, n: int) -> int:
        """Step over `n` bytes, which are in `data` then, and return where they start."""
        start, end = self.pos, self.pos + n
        if end > len(self.data):
            self.read(end)
        self.pos = end
        return start

    def read(self, end: int) -> None:
        """Have `data` reach to byte `end` at least."""
        if end > self.size:
            raise _EndsEarly(end)
        if end > _MOST_BYTES:
            raise _Damaged(f"it has more than {_MOST_BYTES:,} bytes")
        self.data += self.file.read(max(end - len(self.data), _CHUNK))
        if end > len(self.data):  # the file has become shorter
            raise _EndsEarly(end)

    def rows(self, what: str) -> int:
        n = self.scalar("Q")
        if self.pos + 12 * n > self.size:  # a length of 8 bytes and a type or a number of 4 each, at least
            raise _EndsEarly(self.pos + 12 * n)
        if n > _MOST_ROWS:
            raise _Damaged(f"{n:,} {what}")
        return n

    def scalar(self, code: str) -> Any:
        start = self.take(struct.calcsize("=" + code))
        return struct.unpack_from(self.order + code, self.data, start)[0]

    def string(self) -> str:
        n = self.scalar("Q")
        start = self.take(n)
        return self.data[start : start + n].decode("utf-8", errors="replace")

    def value(self, kind: int, strings: bool, depth: int = 0) -> Any:
        """Return a metadata value; None stands for an array of strings that was not asked for."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or depth > 4:
            raise _Damaged(f"value type {kind} at byte {self.pos - 4:,}")
        item, n = self.scalar("I"), self.scalar("Q")
        # Each item takes at least its own 8-byte length: a nonsense count is found here, not after a long walk.
        size = n * (struct.calcsize("=" + _SCALARS[item]) if item in _SCALARS else 8)
        if self.pos + size > self.size:
            raise _EndsEarly(self.pos + size)
        self.items += n if item != _ARRAY else n * _LIST
        if self.items > _MOST_ITEMS:
            raise _Damaged(f"lists of more than {_MOST_ITEMS:,} items at byte {self.pos:,}")
        if item in _SCALARS:
            start = self.take(size)
            return list(struct.unpack_from(f"{self.order}{n}{_SCALARS[item]}", self.data, start))
        if item == _STRING and not strings:
            self.skip_strings(n)
            return None
        return [self.value(item, strings, depth + 1) for _ in range(n)]

    def skip_strings(self, n: int) -> None:
        """Step over `n` strings. Apart from `string` because half a million of them must cost well under a second."""
        unpack, data, pos, have = struct.Struct(self.order + "Q").unpack_from, self.data, self.pos, len(self.data)
        for _ in range(n):
            if pos + 8 > have:
                self.read(pos + 8)
                have = len(data)
            pos += 8 + unpack(data, pos)[0]
        if pos > have:
            self.read(pos)
        self.pos = pos

    def header(self, strings: bool) -> Header:
        version = self.scalar("I")
        if version & 0xFFFF == 0 and version:  # a big-endian file read as little-endian
            self.order = ">"
            version = struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in _VERSIONS:
            raise _Damaged(f"version {version}; versions {' and '.join(map(str, _VERSIONS))} can be read")
        n_tensors, n_values = self.rows("tensors"), self.rows("metadata values")
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = self.string()
            if key in metadata:
                raise _Damaged(f"{brief(key)!r} is there twice")
            metadata[key] = self.value(self.scalar("I"), strings)
        names, end = set(), 0
        for _ in range(n_tensors):
            name, needed = self.tensor()
            if name in names:
                raise _Damaged(f"tensor {brief(name)!r} is there twice")
            names.add(name)
            end = max(end, needed)
        alignment = metadata.get("general.alignment", 32)
        # A power of two has one bit.
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise _Damaged(f"alignment {brief(alignment)}")
        start = -(-self.pos // alignment) * alignment
        return Header(metadata, n_tensors, start + end if names else self.pos)

    def tensor(self) -> tuple[str, int]:
        """Name of the next tensor, and the byte after its last, counted from the start of all weights."""
        name, n_dims = self.string(), self.scalar("I")
        if n_dims > 4:
            raise _Damaged(f"tensor {brief(name)!r} with {n_dims} dimensions")
        shape = [self.scalar("Q") for _ in range(n_dims)]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if max(offset, math.prod(shape)) > _LARGEST:
            raise _Damaged(f"tensor {brief(name)!r} of shape {shape} at byte {offset}")
        return name, offset + _tensor_bytes(kind, math.prod(shape))


def _tensor_bytes(kind: int, n: int) -> int:
    """Bytes of `n` weights of GGML type `kind`; 0 for a type newer than the installed `gguf` knows."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # here, so that importing this module costs nothing

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return 0
    return -(-n // block) * size


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.gguf"))
    except (OSError, ValueError):  # ValueError: a name with a null character
        return []


def _gguf_files(folder: Path) -> str:
    """`; found there: a.gguf, b.gguf`, or the empty string."""
    names = [p.name for p in _listing(folder)]
    return f"; found there: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""
