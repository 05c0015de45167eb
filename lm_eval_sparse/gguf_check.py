"""Is this GGUF file whole? Read its header, never its weights, and say so before anything heavy starts.

A copy that stopped half-way otherwise shows up as a traceback deep inside a loader, or not before minutes of
work. Knows the GGUF container (versions 2 and 3) and nothing about models, transformers or torch.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, nearest

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_AGAIN = "copy or download it again"


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
    header = read_header(Path(path), strings=False)
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        # A loader that sees one part fills the tensors of the others with random numbers.
        part = header.metadata.get("split.no", 0) + 1
        raise UserError(
            f"{path} is part {part} of a GGUF model split into {parts} files, and only whole files load; "
            "join them with `llama-gguf-split --merge` and give the joined file"
        )


def read_header(path: Path, strings: bool = True) -> Header:
    """Parse the header of `path` and check the file is as long as its tensor table says.

    `strings=False` leaves arrays of strings (vocabulary, merges) out of `metadata`, which is all that takes time.
    Raises `UserError` when the file is missing, is no GGUF file, is damaged or is truncated.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a GGUF file; name the file{_gguf_files(path)}")
        if not path.exists():
            near = nearest(path.name, (p.name for p in _listing(path.parent)))
            raise UserError(f"GGUF file {path} does not exist{near or _gguf_files(path.parent)}")
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                found = f"it starts with {magic!r}" if magic else "it is empty"
                raise UserError(f"{path} is not a GGUF file: {found}, not b'GGUF'; {_AGAIN}, or give another file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                size = len(data)
                header = _Reader(data).header(strings)
    except OSError as error:
        raise UserError(f"cannot read GGUF file {path}: {error.strerror or error}") from None
    except _EndsEarly as short:
        raise UserError(
            f"GGUF file {path} is truncated inside its header: {size:,} bytes on disk, "
            f"at least {short.needed:,} needed; {_AGAIN}"
        ) from None
    except _Damaged as error:
        raise UserError(f"GGUF file {path} has a damaged header ({error}); {_AGAIN}") from None
    if size < header.bytes_needed:
        raise UserError(
            f"GGUF file {path} is truncated: {size:,} bytes on disk, {header.bytes_needed:,} needed "
            f"({header.bytes_needed - size:,} missing); {_AGAIN}"
        )
    return header


class _Reader:
    """Walks the header front to back. Every length is checked against the file before it is used."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.pos, self.order = data, len(data), 4, "<"

    def take(self, n: int) -> int:
        """Step over `n` bytes and return where they start."""
        start = self.pos
        if start + n > self.size:
            raise _EndsEarly(start + n)
        self.pos = start + n
        return start

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
        if item in _SCALARS:
            code = _SCALARS[item]
            start = self.take(n * struct.calcsize("=" + code))
            return list(struct.unpack_from(f"{self.order}{n}{code}", self.data, start))
        # Each item takes at least its own 8-byte length: a nonsense count is found here, not after a long walk.
        if self.pos + 8 * n > self.size:
            raise _EndsEarly(self.pos + 8 * n)
        if item == _STRING and not strings:
            self.skip_strings(n)
            return None
        return [self.value(item, strings, depth + 1) for _ in range(n)]

    def skip_strings(self, n: int) -> None:
        """Step over `n` strings. Apart from `string` because half a million of them must cost well under a second."""
        unpack, data, pos, size = struct.Struct(self.order + "Q").unpack_from, self.data, self.pos, self.size
        for _ in range(n):
            if pos + 8 > size:
                raise _EndsEarly(pos + 8)
            pos += 8 + unpack(data, pos)[0]
        if pos > size:
            raise _EndsEarly(pos)
        self.pos = pos

    def header(self, strings: bool) -> Header:
        version = self.scalar("I")
        if version & 0xFFFF == 0 and version:  # a big-endian file read as little-endian
            self.order = ">"
            version = struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in _VERSIONS:
            raise _Damaged(f"version {version}; versions {' and '.join(map(str, _VERSIONS))} can be read")
        n_tensors, n_values = self.scalar("Q"), self.scalar("Q")
        metadata = {}
        for _ in range(n_values):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"), strings)
        ends = []
        for _ in range(n_tensors):
            name, n_dims = self.string(), self.scalar("I")
            if n_dims > 4:
                raise _Damaged(f"tensor {name!r} with {n_dims} dimensions")
            shape = [self.scalar("Q") for _ in range(n_dims)]
            kind, offset = self.scalar("I"), self.scalar("Q")
            ends.append(offset + _tensor_bytes(kind, math.prod(shape)))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damaged(f"alignment {alignment!r}")
        start = -(-self.pos // alignment) * alignment
        return Header(metadata, n_tensors, start + max(ends) if ends else self.pos)


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
    except OSError:
        return []


def _gguf_files(folder: Path) -> str:
    """`; found there: a.gguf, b.gguf`, or the empty string."""
    names = [p.name for p in _listing(folder)]
    return f"; found there: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""
