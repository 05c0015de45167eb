"""`lm-eval-sparse sweep`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_sparse.errors import UserError

from .parser import Command, Parser

if TYPE_CHECKING:
    import argparse

    from lm_eval_sparse.sweep.cell import Cell
    from lm_eval_sparse.sweep.drive import Slot
    from lm_eval_sparse.sweep.ledger import Ledger


def run(argv: list[str]) -> int:
    """Run what is left of a grid; 1 when cells failed. `status LEDGER` tells how far one is."""
    if argv[:1] == ["status"]:
        return _status(argv[1:])
    parser = Parser.of("sweep", "Run a grid of evaluations. What is done stays done; what is left runs, or goes on.")
    parser.add_argument("grid", metavar="GRID", help="a YAML file; docs/sweeps.md says what it may hold")
    parser.add_argument("--ledger", metavar="DIR", help="where cells are recorded (default: ./NAME, the grid's name)")
    parser.add_argument("--dry-run", action="store_true", help="print cells, time, memory, and what could be certified")
    parser.add_argument("--shard", metavar="I/N", default="1/1", help="run only the I-th of N parts, such as 2/8")
    parser.add_argument("--processes", metavar="N", help="processes on the CPU (default 1)")
    parser.add_argument("--gpus", metavar="LIST", help="GPUs, such as 0,1 (default: all there are; none: the CPU)")
    parser.add_argument("--per-gpu", metavar="K", default="1", help="processes that share a GPU (default 1)")
    parser.add_argument("--ray", metavar="ADDRESS", nargs="?", const="auto", help="run on a Ray cluster (extra [ray])")
    parser.add_argument("--no-raw", action="store_true", help="keep records only, not lm-eval's own results")
    parser.add_argument(
        "--allow-code", action="store_true", help="let methods be files of somebody's own, path.py:Class"
    )
    parser.add_argument("--tolerance", metavar="T", default="0.05", help="for --dry-run: a loss to certify (0.05)")
    parser.add_argument("--level", metavar="P", default="0.1", help="for --dry-run: chance of a false one (0.1)")
    given = parser.parse_args(argv)
    from lm_eval_sparse import paths
    from lm_eval_sparse.output import say
    from lm_eval_sparse.sweep import grid as grids
    from lm_eval_sparse.sweep.ledger import Ledger

    from . import sweep_checks

    number, of = shard_of(given.shard)
    grid = grids.read(paths.expand(f"GRID {given.grid}", given.grid), allow_code=given.allow_code)
    folder = paths.expand("--ledger", given.ledger) if given.ledger is not None else Path(grid.name)
    share = sweep_checks.whole("--per-gpu", given.per_gpu)
    if given.ray is not None and (given.gpus, given.processes) != (None, None):
        raise UserError("--ray asks the cluster where to run; leave out --gpus and --processes")
    slots = [] if given.ray is not None else sweep_checks.slots(given.gpus, given.processes, share)
    facts = sweep_checks.check(grid, allow_code=given.allow_code)
    there = Ledger.of(folder) if (folder / "ledger.json").is_file() else None
    sweep_checks.same_grid(grid, there)
    mine = grids.shard(grid.cells, number, of)
    if given.dry_run:
        say(sweep_checks.told(grid, mine, facts, there, slots, given.tolerance, given.level))
        return 0
    if slots:
        sweep_checks.check_fits(mine, facts, slots)
    ledger = Ledger.make(folder, grid.name)
    with ledger.shard(number, of):
        ledger.add(grid.cells)
        return _run(ledger, mine, given, slots, share)


def _run(ledger: Ledger, mine: list[Cell], given: argparse.Namespace, slots: list[Slot], share: int) -> int:
    from tqdm import tqdm

    from lm_eval_sparse.output import say
    from lm_eval_sparse.sweep.drive import Driver
    from lm_eval_sparse.sweep.status import status

    left = [cell for cell in mine if not ledger.is_done(cell.address)]
    with tqdm(total=len(mine), initial=len(mine) - len(left), unit="cell", desc=ledger.name, smoothing=0.1) as bar:

        def told(cell: Cell, answer: object) -> None:
            bar.update()
            if answer is not None and answer.kind != "ok":
                bar.write(f"failed: {cell.told()}: {answer.why}", file=sys.stderr)

        if given.ray is not None:
            from lm_eval_sparse.sweep import on_ray

            failed = on_ray.run(ledger, left, given.ray, keep_raw=not given.no_raw, share=share, told=told)
        else:
            failed = Driver(ledger, slots, keep_raw=not given.no_raw, told=told).run(left).failed
    say(status(ledger))
    say(f"lm-eval-sparse analyze {ledger.folder} --output {ledger.folder}-report")
    return 1 if failed else 0


def shard_of(text: str) -> tuple[int, int]:
    """`2/8` as two numbers. Raises `UserError`."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard {text:.40}: I/N is expected, with I from 1 to N, such as 2/8")
    return int(found[1]), int(found[2])


def _status(argv: list[str]) -> int:
    parser = Parser.of("sweep status", "How far a sweep is, and why cells failed.")
    parser.add_argument("ledger", metavar="LEDGER", help="the folder of a sweep")
    given = parser.parse_args(argv)
    from lm_eval_sparse import paths
    from lm_eval_sparse.output import say
    from lm_eval_sparse.sweep.ledger import Ledger
    from lm_eval_sparse.sweep.status import status

    say(status(Ledger.of(paths.expand(f"LEDGER {given.ledger}", given.ledger))))
    return 0


COMMAND = Command(
    "sweep GRID", "run a grid of evaluations, resumed by itself; 'sweep status LEDGER' tells how far", run
)
