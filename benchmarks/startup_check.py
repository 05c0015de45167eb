"""Seconds that the check of a model at start-up takes.

    python benchmarks/startup_check.py --output benchmarks/results                         # SmolLM2
    python benchmarks/startup_check.py --models 8b qwen=FOLDER --tokenizer FOLDER --output benchmarks/results

The model `8b` has the shape of Llama 3.1 8B and random weights. Each plan is checked several times in one process: the
first time also compiles kernels and reads weights that nothing has read before.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from lm_eval_sparse import patches

patches.install()

import torch  # noqa: E402
import transformers  # noqa: E402
from generate import random_llama  # noqa: E402
from prefill import say, table, versions, write  # noqa: E402

from lm_eval_sparse.model import embedded  # noqa: E402
from lm_eval_sparse.model.lm import SparseHFLM  # noqa: E402
from lm_eval_sparse.model.report import device_name  # noqa: E402
from lm_eval_sparse.runtime import probe  # noqa: E402

PLANS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "flexprefill+snapkv+quest": {
        "method": "flexprefill+snapkv+quest", "prefill_sparsity": 0.9, "kv_sparsity": 0.5, "decode_sparsity": 0.9,
    },
}  # fmt: skip


def load(name: str, device: str, tokenizer: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer: `smollm2`, `8b`, or `NAME=FOLDER`."""
    folder = name.partition("=")[2] or str(embedded.ensure()) if tokenizer is None or "=" in name else tokenizer
    own = transformers.AutoTokenizer.from_pretrained(folder)
    if name == "8b":
        return random_llama(device).eval(), own
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval(), own


def measure(name: str, device: str, times: int, tokenizer: str | None) -> list[dict[str, Any]]:
    """Seconds of each check of a model, by plan."""
    model, own = load(name, device, tokenizer)
    check, rows = probe.check, []
    for plan, arguments in PLANS.items():
        seconds: list[float] = []

        def timed(*args: Any, seconds: list[float] = seconds) -> Any:
            start = time.perf_counter()
            found = check(*args)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            return found

        probe.check = timed
        try:
            for _ in range(times):
                SparseHFLM(pretrained=model, tokenizer=own, device=device, **arguments)
        finally:
            probe.check = check
        rows.append({"model": name.partition("=")[0], "plan": plan, "seconds": seconds})
        say(f"{rows[-1]['model']} {plan}: " + " ".join(f"{value:.2f}" for value in seconds))
    return rows


def markdown(content: dict[str, Any]) -> str:
    rows = [
        [row["model"], row["plan"], f"{row['seconds'][0]:.2f}", f"{statistics.median(row['seconds'][1:]):.2f}"]
        for row in content["rows"]
    ]
    facts = ", ".join(f"{name} {value}" for name, value in content["versions"].items() if value)
    lines = ["# The check at start-up", "", f"{content['device']}, {facts}; bfloat16.", ""]
    return "\n".join(lines + table(["model", "methods", "first, s", "median of the others, s"], rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2"], help="smollm2, 8b or NAME=FOLDER")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for 8b; default: that of SmolLM2")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for startup_check_cpu.json or _cuda.json, and the table")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for name in options.models for row in measure(name, device, options.times, options.tokenizer)]
    content = {"device": device_name(torch.device(device)), "versions": versions(), "rows": rows}
    say(markdown(content))
    if options.output is not None:
        write(options.output / f"startup_check_{device}.json", json.dumps(content, indent=1) + "\n")
        write(options.output / f"startup_check_{device}.md", markdown(content))


if __name__ == "__main__":
    main()
