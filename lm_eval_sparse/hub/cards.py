"""The dataset card of a push of results. Knows lm-eval's result files and the template; every name in them is foreign.

The template writes nothing as it is but what is `markdown.Written`: all else is shown as text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import resources
from typing import Any

from .. import __version__, harness, markdown, masking
from ..labels import label
from ..results.reproduce import reproduce_command
from ..results.sample_files import sample_configs
from .card_text import BEGIN, END, TITLE, dump

_RESULTS_FILE = re.compile(r"(?:.*/)?[^/]+_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json")


def results_card(
    results: Mapping[str, Any],
    *,
    repo_id: str,
    files: Iterable[str] = (),
    model_url: str | None = None,
    contact: str = "",
    leaderboard: str = "",
) -> str:
    """Return a dataset card for `results` (a results file of lm-eval as a dict), YAML front matter included.

    `files` are the paths in the repository `repo_id`; every task with samples among them becomes a configuration
    that `datasets.load_dataset` and the Hub's viewer can open. What has another shape than lm-eval gives it is left
    out, and secrets are masked.
    """
    files = sorted(files)
    given = _object(_object(results).get("config"))
    secrets = masking.values_in(given, given.get("model_args"))
    results = harness.without_secrets(_object(results), secrets)
    config = _object(results.get("config"))
    model = str(results.get("model_name") or "unknown model")
    sparse = _object(config.get("sparse"))
    configs = sample_configs(files)
    front: dict[str, Any] = {
        "pretty_name": label(f"{TITLE} {model}", markdown.LONGEST),
        "tags": ["lm-eval-sparse", "lm-evaluation-harness", "sparse-attention", "evaluation"],
    }
    if configs:
        front["configs"] = configs
    written = markdown.Written
    results_files = [name for name in files if name.isprintable() and _RESULTS_FILE.fullmatch(name)]
    return _template().render(
        front_matter=written(dump(front)),
        begin=written(BEGIN),
        end=written(END),
        model=model,
        model_url=markdown.url(model_url),
        repo_id=repo_id,
        method=sparse.get("method") or "dense",
        requested=sparse.get("requested_sparsity"),
        knobs=_knobs(sparse),
        device=sparse.get("device"),
        phases=_phases(sparse),
        scores=_scores(results, sparse),
        skipped=_skipped(results, sparse),
        limit=config.get("limit"),
        evaluated=_date(results.get("date")),
        versions=_versions(results, sparse),
        command=written(reproduce_command(results)),
        results_files=sorted(results_files, key=_run_date, reverse=True),
        configs=[entry["config_name"] for entry in configs],
        contact=masking.masked(contact, secrets),
        leaderboard=masking.masked(leaderboard, secrets),
    )


@functools.cache
def _template() -> Any:
    import jinja2

    text = resources.files("lm_eval_sparse.hub_cards").joinpath("results_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=markdown.text
    )
    environment.filters |= {
        "cell": _cell,
        "figure": _number,
        "code": markdown.code,
        "quoted": markdown.quoted,
        "address": markdown.address,
    }
    return environment.from_string(text)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _knobs(sparse: Mapping[str, Any]) -> dict[str, str]:
    """The knobs of each method that has some, as they are typed."""
    return {
        str(method): ", ".join(f"{name}={_setting(value)}" for name, value in knobs.items())
        for method, knobs in _object(sparse.get("knobs")).items()
        if isinstance(knobs, Mapping) and knobs
    }


def _scores(results: Mapping[str, Any], sparse: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task (or group), metric and filter of a results dict."""
    rows = []

    def about(name: str, task: str) -> Any:
        return _object(results.get(name)).get(task)

    for task, values in {**_object(results.get("results")), **_object(results.get("groups"))}.items():
        values = _object(values)
        for key, value in values.items():
            metric, comma, metric_filter = str(key).partition(",")
            if not comma or metric.endswith("_stderr") or metric == "bypass":
                continue
            better = _object(about("higher_is_better", task)).get(metric)
            rows.append(
                {
                    "task": task,
                    "version": about("versions", task),
                    "filter": metric_filter,
                    "shots": about("n-shot", task),
                    "metric": metric + (" ↑" if better is True else " ↓" if better is False else ""),
                    "value": _number(value),
                    "stderr": _number(values.get(f"{metric}_stderr,{metric_filter}")),
                    "sparsity": _measured(_object(_object(sparse.get("tasks")).get(task))),
                    "n": _object(about("n-samples", task)).get("effective", values.get("sample_len")),
                }
            )
    return rows


def _measured(phases: Mapping[str, Any]) -> str:
    """What the sparse phases executed, in their order, or what prefill did when all phases were dense."""
    known = [figures for figures in map(_object, phases.values()) if figures.get("executed_sparsity") is not None]
    sparse = [figures for figures in known if _object(figures.get("calls")).get("sparse")]
    return " / ".join(_number(figures["executed_sparsity"]) for figures in sparse or known[:1]) or _number(None)


def _skipped(results: Mapping[str, Any], sparse: Mapping[str, Any]) -> dict[str, Any]:
    """Tasks that gave no score, and why if that is known."""
    counts = _object(results.get("n-samples"))
    unscored = {task: "" for task, n in counts.items() if not _object(n).get("effective")}
    return unscored | dict(_object(sparse.get("skipped")))


def _phases(sparse: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The per-phase figures of the `sparse` block, in the order in which the phases run; none that made no call."""
    given = _object(sparse.get("phases"))
    phases = {phase: _object(given.get(phase)) for phase in ("prefill", "eviction", "decode")}
    return {
        phase: {
            "figures": figures,
            "calls": " / ".join(str(calls.get(kind) or 0) for kind in ("sparse", "dense", "fallback")),
            "kernels": ", ".join(map(str, _object(figures.get("backends")))) or "–",
        }
        for phase, figures in phases.items()
        if any((calls := _object(figures.get("calls"))).values())
    }


def _versions(results: Mapping[str, Any], sparse: Mapping[str, Any]) -> str:
    versions = _object(sparse.get("versions")) or {
        "lm_eval_sparse": __version__,
        "lm_eval": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _run_date(results_file: str) -> str:
    found = _RESULTS_FILE.fullmatch(results_file)
    return found["date"] if found else ""


def _date(timestamp: Any) -> str:
    try:
        return datetime.fromtimestamp(timestamp, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _number(value: Any) -> str:
    """A figure for people: four decimals, counts as such, and a dash for what there is not."""
    if value is None or value == "N/A":
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _setting(value: Any) -> str:
    """A setting as it was typed."""
    return f"{value:g}" if isinstance(value, float) else _number(value)


def _cell(value: Any) -> markdown.Written:
    """Anything as the text of one Markdown table cell."""
    return markdown.text(_setting(value))
