"""Several processes give what one gives, sample for sample; one that is gone ends the others in a line."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import tiny
import torch
import yaml
from lm_eval.loggers import EvaluationTracker
from small_lms import PROMPTS, score, sparse

from lm_eval_sparse import patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import parallel
from lm_eval_sparse.model.parallel import Place, check, check_same, in_order, place_of, rank_of_cache
from lm_eval_sparse.model.watch import Watch
from lm_eval_sparse.protocol import SKIPPED

patches.install()

HERE = Path(__file__).resolve().parent
#: Of the launchers, which the tests themselves may have been started by.
LAUNCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"
)  # fmt: skip


# --- the whole run ---------------------------------------------------------------------------------------------------


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The one results file in a folder, and the samples beside it by task, without what tells two runs apart."""
    (file,) = folder.rglob("results_*.json")
    samples = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = samples[path.name.removeprefix("samples_").rpartition("_")[0]] = []
        for line in path.read_text().splitlines():
            rows.append(json.loads(line))
            for measured in rows[-1]["sparse"]["requests"]:
                del measured["run"]
    return json.loads(file.read_text()), samples


def nearly(left: Any, right: Any) -> bool:
    """Equal but for the order in which floating-point numbers were added."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(nearly(value, right[key]) for key, value in left.items())
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-12)
    return left == right


def start(command: list[str], rank: int, port: int, log: Path) -> subprocess.Popen[bytes]:
    """One of two processes, as torchrun starts them (which is one more that imports torch)."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    own["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [own.get("PYTHONPATH")])])
    own |= {**launched(rank, 2, rank, 2), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT)


def test_two_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of requests, few-shot examples drawn one after the other, an odd number of documents, a task with fewer
    documents than there are processes."""
    folder = tiny.write_tasks(tmp_path / "tasks", (110, 190, 140, 9, 75))
    single = yaml.safe_load((folder / "tiny_choice.yaml").read_text())
    data = folder / "single.json"
    data.write_text(json.dumps(tiny.documents()[1]) + "\n")
    single |= {"task": "tiny_single", "num_fewshot": 0}
    single["dataset_kwargs"]["data_files"] = {"test": str(data)}
    (folder / "tiny_single.yaml").write_text(yaml.safe_dump(single))
    names = ["tiny_single", *tiny.TASKS]
    model = {
        "pretrained": str(tiny.tiny_llama(tmp_path / "model")), "dtype": "float32", "method": "block_sparse+quest",
        "sparsity": 0.5, "backend": "gather",
    }  # fmt: skip
    for name, value in {"HF_HUB_OFFLINE": "1", "LM_EVAL_SPARSE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    command = [
        *(sys.executable, str(HERE / "few_tasks.py"), "run", "--model", "sparse-hf", "--tasks", ",".join(names)),
        *("--model_args", ",".join(f"{name}={value}" for name, value in model.items())),
        *("--include_path", str(folder), "--num_fewshot", "2", "--log_samples", "--output_path", str(tmp_path / "two")),
        *("--use_cache", str(tmp_path / "answers")),
    ]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [start(command, rank, port, tmp_path / f"{rank}.log") for rank in (0, 1)]
    try:
        threads = torch.get_num_threads()
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        torch.set_num_threads(1)
        try:
            tracker = EvaluationTracker(output_path=str(tmp_path / "one"))
            found = lm_eval.simple_evaluate(
                model="sparse-hf", model_args=model, tasks=names, task_manager=tiny.manager(folder), num_fewshot=2,
                evaluation_tracker=tracker,
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for task in found["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        for rank, process in enumerate(started):
            assert process.wait(240) == 0, (rank, (tmp_path / f"{rank}.log").read_text()[-3000:])
    finally:
        for process in started:
            process.kill()
    (one, by_one), (two, by_two) = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert by_one.keys() == by_two.keys() == set(names)
    for task, rows in by_one.items():
        assert by_two[task] == rows, task
        assert [row["doc_id"] for row in rows] == ([0] if task == "tiny_single" else [0, 1, 2, 3, 4])
    assert two["results"] == one["results"]  # standard errors, which are drawn, too
    assert two["n-samples"] == one["n-samples"]
    one_block, two_block = one["config"]["sparse"], two["config"]["sparse"]
    assert two_block["processes"]["number"] == len(two_block["processes"]["devices"]) == 2
    assert "processes" not in one_block
    assert nearly(one_block["phases"], two_block["phases"]) and nearly(one_block["tasks"], two_block["tasks"])
    assert one_block["prompts"] == two_block["prompts"] == 1 + 4 * 5
    assert {path.name for path in tmp_path.glob("answers_rank*.db")} == {"answers_rank0.db", "answers_rank1.db"}


# --- one that is gone ------------------------------------------------------------------------------------------------

STUB = """
import json, pathlib, sys, time
from lm_eval_sparse.model import watch
from lm_eval_sparse.model.watch import Watch
from types import SimpleNamespace
watch._OWN_WORDS = .3
folder, rank, what = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def exchange(mine):
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(mine))
    part.rename(folder / f"{rank}.json")
    files = [folder / f"{other}.json" for other in range(3)]
    while not all(file.exists() for file in files):
        time.sleep(.01)
    return [json.loads(file.read_text()) for file in files]
