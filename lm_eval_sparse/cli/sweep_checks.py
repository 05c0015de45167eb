"""What can be known of a grid before it runs: names that nobody has, models that do not fit, what it will take.

The one place of a sweep that knows methods, tasks and models.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_sparse.errors import UserError, nearest
from lm_eval_sparse.labels import label
from lm_eval_sparse.sweep import predict
from lm_eval_sparse.sweep.cell import Cell
from lm_eval_sparse.sweep.drive import Slot
from lm_eval_sparse.sweep.status import hours

from .analysis_options import number

if TYPE_CHECKING:
    from lm_eval_sparse.sweep.grid import Grid
    from lm_eval_sparse.sweep.ledger import Ledger

#: Cells that a dry run names; with more it counts them.
_NAMED = 40


# -- where


def slots(gpus: str | None, processes: str | None, shared: int) -> list[Slot]:
    """Places for processes: those of the GPUs, or of the CPU. Raises `UserError`."""
    wanted = _gpus(gpus)
    if wanted and processes is not None:
        raise UserError("--processes is for the CPU; type --gpus none beside it, or --per-gpu K")
    if not wanted:
        many = whole("--processes", processes or "1")
        import psutil

        threads = str(max(1, (os.cpu_count() or 1) // many))
        bound = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
        return [Slot(f"cpu{at}", bound, _part(psutil.virtual_memory().available, many)) for at in range(many)]
    there = devices()
    return [
        Slot(f"gpu{gpu}{f'-{at}' if shared > 1 else ''}", {"CUDA_VISIBLE_DEVICES": gpu}, _part(there[gpu], shared))
        for at in range(shared)
        for gpu in wanted
    ]


def _part(free: int, sharing: int) -> tuple[str, ...]:
    """How much a process may fill with prompts that it has read: alone half of what is free, which it finds itself, and
    its part of a quarter beside others, whose weights and prompts are not there yet."""
    return () if sharing == 1 else ("--share-prefill", str(free // (4 * sharing)))


def _gpus(given: str | None) -> list[str]:
    there = devices()
    if given is None:
        return list(there)
    if given == "none":
        return []
    wanted = given.split(",")
    for name in wanted:
        if name not in there:
            what = f"there are {', '.join(there)}" if there else "there are none here"
            raise UserError(f"--gpus {given:.60}: {label(name, 20)!r} is no GPU of this machine: {what}; or type none")
    return wanted


_DEVICES = """
import json, torch
print(json.dumps({str(at): torch.cuda.mem_get_info(at)[0] for at in range(torch.cuda.device_count())}))
"""


def devices() -> dict[str, int]:
    """GPUs of this machine as `CUDA_VISIBLE_DEVICES` names them, with their free bytes. Another process asks: one that
    has asked keeps memory there."""
    import torch

    if not torch.cuda.is_available():
        return {}
    done = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=120, check=False)
    try:
        found: dict[str, int] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise UserError(f"the GPUs of this machine cannot be asked ({last}); type --gpus none for the CPU") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(found)
    return dict(zip(names, found.values(), strict=False))


def whole(option: str, text: str) -> int:
    """A number of processes. Raises `UserError`."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise UserError(f"{option} {text:.20}: a whole number is expected, at least 1")
    return int(text)


# -- what


def check(grid: Grid, *, allow_code: bool) -> dict[str, predict.Facts]:
    """Refuse names that nobody has; say what is known of the models.

    Raises:
        UserError: with the line of the grid that asks for it.
    """
    _check_tasks(grid)
    _check_methods(grid, allow_code)
    return {name: facts for name, cell in grid.models.items() if (facts := _facts(grid, cell)) is not None}


@functools.cache
def _task_names(include: tuple[str, ...]) -> frozenset[str]:
    """Names of all tasks, also of those in other folders. Finding them takes seconds."""
    from lm_eval_sparse import patches

    patches.install()
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=list(include) or None).all_tasks)


def _check_tasks(grid: Grid) -> None:
    include = {str(path) for cell in grid.cells if (path := cell.run.get("include_path"))}
    known = _task_names(tuple(sorted(include)))
    for cell in grid.cells:
        if cell.task not in known:
            raise UserError(
                f"{grid.places[cell.address]}: tasks: {cell.task} is unknown{nearest(cell.task, known)}; type "
                "`lm_eval ls tasks` to see the names"
            )


