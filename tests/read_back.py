"""Commands that repeat a run, taken apart again: by a shell, and by lm-eval's own parser."""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

from lm_eval_sparse.results.reproduce import reproduce_command


def parsed(words: list[str]) -> argparse.Namespace:
    """What lm-eval makes of the words behind its name."""
    from lm_eval._cli import HarnessCLI

    return HarnessCLI()._parser.parse_args(["run", *words])


def given_of(results: dict[str, Any]) -> argparse.Namespace:
    command = reproduce_command(results)
    assert command.isprintable()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    ).stdout.decode()
    return parsed(words.split("\0")[1:-1])
