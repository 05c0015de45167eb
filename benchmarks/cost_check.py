"""Every figure that The Sparse Frontier prints of its costs beside what the formulas give, corrected and as printed.

python benchmarks/cost_check.py                                # the table, on standard output
python benchmarks/cost_check.py --output docs/results/cost_check.md

Takes no model: sizes are those of `analysis.shapes`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from lm_eval_sparse.analysis import cost, printed
from lm_eval_sparse.analysis.shapes import PUBLISHED, Sizes

QWEN = tuple(PUBLISHED[f"Qwen2.5-{size}"] for size in ("7B", "14B", "32B", "72B"))
#: Lengths behind the paper's plots of shares and speed-ups, and its longest run.
LENGTHS = (16384, 65536, 131072)
LONGEST = 128000
#: What is left at a sparsity of .8.
FIFTH = 1 / 5

INTRODUCTION = """\
# The paper's costs, reproduced

The figures that The Sparse Frontier (arXiv 2504.17768) plots and prints of its costs, what the formulas of
`lm_eval_sparse/analysis/cost.py` give, and what the paper's formulas give as they are printed
(`lm_eval_sparse/analysis/printed.py`). Written by `benchmarks/cost_check.py`; a test holds it to that. Digits are those
that the paper prints; **bold** is what does not agree.

Shares and speed-ups are means over Qwen2.5 7B, 14B, 32B and 72B unless a model is named, at 16384 / 65536 / 131072
tokens; B is the batch.

The corrected formulas differ from the printed ones in this:

* weights of a decode step are N(2·d·h·d_h + 2·d·d_h·n_kv + 3dm) + dV: keys and values are narrower than queries, and a
  step reads one row of the embedding, not worth counting. Printed is N(4d² + 3dm) + dV + d;
* projections of the prefill have h·d_h dimensions of queries, which is d for Qwen2.5 and Llama, not for Gemma 3;
* indices have d_h where d is printed;
* layers with a sliding window of w tokens have L·w pairs and w keys.

Eq. 3, the prefill, is otherwise right as printed. It counts all L² pairs where causal attention computes half of them;
every plotted figure follows that, and so do we unless `pairs="triangle"` is asked for.
"""

NOTES = """\
What does not agree, and why:

* **Speed-ups of the prefill.** Plotted are 1.48 / 2.20 / 2.80. They arise when the projections of queries, keys, values
  and outputs are divided by 5 as well, which no sparse attention does. Eq. 3 gives 1.31 / 2.00 / 2.59, as printed and
  as corrected. We keep the formula. (The plotted shares of attention, 40 / 68 / 80 %, count projections as attention,
  too; there that is a matter of naming, and followed.)
* **"2.8 to 4.7x" in the text.** Its own figure shows 4.46, the mean of four models, which is what the formula gives.
  4.7 is what the 14B alone has at 131072 tokens.
* **Axis ticks.** The third version states a batch of 64; then dense 7B and 72B lie at 5.4e17 and 3.9e18 for 128000
  tokens. Here the printed formula is the corrected one.