def _check_methods(grid: Grid, allow_code: bool) -> None:
    from lm_eval_sparse import spelling
    from lm_eval_sparse.methods import plan

    seen: set[str] = set()
    with spelling.allowing_code(allow_code):
        for cell in grid.cells:
            text = json.dumps(cell.sparse, sort_keys=True)
            if text not in seen:
                seen.add(text)
                where = f"{grid.places[cell.address]}: methods"
                try:
                    ours, others = plan.split(dict(cell.sparse))
                    if others:
                        raise UserError(f"{min(others)}: no such knob{nearest(min(others), plan.argument_names())}")
                    plan.parse(ours, quiet=True)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None


def _facts(grid: Grid, cell: Cell) -> predict.Facts | None:
    """What is known of a model before it is loaded; None where its configuration does not say it.

    Raises:
        UserError: there is no such model.
    """
    from lm_eval_sparse.model import embedded
    from lm_eval_sparse.model.load import check_path

    where = grid.places[cell.address]
    if embedded.is_embedded(cell.pretrained):
        pretrained, more = str(embedded.ensure()), {"gguf_file": None}
    else:
        try:
            pretrained, more = check_path(cell.pretrained, cell.model_args.get("gguf_file")), dict(cell.model_args)
        except UserError as error:
            raise UserError(f"{where}: models: {error}") from None
    from transformers import AutoConfig

    options = {
        name: more[name] for name in ("revision", "subfolder", "gguf_file", "trust_remote_code") if more.get(name)
    }
    try:
        config = AutoConfig.from_pretrained(pretrained, **options).get_text_config(decoder=True)
    except Exception as error:  # configurations of any kind meet code that expects its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{where}: models: {label(cell.model)} cannot be read ({reason}); give a folder or a Hub name"
        ) from None
    return facts_of(config, Path(pretrained), more)


