"""Leaves out tests that run on request, skips those marked `gpu` without a CUDA device.

Without one Triton kernels run under its interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Several processes of several threads each would get into each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where Python is told to write no bytecode and packages came without it, each of hundreds of processes would compile
# torch and transformers anew, which takes longer than most tests. It is written beside pytest's own cache then, and not
# into any folder of sources.
BYTECODE: Path | None = None
if sys.dont_write_bytecode and not Path(importlib.util.cache_from_source(pytest.__file__)).exists():
    BYTECODE = Path(__file__).parents[1] / ".pytest_cache" / "bytecode"
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(BYTECODE)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
# Triton looks at this once, when it is imported; neither torch nor our package imports it before a kernel is needed.
if "TRITON_INTERPRET" not in os.environ and importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _hub_without_waiting() -> None:
    """There is no Hub here: what asks it nevertheless tries again at once, not after half a minute."""
    with contextlib.suppress(ImportError):
        import huggingface_hub.utils._http as http

        http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Methods that a test adds are gone when it is over."""
    registry = sys.modules.get("lm_eval_sparse.methods.registry")
    known = set(registry.METHODS) if registry else set()
    yield
    if registry:
        for name in set(registry.METHODS) - known:
            registry.METHODS.discard(name)


#: Markers of tests that take minutes: they run when they are asked for.
ON_REQUEST = {
    "families": "every causal family of transformers",
    "attacks": "the whole table of bad command lines",
    "kills": "runs with a real model that are killed",
    "oldest": "the oldest supported versions, which makes an environment",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, what in ON_REQUEST.items():
        parser.addoption(f"--{name}", action="store_true", help=f"also run the tests of {what}")

    parser.addoption("--fuzz", action="store_true", help="fifty times more of damaged input, other in every run")


def pytest_configure(config: pytest.Config) -> None:
    # A job in the background of a shell is started with these switched off, and its children, too.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    if config.getoption("--fuzz"):
        from hypothesis import settings

        settings.register_profile("fuzz")
        settings.load_profile("fuzz")


def pytest_unconfigure() -> None:
    """Bytecode of what tests made for themselves is of no use to the next run."""
    if BYTECODE is not None:
        shutil.rmtree(f"{BYTECODE}{tempfile.gettempdir()}", ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {name for name in ON_REQUEST if not config.getoption(f"--{name}")}
    wanted, unwanted = [], []
    for item in items:
        (unwanted if left_out & {mark.name for mark in item.iter_markers()} else wanted).append(item)
    config.hook.pytest_deselected(items=unwanted)
    items[:] = wanted
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here, so that runs without such tests start fast

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
