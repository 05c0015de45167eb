"""Seconds from the shell to the first computed token, part by part, beside lm-eval's `hf` in the same run.

    python benchmarks/startup.py --output benchmarks/results                         # the embedded model
    python benchmarks/startup.py --model FOLDER --chat --output benchmarks/results   # any other

Every run is a fresh process that types what a user types. It goes through the same imports as `lm_eval`, in an order
that lets each be timed, then through lm-eval's own command line, and ends when the first prompt has been read
(`--whole`: when all are answered). The first run of each kind finds no compiled kernels and no documents; the others
find those of the first: how many kernels they compile all the same is counted. `lm_eval ls tasks` runs with and without
this package's start-up file.
"""

from __future__ import annotations

import time

BORN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
#: Where a child finds when it was started, and where it writes what it saw.
STARTED, SEEN = "STARTUP_STARTED", "STARTUP_SEEN"

METHODS = "method=flexprefill+snapkv+quest,prefill_sparsity=0.9,kv_sparsity=0.5,decode_sparsity=0.9"
#: Name -> model type, its arguments, and the task.
KINDS = {
    "hf, scored": ("hf", "", "forced_frontier_niah_4k"),
    "dense, scored": ("sparse-hf", "method=dense", "forced_frontier_niah_4k"),
    "sparse, scored": ("sparse-hf", METHODS, "forced_frontier_niah_4k"),
    "hf, generated": ("hf", "", "frontier_niah_4k"),
    "sparse, generated": ("sparse-hf", METHODS, "frontier_niah_4k"),
}
#: In the order in which they happen. The imports are of torch and lm-eval; all else is what can be made shorter.
PARTS = (
    "python", "import torch", "import transformers", "import lm-eval", "import ours", "find tasks", "weights",
    "tokenizer", "model, the rest", "check of the model", "documents", "prompts into tokens", "check of decoding",
    "first prefill", "the rest",
)  # fmt: skip
IMPORTS = ("python", "import torch", "import transformers", "import lm-eval")


# --- the child -------------------------------------------------------------------------------------------------------


