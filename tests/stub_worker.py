"""Speaks the protocol of a sweep's worker and makes its results up, as fast as they can be written.

What goes wrong is asked for by the environment variable `STUB`: a JSON object of lists of cells, by address or `*`,
under `user`, `memory`, `device`, `die`, `nothing`, `garbage`, `slow`. `once` under a name says that only the first try
goes wrong. Each try is a line in the file `STUB_TRIES`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import made_up


def main() -> None:
    lines: list[str] = []
    there, closed = threading.Condition(), threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            with there:
                lines.append(line)
                there.notify()
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    say({"ready": True, "pid": os.getpid()})
    while not closed.is_set():
        with there:
            while not lines:
                there.wait()
            message = json.loads(lines.pop(0))
        say({"id": message["id"], **one(message["id"], message["argv"])})


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def wanted(address: str, what: str) -> bool:
    asked = json.loads(os.environ.get("STUB", "{}"))
    if address not in asked.get(what, ()) and "*" not in asked.get(what, ()):
        return False
    if what not in asked.get("once", ()):
        return True
    return tries(address) <= 1


def tries(address: str) -> int:
    return Path(os.environ["STUB_TRIES"]).read_text().splitlines().count(address)


def one(address: str, argv: list[str]) -> dict[str, Any]:
    with Path(os.environ["STUB_TRIES"]).open("a") as stream:
        stream.write(f"{address}\n")
    given = {name.removeprefix("--"): value for name, value in zip(argv, argv[1:], strict=False) if name[:2] == "--"}
    print(f"running {address}", file=sys.stderr, flush=True)
    if wanted(address, "slow"):
        time.sleep(0.3)
    if wanted(address, "die"):
        os._exit(9)
    for kind in ("user", "memory", "device"):
        if wanted(address, kind):
            return {"ok": False, "kind": kind, "error": f"no {kind} <b>here</b>", "seconds": 0.1}
    if wanted(address, "garbage"):
        print("nonsense that a task prints", flush=True)
    if not wanted(address, "nothing"):
        write(Path(given["output_path"]), json.loads(given["model_args"]), given["tasks"], int(given.get("limit", 20)))
    return {"ok": True, "seconds": 0.1}


def write(output: Path, model_args: dict[str, Any], task: str, documents: int) -> None:
    short, length = task.removeprefix("forced_frontier_").rsplit("_", 1)
    model = str(model_args["pretrained"])
    known = model if model in made_up.SHAPES else next(iter(made_up.SHAPES))
    run = made_up.Run(known, model_args["method"], float(model_args.get("sparsity", 0.0)), length, (short,))
    content, lines = made_up.contents(run, documents)
    content["config"]["model_args"] = model_args
    folder = output / model.replace("/", "__")
    folder.mkdir(parents=True, exist_ok=True)
    date = f"2026-01-01T00-00-{time.time_ns()}"
    (folder / f"documents_{date}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / f"results_{date}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
