"""Damage to files, drawn from a seed: what disks, editors, crashes and strangers do to them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What stands in place of a value that a program expects.
VALUES: list[Any] = [None, True, -1, 0, 1e308, "", "x", [], [[]], {}, {"a": 1}, [0], [None], "\0", "\ud800"]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 5, 50))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _letter(content: bytes, rng: random.Random) -> bytes:
    """Another digit or letter, so that it stays well-formed."""
    places = [i for i, byte in enumerate(content) if chr(byte).isalnum()]
    place = rng.choice(places)
    other = rng.choice(b"0123456789" if chr(content[place]).isdigit() else b"abcdxyz")
    return content[:place] + bytes([other]) + content[place + 1 :]


def _lines(change: Callable[[list[bytes], random.Random], Any]) -> Callable[[bytes, random.Random], bytes]:
    def changed(content: bytes, rng: random.Random) -> bytes:
        lines = content.split(b"\n")
        change(lines, rng)
        return b"\n".join(lines)

    return changed


def _value(content: bytes, rng: random.Random) -> bytes:
    """One value in one line of JSON replaced by another type; other content is only flipped."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        whole = json.loads(lines[number])
        place = whole
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
    except (ValueError, TypeError, IndexError):
        return _flipped(content, rng)
    lines[number] = json.dumps(whole).encode()
    return b"\n".join(lines)


_NESTED = b"[" * 100_000

#: What the content becomes.
CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": _flipped,
    "a letter changed": _letter,
    "a value of another type": _value,
    "cut off": lambda content, rng: content[: rng.randrange(len(content))],
    "its beginning lost": lambda content, rng: content[rng.randrange(1, len(content)) :],
    "garbage behind": lambda content, rng: content + rng.randbytes(rng.choice((1, 7, 500))),
    "garbage in front": lambda content, rng: rng.randbytes(9) + content,
    "zeros in the middle": lambda content, rng: content[: len(content) // 3] + bytes(99) + content[len(content) // 2 :],
    "a line dropped": _lines(lambda lines, rng: lines.pop(rng.randrange(len(lines)))),
    "a line twice": _lines(lambda lines, rng: lines.append(rng.choice(lines))),
    "lines in another order": _lines(lambda lines, rng: rng.shuffle(lines)),
    "lines between": _lines(lambda lines, rng: lines.insert(rng.randrange(len(lines)), rng.choice(STRANGE))),
    "another file": lambda content, rng: rng.choice(STRANGE),
    "empty": lambda content, rng: b"",
}

STRANGE = [
    b"5", b"{", b"[]", b"null", b"{}", b"\xff\xfe", bytes(999), b'{"index": [0]}', b'{"index": 0, "input": null}',
    b'{"sha256": 1}', b'{"contexts": {"a": 1}, "questions": {}}', _NESTED, b'{"a": ' * 50_000, b"9" * 50_000,
]  # fmt: skip

#: What stands in the place of the file.
PLACES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a file": lambda path: path.symlink_to(__file__),
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def spoil(path: Path, seed: int) -> str:
    """Damage the file at `path`; says how."""
    rng = random.Random(seed)
    name = rng.choice([*CONTENTS, *CONTENTS, *PLACES])
    content = path.read_bytes()
    path.unlink()
    if name in PLACES:
        PLACES[name](path)
    else:
        path.write_bytes(CONTENTS[name](content, rng))
    return name


def clear(path: Path) -> None:
    """Remove whatever bears that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
