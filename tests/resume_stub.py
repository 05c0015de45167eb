"""A stub of a model that answers prompts with the log of samples behind it, to be killed. It imports no torch.

`python resume_stub.py OUTPUT MARKS PROMPTS RANK RANKS`. Before a prompt is answered `made N` is appended to MARKS, and
`kept N` once the log has it: these lines survive `kill -9`, too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lm_eval_sparse.model.resume import SampleLog, digest

CONFIGURATION = {"method": "stub", "sparsity": 0.5}
#: Characters of an answer: a megabyte takes so long to write that processes are killed meanwhile.
LENGTHS = (10, 1000, 30_000, 1_000_000)


def key(number: int) -> str:
    return digest(["prompt", number])


def entry(number: int) -> dict[str, Any]:
    text = f"{number:04d} " * (LENGTHS[number % len(LENGTHS)] // 5)
    return {"number": number, "answers": {f"{number}.0": text, f"{number}.1": [-0.1 - number, False]}}


def main(output: str, marks: str, prompts: int, rank: int, ranks: int) -> None:
    assert "torch" not in sys.modules
    log = SampleLog(Path(output), CONFIGURATION, os.urandom(6).hex(), {"rank": rank})
    file = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in range(rank, prompts, ranks):
        if log.take(key(number), lambda found: found["number"]) is None:
            os.write(file, b"made %d\n" % number)
            log.append(key(number), entry(number))
            os.write(file, b"kept %d\n" % number)
    log.close()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
