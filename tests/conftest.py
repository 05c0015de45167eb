"""Skips tests marked `gpu` where torch sees no CUDA device; there Triton kernels run under Triton's interpreter.

Tests marked `oldest` are skipped unless `--oldest` is given, whatever `-m` says.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

# Several processes of several threads each would get into each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton looks at this once, when it is imported; neither torch nor our package imports it before a kernel is needed.
if "TRITON_INTERPRET" not in os.environ and importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oldest", action="store_true", help="also run tests with the oldest supported versions")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--oldest"):
        for item in items:
            if item.get_closest_marker("oldest"):
                item.add_marker(pytest.mark.skip(reason="makes an environment, in minutes: type pytest --oldest"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here, so that runs without such tests start fast

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
