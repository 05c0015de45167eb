"""The kernels could be published alone: their README's examples run, and they import nothing of the library."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import torch

KERNELS = Path(__file__).parents[1] / "kernels"
#: flash-attn-4, an optional package, and what it is written in.
OPTIONAL = {"flash_attn", "cutlass"}


def test_the_examples_of_the_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    assert 0 < float(names["density"]) < 1
    assert names["out"].shape == (2, 4, 1, 64) and names["weights"].shape == (2, 4, 1, 32)
    # What the keys that were read weigh, and the virtual one.
    rest = torch.exp(-1.0 - names["lse"])
    assert torch.allclose(names["weights"].sum(-1) + rest, torch.ones(2, 4, 1), atol=1e-5)


def test_imports() -> None:
    """Torch, Triton, numpy and what comes with Python; relative imports do not leave the folder."""
    allowed = {"torch", "triton", "numpy", *OPTIONAL, *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
        depth = len(path.relative_to(KERNELS).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                inside = 0 < node.level <= depth
                assert inside or node.module.split(".")[0] in allowed, (path, node.module)


def test_every_operator_has_its_reference() -> None:
    for path in KERNELS.rglob("triton.py"):
        assert (path.parent / "naive.py").exists() and (path.parent / "__init__.py").exists(), path
