"""GGUF files whose header lies."""

from __future__ import annotations

import os
import struct
from typing import Any

from . import EITHER, REFUSED, Row, Verdict, evaluate

AREA = "gguf"
_CODES = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def text(value: bytes, length: int | None = None) -> bytes:
    """A string of the format: its length, or the one that it claims, and its bytes."""
    return struct.pack("<Q", len(value) if length is None else length) + value


def value(kind: int, content: Any) -> bytes:
    """A value with its type before it; arrays are `(type of items, items)`, bytes go in as they are."""
    if isinstance(content, bytes) and kind != 8:
        return struct.pack("<I", kind) + content
    if kind == 8:
        return struct.pack("<I", kind) + text(content)
    return struct.pack(f"<I{_CODES[kind]}", kind, content)


def value_of(kind: int, content: bytes) -> bytes:
    """A value of any type, known or not, whose bytes are `content`."""
    return struct.pack("<I", kind) + content


def file(
    values: dict[bytes, bytes] | None = None, tensors: list[bytes] | None = None, *, version: int = 3,
    n_values: int | None = None, n_tensors: int | None = None, magic: bytes = b"GGUF", data: int = 4096,
) -> bytes:  # fmt: skip
    """A small file; what is given stands in its header as it is."""
    values = {b"general.architecture": value(8, b"llama")} | (values or {})
    tensors = [tensor()] if tensors is None else tensors
    head = magic + struct.pack(
        "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values
    )
    body = b"".join(text(key) + content for key, content in values.items()) + b"".join(tensors)
    whole = head + body
    return whole + b"\0" * (-len(whole) % 32 + data)


def tensor(name: bytes = b"a.weight", shape: tuple[int, ...] = (16, 16), kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the tensor table."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_MANY = 2**64 - 1
FILES: dict[str, bytes] = {
    "empty": b"",
    "four bytes": b"GGUF",
    "another magic": file(magic=b"GGML"),
    "cut in the head": file()[:10],
    "cut in the values": file()[:40],
    "cut in the data": file()[:-4000],
    "version 0": file(version=0),
    "version 1": file(version=1),
    "version 99": file(version=99),
    "values without end": file(n_values=_MANY),
    "tensors without end": file(n_tensors=_MANY),
    "a string without end": file({b"a": struct.pack("<I", 8) + text(b"x", _MANY)}),
    "a key without end": file()[:24] + struct.pack("<Q", _MANY) + b"x" * 4096,
    "an array without end": file({b"a": value(9, struct.pack("<IQ", 4, _MANY))}),
    "an array of strings without end": file({b"a": value(9, struct.pack("<IQ", 8, _MANY))}),
    "an array of arrays without end": file({b"a": value(9, struct.pack("<IQ", 9, 2**61))}),
    "an array of a billion nothings": file({b"a": value(9, struct.pack("<IQ", 9, 10**9))}),
    "arrays in arrays": file({b"a": value(9, struct.pack("<IQ", 9, 1) * 200)}),
    "an unknown type": file({b"a": value(13, b"")}),
    "a type of -1": file({b"a": struct.pack("<i", -1)}),
    "split.no a string": file({b"split.count": value(4, 2), b"split.no": value(8, b"x")}),
    "split.count a string": file({b"split.count": value(8, b"two")}),
    "split.count 2": file({b"split.count": value(4, 2)}),
    "split.count an array": file({b"split.count": value(9, struct.pack("<IQII", 4, 2, 1, 2))}),
    "alignment 0": file({b"general.alignment": value(4, 0)}),
    "alignment a string": file({b"general.alignment": value(8, b"x")}),
    "alignment -1": file({b"general.alignment": value(5, -1)}),
    "alignment 2**63": file({b"general.alignment": value(10, 2**63)}),
    "alignment a float": file({b"general.alignment": value(6, 0.5)}),
    "architecture a number": file({b"general.architecture": value(4, 5)}),
    "architecture unknown": file({b"general.architecture": value(8, b"nosuch")}),
    "no architecture": file().replace(b"general.architecture", b"general.brchitecture"),
    "a tensor of 9 dimensions": file(tensors=[tensor(shape=(1,) * 9)]),
    "a tensor without end": file(tensors=[tensor(shape=(_MANY, _MANY))]),
    "a tensor far away": file(tensors=[tensor(offset=2**63)]),
    "a tensor of an unknown type": file(tensors=[tensor(kind=999)]),
    "a tensor of no size": file(tensors=[tensor(shape=(0, 16))]),
    "no tensors": file(tensors=[]),
    "one name twice": file(tensors=[tensor(), tensor()]),
    "a name of bytes": file(tensors=[tensor(b"\xff\xfe\x1b[2J")]),
    "a key of bytes": file({b"\xff\xfe\x1b[2J": value(4, 1)}),
    "a sparse llama": file({b"llama.block_count": value(10, 2**62), b"llama.embedding_length": value(8, b"x")}),
    "blocks without end": file({b"llama.block_count": value(4, 2**31)}),
    "big-endian": file()[:4] + struct.pack(">I", 3) + file()[8:],
    "text": b"GGUF is a format\n" * 10,
}  # fmt: skip


_RUN = evaluate("pretrained=.,gguf_file=m.gguf")


def _row(name: str, content: bytes, verdict: Verdict = REFUSED) -> Row:
    return Row(AREA, name, _RUN, verdict, files={"m.gguf": content})


ROWS: list[Row] = [
    *(_row(name, content) for name, content in FILES.items()),
    Row(AREA, "a pipe", _RUN, make=lambda work, words: os.mkfifo(work / "m.gguf")),
    Row(AREA, "a folder", _RUN, make=lambda work, words: (work / "m.gguf").mkdir()),
    Row(AREA, "a device", _RUN,
        make=lambda work, words: (work / "m.gguf").symlink_to("/dev/zero")),
    Row(AREA, "beside a whole model", evaluate("pretrained=<llama>,gguf_file=<work>/m.gguf"), files={"m.gguf": file()},
        slow=True, doubt="without sizes in the header transformers builds a model of seven billion weights"),
    Row(AREA, "of another folder", evaluate("pretrained=<llama>,gguf_file=../m.gguf"), EITHER),
]  # fmt: skip
