"""The process in which a sweep runs its cells: what it answers, how it ends, and that no cell sees another."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family, tiny_llama, write_tasks

from lm_eval_sparse.cli.worker import UNUSABLE, kind_of
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import kept
from lm_eval_sparse.model.resume import FOLDER

#: Keys, at any depth, that say when, where and how fast a run was; and checksums of lines that hold its random name.
MOMENTARY = {
    "date", "began", "start_time", "end_time", "total_evaluation_time_seconds", "seconds", "tokens_per_second",
    "peak_memory_bytes", "pretty_env_info", "sha256",
}  # fmt: skip

#: A method that fails as is said in its knob, and prints.
FAULTY = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from lm_eval_sparse.methods import ScoredEviction

@dataclass(frozen=True)
class Faulty(ScoredEviction):
    """Fails."""
    name: ClassVar[str] = "faulty"
    importance: ClassVar[str] = "none"
    reference: ClassVar[str] = "none"
    tiny: ClassVar = {"capacity": 48}
    capacity: int = 1024
    fault: str = "device"

    def score(self, call):
        print("not for the protocol", flush=True)
        if self.fault == "device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if self.fault == "slow":
            import time
            time.sleep(60)
        if self.fault == "bug":
            raise ZeroDivisionError("in the method")
        return -call.key.float().norm(dim=-1)
'''


class Worker:
    """A worker as a parent sees it."""

    def __init__(self, errors: Path):
        self.errors = errors
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lm_eval_sparse.cli.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(),
            )  # fmt: skip
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"it ended with status {self.process.wait(10)}: {self.errors.read_text()[-2000:]}"
        return json.loads(line)

    def send(self, argv: list[str], name: str = "cell") -> None:
        self.process.stdin.write(json.dumps({"id": name, "argv": argv}) + "\n")
        self.process.stdin.flush()

    def run(self, argv: list[str], name: str = "cell") -> dict[str, Any]:
        self.send(argv, name)
        found = self.answer()
        assert found["id"] == name
        return found

    def end(self) -> int:
        self.process.stdin.close()
        status = self.process.wait(10)
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker")
    tiny_llama(folder / "model")
    tiny_llama(folder / "other", seed=3)
    write_tasks(folder / "tasks", (620, 500, 680))
    (folder / "faulty.py").write_text(FAULTY)
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    made: list[Worker] = []
    yield made
    for worker in made:
        worker.kill()


@pytest.fixture
def worker(tmp_path: Path, workers: list[Worker]) -> Worker:
    """One that may have run the cells of other tests: starting it takes longer than they do."""
    if not workers or workers[-1].process.poll() is not None:
        workers.append(Worker(tmp_path / "errors.txt"))
    return workers[-1]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Worker]:
    """One for this test."""
    made = Worker(tmp_path / "errors.txt")
    yield made
    made.kill()


def command(place: Path, output: Path, arguments: str, task: str, model: str = "model") -> list[str]:
    return [
        "--model", "sparse-hf", "--model_args", f"pretrained={place / model},{arguments}", "--tasks", task,
        "--include_path", str(place / "tasks"), "--output_path", str(output),
    ]  # fmt: skip


def faulty(place: Path, output: Path, fault: str) -> list[str]:
    method = f"method={place / 'faulty.py'}:Faulty,capacity=64,fault={fault}"
    return [*command(place, output, method, "tiny_generate"), "--allow-code"]


def files_of(output: Path) -> dict[str, Any]:
    """What a run has saved, without what is of a moment, its random name, and the folder."""
    (log,) = output.rglob(f"{FOLDER}/*/*.jsonl")  # named by the run; its folder by the configuration
    found = {}
    for path in sorted(output.rglob("*.json*")):
        text = path.read_text().replace(log.stem, "RUN").replace(str(output), "")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        name = f"{FOLDER}/{path.parent.name}" if path == log else re.sub(r"_[\dT.-]+(?=\.json)", "", path.name)
        found[name] = [_lasting(json.loads(line)) for line in lines]
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in MOMENTARY}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


class Alone:
    """Gives each command line a process in which nothing was run before; see tests/alone.py."""

    def __init__(self, errors: Path):
        self.errors = errors
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("alone.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(),
            )  # fmt: skip

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def ready(self) -> bool:
        return self.process.stdout.readline() == "ready\n"

    def run(self, argv: list[str]) -> int:
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


#: Each after one that leaves as much as possible: a model, kept prompts, patched attention, other knobs, other tasks.
CELLS = [
    ("method=dense,stats=full", "tiny_choice", "model"),
    ("method=quest,sparsity=0.8,page_size=8,stats=full", "tiny_choice", "model"),
    ("method=vertical_slash,sparsity=0.9,stats=full", "tiny_loglikelihood", "model"),
    ("method=snapkv+quest,kv_sparsity=0.3,decode_sparsity=0.4,stats=full", "tiny_generate", "model"),
    ("method=quest,budget=64,stats=full", "tiny_generate", "other"),
    ("method=dense,stats=full", "tiny_choice", "model"),
]


def test_cells_in_a_row_are_as_alone(worker: Worker, place: Path, tmp_path: Path) -> None:
    assert worker.ready["ready"] is True
    assert worker.ready["pid"] == worker.process.pid
    with Alone(tmp_path / "alone.txt") as alone:
        assert alone.ready()
        for number, (arguments, task, model) in enumerate(CELLS):
            answer = worker.run(command(place, tmp_path / f"in{number}", arguments, task, model), str(number))
            assert answer["ok"], answer
            by = command(place, tmp_path / f"by{number}", arguments, task, model)
            if number < len(CELLS) - 1:
                assert alone.run(by) == 0, alone.errors.read_text()[-2000:]
            else:  # the last as it is typed
                typed = [sys.executable, "-m", "lm_eval_sparse", *by]
                found = subprocess.run(typed, env=environment(), capture_output=True, text=True)
                assert found.returncode == 0, found.stderr[-2000:]
            mine, theirs = files_of(tmp_path / f"in{number}"), files_of(tmp_path / f"by{number}")
            assert sorted(name.split(".")[0].split("/")[0] for name in mine) == [
                "documents", "results", "resume_log", "sparse_stats",
            ]  # fmt: skip
            assert mine == theirs, arguments


def test_failures_leave_the_next_cell_alone(worker: Worker, place: Path, tmp_path: Path) -> None:
    answer = worker.run(command(place, tmp_path / "a", "method=nonsense", "tiny_choice"))
    assert (answer["ok"], answer["kind"]) == (False, "user")
    assert "nonsense" in answer["error"]
    assert "\n" not in answer["error"]
    assert "trace" not in answer
    answer = worker.run(command(place, tmp_path / "a", "method=dense", "no_such_task"))
    assert (answer["kind"], "no_such_task" in answer["error"]) == ("user", True)
    answer = worker.run(command(place, tmp_path / "a", "method=dense", "tiny_choice", "missing"))
    assert (answer["kind"], "missing" in answer["error"]) == ("user", True)
    answer = worker.run(["--nonsense"])
    assert answer["kind"] == "user"
    answer = worker.run(faulty(place, tmp_path / "a", "memory"))
    assert answer["kind"] == "memory"
    assert not list((tmp_path / "a").rglob("results*"))
    answer = worker.run(faulty(place, tmp_path / "a", "bug"))
    assert answer["kind"] in ("error", "user")
    worker.send([], "empty")
    assert worker.answer()["kind"] == "user"
    answer = worker.run(faulty(place, tmp_path / "b", "none"))  # prints, and every line here is of the protocol
    assert answer["ok"], answer
    assert list((tmp_path / "b").rglob("results*.json"))
    assert "not for the protocol" in worker.errors.read_text()
    answer = worker.run(faulty(place, tmp_path / "c", "device"))
    assert answer["kind"] == "device"
    assert worker.process.wait(10) == UNUSABLE


def test_end_of_input_ends_one_that_waits() -> None:
    command = [sys.executable, "-m", "lm_eval_sparse.cli.worker"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, env=environment(), timeout=60).returncode == 0


def test_end_of_input_ends_a_running_cell(own: Worker, place: Path, tmp_path: Path) -> None:
    own.send(faulty(place, tmp_path / "a", "slow"))
    await_print(own)
    began = time.monotonic()
    assert own.end() == 0
    assert time.monotonic() - began < 2
    assert not list((tmp_path / "a").rglob("results*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_running_cell(own: Worker, place: Path, tmp_path: Path, number: int) -> None:
    own.send(faulty(place, tmp_path / "a", "slow"))
    await_print(own)
    own.process.send_signal(number)
    assert own.process.wait(5) == 128 + number


FORKS = """
import os, signal, time
from lm_eval_sparse.cli import worker
worker._end_when_told()
for moment in (0, 0.2):
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(moment)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(1.5 * worker.GRACE)
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_signal_to_a_child_is_none_to_it() -> None:
    """lm-eval forks a pool for standard errors, and tells those of its processes to end that have not yet."""
    found = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, env=environment())
    assert found.stdout.split("\n") == ["-15", "-15", "goes on", ""], found.stderr
    assert found.returncode in (1, 128 + signal.SIGTERM) and "Terminated" in found.stderr