class Parts:
    """Seconds by part; what runs inside a part is not counted in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"python": BORN - float(os.environ[STARTED])}
        self.running = ["the rest"]
        self._since = BORN

    def switch(self) -> None:
        now = time.time()
        part = self.running[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Any:
        self.switch()
        self.running.append(name)
        try:
            yield
        finally:
            self.switch()
            self.running.pop()

    def time(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a function as a part."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def listen(compiled: list[dict[str, Any]]) -> None:
    """Note each kernel that Triton compiles or finds on disk, where there is a Triton that says so."""
    try:
        from triton import knobs
    except ImportError:
        return

    def heard(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        stages = [seconds for _, seconds in getattr(times, "lowering_stages", [])]
        micros = sum(stages) + getattr(times, "ir_initialization", 0) + getattr(times, "store_results", 0)
        compiled.append({"kernel": metadata.get("name"), "found": cache_hit, "seconds": micros / 1e6})

    knobs.compilation.listener = heard


def child(options: argparse.Namespace) -> None:
    """Run lm-eval's command line and write what it took."""
    kind, arguments, task = KINDS[options.child]
    parts, compiled = Parts(), []
    with parts.part("import torch"):
        import torch
    with parts.part("import transformers"):
        import transformers
        import transformers.modeling_utils
        from transformers.models.auto import modeling_auto  # noqa: F401
    listen(compiled)
    sys.path.insert(0, str(ROOT / "patches"))
    import _lm_eval_sparse_hook

    _lm_eval_sparse_hook.autoload()  # as the start-up file does
    with parts.part("import lm-eval"):
        import datasets  # noqa: F401
        import lm_eval.__main__
        import lm_eval.evaluator
        import lm_eval.tasks.manager
        from lm_eval.models.huggingface import HFLM
    model: Any = HFLM
    if kind == "sparse-hf":
        with parts.part("import ours"):
            from lm_eval_sparse.model import decoding, lm

            model = lm.SparseHFLM
        parts.time(lm, "check_attention", "check of the model")
        parts.time(decoding.Decoding, "_make", "check of decoding")
    parts.time(lm_eval.tasks.manager.TaskManager, "__init__", "find tasks")
    parts.time(lm_eval.evaluator, "evaluate", "documents")
    for name, part in (
        ("_create_model", "weights"),
        ("_create_tokenizer", "tokenizer"),
        ("__init__", "model, the rest"),
    ):
        parts.time(model, name, part)
    folder = options.model
    if folder is None:
        from lm_eval_sparse.model import embedded

        folder = str(embedded.ensure())

    def end() -> None:
        parts.switch()
        total = time.time() - float(os.environ[STARTED])
        Path(os.environ[SEEN]).write_text(
            json.dumps({
                "seconds": parts.seconds, "total": total, "kernels": compiled,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            })
        )  # fmt: skip

    def asked(call: Callable[..., Any]) -> Callable[..., Any]:
        """The first call with requests: what passes through the model in it and is no check is the first prefill."""

        def answered(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
            first = True

            def begin(module: Any, args: Any) -> None:
                if first and "check of decoding" not in parts.running:
                    parts.switch()
                    parts.running.append("first prefill")

            def finish(module: Any, args: Any, output: Any) -> None:
                nonlocal first
                if not first or parts.running[-1] != "first prefill":
                    return
                first = False
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                parts.switch()
                parts.running.pop()
                parts.first = time.time() - float(os.environ[STARTED])
                if not options.whole:
                    end()
                    os._exit(0)

            self.model.register_forward_pre_hook(begin)
            self.model.register_forward_hook(finish)
            with parts.part("prompts into tokens"):
                return call(self, requests, *args, **kwargs)

        return answered

    name = "generate_until" if task.startswith("frontier") else "loglikelihood"
    setattr(model, name, asked(getattr(model, name)))
    typed = ",".join(filter(None, [f"pretrained={folder}", f"dtype={options.dtype}", arguments]))
    sys.argv = [
        "lm_eval",
        "run",
        "--model",
        kind,
        "--model_args",
        typed,
        "--tasks",
        task,
        "--limit",
        str(options.limit),
    ]
    # Prompts are written for the tokenizer of the model, which another model type does not show to its tasks.
    sys.argv += ["--metadata", json.dumps({"pretrained": folder})] if kind == "hf" else []
    sys.argv += ["--apply_chat_template"] if options.chat else []
    lm_eval.__main__.cli_evaluate()
    end()


# --- the parent ------------------------------------------------------------------------------------------------------


def run(kind: str, caches: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one fresh process took."""
    command = [sys.executable, __file__, "--child", kind, "--limit", str(options.limit), "--dtype", options.dtype]
    command += ["--model", options.model] if options.model else []
    command += ["--chat"] * options.chat + ["--whole"] * options.whole
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen.json"
        done = subprocess.run(
            command, env=environment(caches) | {STARTED: repr(time.time()), SEEN: str(seen)},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        if not seen.exists():
            raise RuntimeError(f"{kind} did not get there:\n{done.stderr[-3000:]}")
        return json.loads(seen.read_text())


def environment(caches: Path) -> dict[str, str]:
    """Caches of our own beside what others have in theirs: models stay where they are."""
    usual = Path(os.environ.get("LM_EVAL_SPARSE_CACHE") or "~/.cache/lm_eval_sparse").expanduser()
    own = caches / "lm_eval_sparse"
    own.mkdir(parents=True, exist_ok=True)
    for name in ("models", "qa"):
        if (usual / name).exists() and not (own / name).exists():
            (own / name).symlink_to(usual / name)
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "LM_EVAL_SPARSE_CACHE": str(own),
        "LM_EVAL_SPARSE_NO_AUTOLOAD": "",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }


LIST = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import _lm_eval_sparse_hook
_lm_eval_sparse_hook.autoload()
sys.argv[0] = "lm_eval"
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def listed(without: bool, caches: Path) -> float:
    """Seconds of `lm_eval ls tasks`."""
    settings = environment(caches) | {"LM_EVAL_SPARSE_NO_AUTOLOAD": "1" if without else ""}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LIST, str(ROOT / "patches"), "ls", "tasks"], env=settings, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode or ("forced_frontier_niah_4k" in done.stdout) == without:
        raise RuntimeError(f"lm_eval ls tasks: {done.stderr[-2000:]}")
    return seconds


def middle(runs: list[dict[str, Any]], part: str) -> list[float]:
    """Least and median seconds of a part."""
    found = [one["seconds"].get(part, 0.0) for one in runs]
    return [min(found), statistics.median(found)]


def summed(cold: dict[str, Any], warm: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: the first run, and least and median of the others."""
    beyond = [one["total"] - sum(one["seconds"].get(part, 0.0) for part in IMPORTS) for one in warm]
    return {
        "first": cold["seconds"],
        "first_total": cold["total"],
        "parts": {part: middle(warm, part) for part in PARTS},
        "total": [min(one["total"] for one in warm), statistics.median(one["total"] for one in warm)],
        "beyond_imports": [min(beyond), statistics.median(beyond)],
        "kernels": [
            {
                "compiled": sorted(str(k["kernel"]) for k in one["kernels"] if not k["found"]),
                "found": sum(k["found"] for k in one["kernels"]),
                "seconds": sum(k["seconds"] for k in one["kernels"]),
            }
            for one in (cold, *warm)
        ],
    }


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All kinds in turn, so that what changes on the machine meanwhile changes for all."""
    with tempfile.TemporaryDirectory() as folder:
        caches, runs, lists = Path(folder), {}, {"with": [], "without": []}
        for turn in range(options.times + 1):
            for kind in options.kinds:
                # Each kind has caches of its own: else the second would find what the first one has left.
                one = run(kind, caches / kind.replace(", ", "_"), options)
                runs.setdefault(kind, []).append(one)
                say(f"{kind}, run {turn + 1}: {one['total']:.1f} s")
            for name in lists if turn < options.lists else ():
                lists[name].append(listed(name == "without", caches / "ls"))
                say(f"lm_eval ls tasks, {name}: {lists[name][-1]:.1f} s")
    return {
        "kinds": {kind: summed(found[0], found[1:]) for kind, found in runs.items()},
        "ls": {
            name: {"least": min(found), "median": statistics.median(found)} for name, found in lists.items() if found
        },
        "versions_seen": next(iter(runs.values()))[0]["versions"],
    }


def markdown(content: dict[str, Any], table: Callable[..., list[str]]) -> str:
    kinds = content["kinds"]
    facts = ", ".join(f"{name} {value}" for name, value in content["versions"].items() if value)
    end = "all requests are answered" if content["whole"] else "the first prompt has been read"
    lines = [
        "# From the shell to the first token", "",
        f"{content['device']}, {facts}; {content['model']}, {content['dtype']}, a prompt of 4096 tokens. Seconds until "
        f"{end}: median of {content['times']} fresh processes that find kernels and documents on disk, in brackets the "
        "first process, which finds neither.", "",
    ]  # fmt: skip
    rows = [
        [part, *(f"{kinds[k]['parts'][part][1]:.2f} ({kinds[k]['first'].get(part, 0.0):.2f})" for k in kinds)]
        for part in PARTS
    ]
    rows.append(["**all**", *(f"**{kinds[k]['total'][1]:.2f}** ({kinds[k]['first_total']:.2f})" for k in kinds)])
    rows.append(
        [f"beyond the first {len(IMPORTS)}", *(f"**{kinds[k]['beyond_imports'][1]:.2f}**" for k in kinds)],
    )
    lines += table(["part", *kinds], rows)
    rows = [
        [
            kind, *(str(len(one["compiled"])) for one in (row["kernels"][0], row["kernels"][-1])),
            str(row["kernels"][-1]["found"]), ", ".join(sorted(set(row["kernels"][-1]["compiled"]))) or "none",
        ]
        for kind, row in kinds.items()
    ]  # fmt: skip
    lines += ["Triton kernels:", ""]
    lines += table(["run", "compiled by the first", "by the last", "found on disk by it", "which it compiled"], rows)
    if ls := content["ls"]:
        lines += ["`lm_eval ls tasks`, seconds:", ""]
        rows = [[name, f"{row['least']:.2f}", f"{row['median']:.2f}"] for name, row in ls.items()]
        lines += table(["this package", "least", "median"], rows)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a transformers model; default: the embedded one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chat", action="store_true", help="with the chat template")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=3, help="runs of each kind after the first")
    parser.add_argument("--lists", type=int, default=3, help="runs of lm_eval ls tasks, each way")
    parser.add_argument("--limit", type=int, default=2, help="documents")
    parser.add_argument("--whole", action="store_true", help="to the end: counts all kernels; parts then hold all work")
    parser.add_argument("--output", type=Path, help="folder for startup_cpu.json or startup_cuda.json, and the table")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if options.times < 1 or options.lists < 0 or options.limit < 1:
        parser.error("--times and --limit take 1 or more, --lists 0 or more")
    sys.path[:0] = [str(ROOT)]
    import torch
    from prefill import say, table, versions, write

    from lm_eval_sparse.model.report import device_name

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(options, say)
    content = {
        "device": device_name(torch.device(device)),
        "versions": versions() | found.pop("versions_seen"),
        "model": Path(options.model).name if options.model else "the embedded model",
        "dtype": options.dtype, "times": options.times, "whole": options.whole, **found,
    }  # fmt: skip
    text = markdown(content, table)
    say(text)
    if options.output is not None:
        name = f"startup_{device}{'_whole' if options.whole else ''}"
        write(options.output / f"{name}.json", json.dumps(content, indent=1) + "\n")
        write(options.output / f"{name}.md", text)


if __name__ == "__main__":
    main()