"""

Row = tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def percent(values: Iterable[float], digits: int = 0) -> tuple[str, ...]:
    return tuple(f"{100 * value:.{digits}f}" for value in values)


def times(values: Iterable[float]) -> tuple[str, ...]:
    return tuple(f"{value:.2f}" for value in values)


def mean(figure: Callable[[Sizes], float], models: Iterable[Sizes] = QWEN) -> float:
    return fmean(map(figure, models))


def decode_share(module: Any, length: int, batch: int) -> float:
    return mean(lambda sizes: module.decode(sizes, length, 1.0, batch).attention_share)


def _speedup(module: Any, sizes: Sizes, length: int, batch: int) -> float:
    return module.decode(sizes, length, 1.0, batch).total / module.decode(sizes, length, FIFTH, batch).total


def decode_speedup(module: Any, length: int, batch: int) -> float:
    return mean(lambda sizes: _speedup(module, sizes, length, batch))


def prefill_share(module: Any, length: int) -> float:
    return mean(lambda sizes: module.prefill(sizes, length).attention_share)


def prefill_speedup(module: Any, length: int) -> float:
    return mean(lambda sizes: module.prefill(sizes, length).total / module.prefill(sizes, length, FIFTH).total)


def plotted_speedup(length: int) -> float:
    """Of the prefill as the paper must have computed it: its projections are divided, too."""

    def one(sizes: Sizes) -> float:
        dense, sparse = cost.prefill(sizes, length), cost.prefill(sizes, length, FIFTH)
        return dense.total / (sparse.total - (1 - FIFTH) * dense.projections)

    return mean(one)


def rows() -> list[Row]:
    """What, printed in the paper, by the corrected formulas, by the printed ones."""
    both = (cost, printed)
    found: list[Row] = []
    for batch, shares, speedups in (
        (1, ("7", "22", "35"), ("1.06", "1.21", "1.41")),
        (8, ("35", "67", "80"), ("1.41", "2.22", "2.84")),
        (64, ("80", "94", "97"), ("2.84", "4.06", "4.46")),
    ):
        ours = (percent((decode_share(of, length, batch) for length in LENGTHS), int(of is printed)) for of in both)
        found.append((f"decode, share of keys and values in %, B={batch}", shares, *ours))
        ours = (times(decode_speedup(of, length, batch) for length in LENGTHS) for of in both)
        found.append((f"decode, speed-up at sparsity .8, B={batch}", speedups, *ours))
    ours = (percent(prefill_share(of, length) for length in LENGTHS) for of in both)
    found.append(("prefill, share of attention and its projections in %", ("40", "68", "80"), *ours))
    ours = (times(prefill_speedup(of, length) for length in LENGTHS) for of in both)
    found.append(("prefill, speed-up at sparsity .8", ("1.48", "2.20", "2.80"), *ours))
    divided = times(map(plotted_speedup, LENGTHS))
    found.append(("the same, with the projections divided by 5", ("1.48", "2.20", "2.80"), divided, ("-",) * 3))
    most = (times([decode_speedup(of, LENGTHS[-1], 64)]) for of in both)
    found.append(("decode, largest speed-up in the text (B=64)", ("4.7",), *most))
    most = ((f"{_speedup(of, PUBLISHED['Qwen2.5-14B'], LENGTHS[-1], 64):.1f}",) for of in both)
    found.append(("the same of the 14B alone", ("4.7",), *most))
    pair = [PUBLISHED["Qwen2.5-14B"], PUBLISHED["Gemma-3-12B"]]
    ours = (percent(of.prefill(sizes, 65536).attention_share for sizes in pair) for of in both)
    found.append(("prefill, share in %, Qwen2.5 14B and Gemma 3 12B, 65536 tokens", ("76", "42"), *ours))
    ours = (percent(of.decode(sizes, 65536, 1.0, 8).attention_share for sizes in pair) for of in both)
    found.append(("decode, share in %, the same, B=8", ("79", "61"), *ours))
    ours = (tuple(f"{of.prefill(sizes, LONGEST, batch=64).total:.1e}" for sizes in (QWEN[0], QWEN[-1])) for of in both)
    found.append(("prefill, operations, dense 7B and 72B, 128000 tokens, B=64", ("5.4e+17", "3.9e+18"), *ours))
    index = [[of.quest_index(sizes, LONGEST) / cost.cache(sizes, LONGEST) for sizes in QWEN] for of in both]
    found.append(
        (
            "Quest's index ÷ keys and values, 7B to 72B (1/16 = .0625)",
            ("-",) * 4,
            *(tuple(f"{share:.4f}" for share in shares) for shares in index),
        )
    )
    least = (percent([1 / 20 + shares[0]], 2) for shares in index)
    found.append(("Quest with a budget of 1/20, 7B: read in % of keys and values", ("-",), *least))
    return found


def table() -> list[str]:
    lines = ["| figure | paper | corrected formulas | printed formulas |", "|---|---|---|---|"]
    for what, paper, *ours in rows():
        cells = [" / ".join(_marked(values, paper)) for values in ours]
        lines.append(f"| {what} | {' / '.join(paper)} | {' | '.join(cells)} |")
    return lines


def _marked(values: tuple[str, ...], paper: tuple[str, ...]) -> list[str]:
    return [
        value if "-" in (value, target) or _rounded(value, target) == target else f"**{value}**"
        for value, target in zip(values, paper, strict=True)
    ]


def _rounded(value: str, target: str) -> str:
    """A value that is shown with a digit more than the paper prints, with as many."""
    digits = len(target.partition(".")[2]) if "e" not in target else None
    return value if digits is None else f"{float(value):.{digits}f}"


def equal_costs() -> list[str]:
    """From which sparsity a sparse 1.5B costs no more than a dense 0.5B."""
    small, large = PUBLISHED["Qwen2.5-0.5B"], PUBLISHED["Qwen2.5-1.5B"]

    def said(found: cost.Equal) -> str:
        return "never" if found.sparsity is None else f"{found.sparsity:.3f}"

    lines = [
        "Qwen2.5 1.5B costs no more than Qwen2.5 0.5B with dense attention from this sparsity on, without what",
        "selecting takes; *never* is where all else of the larger model costs more already:",
        "",
        "| tokens | prefill | prefill, half of the pairs | decode, B=1 | decode, B=64 |",
        "|---|---|---|---|---|",
    ]
    for length in (4096, 16384, 32768, 65536, 131072):
        cells = [
            said(cost.equal_cost(small, large, length, "prefill")),
            said(cost.equal_cost(small, large, length, "prefill", pairs="triangle")),
            said(cost.equal_cost(small, large, length, "decode")),
            said(cost.equal_cost(small, large, length, "decode", batch=64)),
        ]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return lines


def text() -> str:
    return "\n".join([INTRODUCTION, *table(), "", NOTES, *equal_costs(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="the file to write")
    output = parser.parse_args().output
    if output is None:
        print(text(), end="")
    else:
        output.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