with Watch(SimpleNamespace(rank=rank, world_size=3, one_host=True), exchange):
    print("ready", flush=True)
    if what == "wrong":
        raise ValueError("its disk is full")
    if what == "wait":
        time.sleep(60)
    if what == "later":
        time.sleep(.5)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("whats", ["wait kill wait", "kill wait wait", "wait wrong wait", "later done later"])
def test_a_process_that_is_gone_ends_the_others_in_a_line(
    whats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STUB, str(tmp_path), str(rank), what.replace("kill", "wait")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, what in enumerate(whats.split())
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n", process.communicate()
        for process, what in zip(started, whats.split(), strict=True):
            if what == "kill":
                process.kill()
        ended = [process.communicate(timeout=30)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, what) in enumerate(zip(started, whats.split(), strict=True)):
        if what == "wait":
            (line,) = ended[rank].splitlines()
            gone = whats.split().index("kill" if "kill" in whats else "wrong")
            said = "is gone: it was killed" if "kill" in whats else "has stopped: its disk is full"
            assert f"process {gone} of 3 (process {started[gone].pid} on " in line and said in line
            assert process.returncode == 1
        elif what in ("later", "done"):
            assert process.returncode == 0 and not ended[rank]


def test_a_stranger_is_not_taken_for_a_process() -> None:
    """What connects to the first process without its token is turned away."""
    place = [SimpleNamespace(rank=rank, world_size=2, one_host=True) for rank in (0, 1)]
    met, both = {}, threading.Barrier(2)

    def exchange(mine: dict[str, Any], rank: int) -> list[dict[str, Any]]:
        met[rank] = mine
        both.wait(20)
        if rank == 1:
            with socket.create_connection(("127.0.0.1", met[0]["port"])) as link:
                link.sendall(b"0" * 32 + b"00000001")
                assert link.recv(1) == b""
        return [met[0], met[1]]

    ends: list[str] = []
    second = Watch(place[1], lambda mine: exchange(mine, 1), ends.append)

    def other() -> None:
        with second:
            pass

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with Watch(place[0], lambda mine: exchange(mine, 0), ends.append):
        pass
    thread.join(20)
    assert not ends and not thread.is_alive()


# --- who is who ------------------------------------------------------------------------------------------------------


def launched(rank: int, world: int, local: int, local_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(local_size)
    }  # fmt: skip


def test_the_place_of_a_process() -> None:
    assert place_of({}) is None and place_of(launched(0, 1, 0, 1)) is None
    assert place_of(launched(5, 8, 1, 4)) == Place(5, 8, 1, 4)  # the second of the second host
    assert not place_of(launched(5, 8, 1, 4)).one_host and place_of(launched(1, 2, 1, 2)).one_host
    assert place_of({"RANK": "1", "WORLD_SIZE": "2"}) == Place(1, 2, 1, 2)
    with pytest.raises(UserError, match="RANK=x in the environment"):
        place_of({**launched(0, 2, 0, 2), "RANK": "x"})
    with pytest.raises(UserError, match="contradict"):
        place_of(launched(2, 2, 0, 2))
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UserError, match="torchrun --nproc-per-node N"):
        place_of(alone)
    assert place_of({**alone, "OMPI_COMM_WORLD_SIZE": "2"}) is None
    assert place_of({"ACCELERATE_MIXED_PRECISION": "no"}) is None
    assert place_of({**alone, "MASTER_ADDR": "node7"}) is None  # of a cluster, for whoever wants it


def test_caches_are_told_apart_as_lm_eval_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert rank_of_cache() == 0
    for name, value in launched(5, 8, 1, 4).items():
        monkeypatch.setenv(name, value)
    assert rank_of_cache("method=dense") == rank_of_cache({}) == 5
    assert rank_of_cache("method=dense,tp_plan=auto") == rank_of_cache({"tp_plan": "auto"}) == 1


def test_arguments_that_several_processes_cannot_share() -> None:
    place = Place(0, 3, 0, 3)
    check(place, {"device": "cpu"}, 0)
    check(place, {"device": "cuda:0"}, 3)
    with pytest.raises(UserError, match="--nproc-per-node 2"):
        check(place, {"device": "cuda"}, 2)
    with pytest.raises(UserError, match="device=cuda:1 with 3 processes: each takes its own GPU"):
        check(place, {"device": "cuda:1"}, 4)
    with pytest.raises(UserError, match="device_map=auto with 3 processes"):
        check(place, {"device": "cuda", "device_map": "auto"}, 4)