#: Bytes of a parameter, by dtype.
_BYTES = {"float64": 8, "double": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


def facts_of(config: Any, folder: Path, model_args: dict[str, Any]) -> predict.Facts | None:
    """Facts of a model by its configuration and files; None where the configuration has other names for them."""
    try:
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or hidden // heads
        mlp, vocab = config.intermediate_size, config.vocab_size
        own = layers * (2 * hidden * dim * (heads + kv_heads) + 3 * hidden * mlp)
        own += hidden * vocab * (1 if getattr(config, "tie_word_embeddings", True) else 2)
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    except (AttributeError, TypeError, ZeroDivisionError):
        return None
    dtype = str(model_args.get("dtype") or getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    size = _BYTES.get(dtype, 2)
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    held = own * size
    if files and dtype == "auto" or experts and files:  # as they lie there
        held = files
    if model_args.get("load_in_8bit") or model_args.get("load_in_4bit"):
        held = own // (1 if model_args.get("load_in_8bit") else 2)
    return predict.Facts(
        int(own), int(held), 2 * layers * kv_heads * dim * size, 4 * layers * heads * dim, size * (4 * hidden + 3 * mlp)
    )


def check_fits(cells: Sequence[Cell], facts: dict[str, predict.Facts], places: Sequence[Slot]) -> None:
    """Raise `UserError` for a model that is larger than the device it is to run on."""
    free, what, sharing = _free(places)
    for cell in cells:
        if cell.model not in facts:
            continue
        needed = predict.memory(cell, facts[cell.model])
        if needed > free:
            shared = f", which {sharing} processes share" if sharing > 1 else ""
            raise UserError(
                f"{label(cell.model)} with prompts of {cell.length or 'unknown length'} needs some "
                f"{needed / 2**30:.1f} GiB, and {what} has {free * sharing / 2**30:.1f} GiB free{shared}; take it out "
                "of the grid, give it a smaller dtype, or fewer processes"
            )


def _free(places: Sequence[Slot]) -> tuple[float, str, int]:
    """Free bytes of a place, where that is, and how many places share it."""
    gpus = [place.environment.get("CUDA_VISIBLE_DEVICES", "") for place in places]
    if gpus and gpus[0]:
        there = devices()
        sharing = max(gpus.count(gpu) for gpu in gpus)
        smallest = min(gpus, key=lambda gpu: there[gpu])
        return there[smallest] / sharing, f"GPU {smallest}", sharing
    import psutil

    return psutil.virtual_memory().available / len(places), "this machine", len(places)


def same_grid(grid: Grid, ledger: Ledger | None) -> None:
    """Raise `UserError` for a ledger of another grid: what it has is nowhere in this one."""
    if ledger is None:
        return
    if ledger.name != grid.name:
        raise UserError(
            f"{ledger.folder} is the ledger of the grid {label(ledger.name)}, and this one is called "
            f"{label(grid.name)}; give another folder: --ledger DIR"
        )
    done = ledger.addresses()
    if done and not done & {cell.address for cell in grid.cells}:
        raise UserError(
            f"none of the {len(done)} cells that are done in {ledger.folder} is in this grid, though it has its name; "
            "give another folder: --ledger DIR, or another name: in the grid"
        )


# -- what it will take


def told(
    grid: Grid,
    mine: Sequence[Cell],
    facts: dict[str, predict.Facts],
    ledger: Ledger | None,
    places: Sequence[Slot],
    tolerance: str,
    level: str,
) -> str:
    """What a dry run prints."""
    addresses = {cell.address for cell in mine}
    done_there = ledger.addresses() if ledger is not None else set()
    left = [cell for cell in mine if cell.address not in done_there]
    device = "cuda" if not places or places[0].environment.get("CUDA_VISIBLE_DEVICES") else "cpu"
    known = {}
    if ledger is not None:
        plan, seconds = ledger.plan(), ledger.seconds()
        known = {address: (plan[address], took) for address, took in seconds.items() if address in plan}
    expected = predict.time(left, facts, known, device)
    lines = [
        f"{grid.name}: {len(grid.cells)} cells; of these {len(addresses)} here, {len(mine) - len(left)} of them done"
    ]
    for cell in left[:_NAMED]:
        lines.append(f"  {cell.address}  {cell.told()}  {hours(expected.seconds[cell.address])}")
    if len(left) > _NAMED:
        lines.append(f"  and {len(left) - _NAMED} more")
    how = f"{expected.measured} as cells like them took"
    if expected.measured < len(left):
        how += (
            f", {len(left) - expected.measured} by operations at {predict.RATES[device]:.0e} a second or as done so far"
        )
    many = f"; {hours(expected.total / len(places))} with {len(places)} processes" if len(places) > 1 else ""
    lines.append(f"time: {hours(expected.total)} of one process ({how}){many}")
    free, what, _ = _free(places) if places else (float("inf"), "a node", 1)
    for name, fact in facts.items():
        most = max((predict.memory(cell, fact) for cell in mine if cell.model == name), default=0)
        fits = "" if most <= free else f": MORE than a process has on {what} ({free / 2**30:.1f} GiB)"
        lines.append(f"memory: {label(name)} some {most / 2**30:.1f} GiB{fits}")
    lines += [f"memory: {label(name)} is not known before it is loaded" for name in grid.models if name not in facts]
    lines += _certifiable(mine, number("--tolerance", tolerance), number("--level", level))
    return "\n".join(lines)


def _certifiable(cells: Sequence[Cell], tolerance: float, level: float) -> list[str]:
    """What numbers of documents could certify, where no document loses anything."""
    from lm_eval_sparse.analysis import guarantee

    guarantee.check_options(tolerance, level)
    rows: dict[tuple[str, str | None], set[str]] = {}
    limits: dict[tuple[str, str | None], set[int | None]] = {}
    for cell in cells:
        rows.setdefault((cell.model, cell.length), set()).add(cell.task)
        limits.setdefault((cell.model, cell.length), set()).add(cell.limit)
    found: dict[str, None] = {}
    for key, tasks in rows.items():
        for limit in sorted(limits[key], key=lambda value: value or 0):
            where = f"{key[1]} tokens" if key[1] else "tasks without a length"
            if limit is None:
                found[f"certificates: {where}: all documents of a task; how many that is shows when it has run"] = None
                continue
            alone = guarantee.could_certify(limit, level)
            shared = guarantee.could_certify(limit, level, len(tasks))
            few = guarantee.too_few(limit, tolerance, level, len(tasks))
            verdict = f"; {few}" if few else ""
            family = f", {shared:.3f} for one of {len(tasks)} tasks (Holm)" if len(tasks) > 1 else ""
            found[
                f"certificates: {where}: {limit} documents without a loss certify a loss of {alone:.3f} at best for a "
                f"task alone{family}{verdict}"
            ] = None
    return list(found)