def test_a_killed_parent_ends_it(place: Path, tmp_path: Path) -> None:
    request = json.dumps({"id": "a", "argv": faulty(place, tmp_path / "a", "slow")})
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'lm_eval_sparse.cli.worker'], stdin=-1, stdout=-1, text=True)\n"
        f"print(p.pid, flush=True); p.stdout.readline(); p.stdin.write({request!r} + '\\n'); p.stdin.flush()\n"
        "print('sent', flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment())
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "sent\n"
    descriptor = os.pidfd_open(pid)
    parent.kill()
    parent.wait()
    assert select.select([descriptor], [], [], 2)[0], "the worker outlives its parent"
    os.close(descriptor)


def await_print(worker: Worker) -> None:
    for _ in range(600):
        if "not for the protocol" in worker.errors.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(worker.errors.read_text()[-2000:])


def test_kinds_of_errors() -> None:
    assert kind_of(UserError("no such thing")) == "user"
    assert kind_of(ZeroDivisionError()) == "error"
    assert kind_of(RuntimeError("CUDA error: device-side assert triggered")) == "device"
    assert kind_of(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")) == "device"
    assert kind_of(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")) == "memory"
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory.")) == "memory"
    assert kind_of(MemoryError()) == "memory"
    wrapped = UserError("the model does not run here")
    wrapped.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert kind_of(wrapped) == "device"


def test_what_is_left_on_a_model_is_undone() -> None:
    model = family("llama")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    wanted = model(ids).logits
    loaded = kept.Loaded("key", model, ([], []), "")
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    attention = model.model.layers[0].self_attn
    attention.forward = lambda *args, **kwargs: (torch.zeros(1, 5, 64), None)
    attention.register_forward_pre_hook(lambda *args: None)
    attention.note = 1
    attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight * 2)
    attention.extra = torch.nn.Linear(2, 2)
    model.config.rms_norm_eps = 0.5
    model.generation_config.do_sample = True
    model.model.rotary_emb.inv_freq.mul_(3)
    model.model.layers[1].mlp.__class__ = type("Other", (type(model.model.layers[1].mlp),), {})
    loaded.restore()
    assert torch.equal(model(ids).logits, wanted)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert not attention._forward_pre_hooks
    assert model.config.rms_norm_eps != 0.5
    assert model.generation_config.do_sample is not True
    assert attention.config is model.config
    assert type(model.model.layers[1].mlp).__name__ == "LlamaMLP"