def test_processes_of_different_arguments_are_refused() -> None:
    check_same([{"sparsity": "0.5"}] * 3)
    with pytest.raises(UserError, match="differ in sparsity: 0.5 in process 0, 0.6 in process 2"):
        check_same([{"sparsity": "0.5"}, {"sparsity": "0.5"}, {"sparsity": "0.6"}])
    with pytest.raises(UserError, match="differ in tau: nothing in process 0, 0.1 in process 1"):
        check_same([{}, {"tau": "0.1"}])


def test_what_gloo_says_of_a_process_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234\nat transport/tcp/pair.cc")

    for name in ("gather_object", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, broken)
    peers = parallel.Peers(Place(0, 2, 0, 2), None)
    for ask in (peers.gather, peers.all, lambda what: peers.agree({"sparsity": what})):
        with pytest.raises(UserError, match=r"another of the 2 processes is gone \(Connection closed by peer"):
            ask(1)
    peers._watch = SimpleNamespace(reason=lambda: "process 1 of 2 (process 7 on node7) is gone")
    with pytest.raises(UserError, match="^process 1 of 2"):
        peers.gather(1)


def test_no_process_of_a_model_that_is_split_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched(1, 2, 1, 2).items():
        monkeypatch.setenv(name, value)
    assert parallel.join({"device": "cuda", "tp_plan": "auto"}) is None
    assert parallel.join({"device": "cpu"}, alone=True) is None


# --- what is put together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [1, 2, 5, 6])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_and_metrics_come_in_the_order_of_one_process(documents: int, world: int) -> None:
    filters = ("strict", "loose")
    rows = [{"doc_id": index, "filter": name, "doc": {}} for name in filters for index in range(documents)]
    values = {("acc", name): [index + ord(name[0]) for index in range(documents)] for name in filters}
    samples = [{"t": [row for row in rows if row["doc_id"] % world == rank]} for rank in range(world)]
    metrics = [
        {"t": {key: mine for key, all_ in values.items() if (mine := all_[rank::world])}} for rank in range(world)
    ]
    whole = in_order(samples)
    assert [row for part in whole for row in part["t"]] == rows and len(whole) == world
    whole = in_order(metrics)
    assert {key: [value for part in whole for value in part["t"][key]] for key in values} == values


def test_a_leaf_that_cannot_run_stands_once_in_the_samples() -> None:
    stubs = [{"t": [{"doc_id": rank, "filter": "none", "doc": {SKIPPED: "no room", "index": rank}}]} for rank in (0, 1)]
    assert in_order(stubs)[0] == stubs[0]


def test_other_things_are_gathered_as_they_are() -> None:
    for parts in ([1, 2], [{"a": [1]}, {"a": [2]}], [{"a": {"x": 1}}, {"a": {"x": 2}}], [{"a": []}, {"b": []}]):
        assert in_order(parts) == parts


def test_a_metric_that_the_first_process_lacks_is_refused() -> None:
    """lm-eval asks for those of the first process, and would leave it out."""
    with pytest.raises(UserError, match="task t: process 1 has the metric"):
        in_order([{"t": {("acc", "none"): [1]}}, {"t": {("acc", "none"): [0], ("f1", "none"): [1]}}])


class Stubs:
    """Processes that follow each other: the last one is the first."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.place = Place(0, 2, 0, 2)

    def gather(self, mine: Any, dst: int = 0) -> list[Any] | None:
        self.given.insert(0, mine)
        if len(self.given) < 2:
            return None
        found, self.given = self.given, []
        return found


def test_what_processes_measured_adds_up_once() -> None:
    options = {"method": "block_sparse+quest", "sparsity": 0.5, "backend": "gather", "stats": "full"}
    pairs = [(prompt, " unusual zebra") for prompt in PROMPTS]
    whole = sparse(tiny.family("llama"), **options)
    second, first = sparse(tiny.family("llama"), **options), sparse(tiny.family("llama"), **options)
    second.peers = first.peers = Stubs()
    for own in (pairs[:3], pairs[3:]):  # twice: nothing counts again
        score(whole, own, "t")
        score(second, own[1::2], "t")
        score(first, own[0::2], "t")
        second.reporter.skipped["other"] = "no room"
        second.reporter.reduce()
        first.reporter.reduce()
    second.peers = first.peers = None
    one, two = whole.report(), first.report()
    runs = [report.pop("run") for report in (one, two)]
    assert runs[0]["tokens"] == runs[1]["tokens"]
    made = [report.pop("runs") for report in (one, two)]
    assert [sorted(run["prompts"] for run in each) for each in made] == [[len(pairs)], [2, len(pairs) - 2]]
    assert all(run["versions"] and run["began"] for each in made for run in each)
    assert two.pop("skipped") == {"other": "no room"} and one.pop("skipped") == {}
    assert nearly(one, two) and one["prompts"] == len(pairs)
    assert [row["layer"] for row in first.detail_report()["t"]["prefill"]] == [0, 1]
