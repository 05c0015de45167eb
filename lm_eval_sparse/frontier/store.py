"""Documents on disk: one append-only JSON Lines file per fingerprint, so that no document is made twice.

Any number of processes may append at once and any of them may be killed at any moment: a document is one line
written by one call, a damaged line is skipped, and a document written twice is the same twice.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_warned = False


def cache_dir() -> Path:
    """`$LM_EVAL_SPARSE_CACHE`/docs, by default ~/.cache/lm_eval_sparse/docs. It need not exist."""
    return Path(os.environ.get("LM_EVAL_SPARSE_CACHE") or "~/.cache/lm_eval_sparse").expanduser() / "docs"


class DocumentStore:
    """The documents of one leaf under one fingerprint. A cache that cannot be used is one warning, not an error."""

    def __init__(self, name: str, fingerprint: str):
        self.path = cache_dir() / f"{name}-{fingerprint[:24]}.jsonl"
        self._usable = True

    def load(self) -> dict[int, dict[str, Any]]:
        """All whole documents of the file, by index. Lines that are no document (torn, foreign) are skipped."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._give_up(error)
            return {}
        docs: dict[int, dict[str, Any]] = {}
        for line in lines:
            try:
                doc = json.loads(line)
            except ValueError:  # includes undecodable bytes
                continue
            if isinstance(doc, dict) and {"index", "input", "target", "tokens"} <= doc.keys():
                docs[doc["index"]] = doc
        return docs

    def add(self, doc: dict[str, Any]) -> None:
        """Append one document."""
        if not self._usable:
            return
        line = json.dumps(doc, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":  # someone was killed while writing
                    line = b"\n" + line
                if os.write(file, line) != len(line):
                    raise OSError("the disk took only a part of a document")
            finally:
                os.close(file)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        global _warned
        self._usable = False
        if not _warned:
            _warned = True
            logger.warning(
                "cannot keep documents in %s (%s); they are made again in every run. "
                "Set LM_EVAL_SPARSE_CACHE to a folder that can be written.",
                self.path.parent,
                error.strerror or error,
            )
