"""Results on the Hugging Face Hub: may we push there, push these files, describe them with a card.

Knows lm-eval's result files and huggingface_hub; nothing of models, torch or lm-eval itself. Every call goes
through the caller's `HfApi`, so its endpoint and its token are the ones used, whatever the environment says.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval_sparse import __version__
from lm_eval_sparse.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_log = logging.getLogger(__name__)

#: Our section of a card lies between these lines; what people write around it survives every push.
BEGIN = "<!-- lm-eval-sparse:begin: rewritten by every push, text outside these two marks is kept -->"
END = "<!-- lm-eval-sparse:end -->"

#: lm-eval's own cards say this; they are generated too, so ours replaces them instead of standing beside them.
_LM_EVAL_CARD = "Dataset automatically created during the evaluation run of model"

_TITLE = "Sparse-attention evaluation of"

_SAMPLES_FILE = re.compile(
    r"(?:(?P<folder>.*)/)?samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.jsonl"
)
_RESULTS_FILE = re.compile(r"(?:.*/)?[^/]+_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json")


@dataclass(frozen=True)
class Target:
    """A dataset repository that results are to be pushed to."""

    repo_id: str
    private: bool
    gated: bool = False


# -- before a run: may we push there? Nothing is written.


def check_token(api: HfApi) -> dict[str, Any]:
    """Return who the token belongs to; raise `UserError` when the Hub cannot be reached or rejects the token."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return api.whoami()
    except OfflineModeIsEnabled:
        raise UserError(
            "cannot push to the Hub while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it or leave the push out"
        ) from None
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise UserError(
                f"the Hub at {api.endpoint} rejects the token ({reason(error)}); "
                "set HF_TOKEN to a token with write access"
            ) from None
        raise UserError(f"cannot push: the Hub at {api.endpoint} does not answer ({reason(error)})") from None
    except Exception as error:
        raise UserError(f"cannot push: the Hub at {api.endpoint} cannot be reached ({reason(error)})") from None


def check_target(api: HfApi, identity: Mapping[str, Any], target: Target) -> None:
    """Raise `UserError` unless `identity` (of `check_token`) can push to `target`, or create it if it is missing."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    repo_id = target.repo_id
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(
            f"{repo_id!r} is not a repository name on the Hub; give the user or organisation as hub_results_org and "
            "the name alone (letters, digits, '-', '_', '.') as details_repo_name, results_repo_name or hub_repo_name"
        ) from None
    try:
        private = api.repo_info(repo_id, repo_type="dataset").private
    except RepositoryNotFoundError:
        _check_namespace(identity, repo_id)
        return
    except HfHubHTTPError as error:
        raise UserError(f"cannot push to {repo_id}: {reason(error)}") from None
    if target.private and not private:
        raise UserError(
            f"the results are to be private, but {repo_id} is a public repository; make it private in its settings, "
            "choose another repository, or add public_repo=True to --hf_hub_log_args"
        )
    if not target.private and private:
        _log.warning("%s is a private repository, so what is pushed there is not public.", repo_id)
    try:
        api.auth_check(repo_id, repo_type="dataset", write=True)
    except HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise UserError(f"the token may not write to {repo_id} ({reason(error)}); use one that may") from None
        _check_namespace(identity, repo_id)  # a server without this check
    except TypeError:
        _check_namespace(identity, repo_id)  # huggingface_hub from before `write=`


def _check_namespace(identity: Mapping[str, Any], repo_id: str) -> None:
    """Raise `UserError` when what the Hub says of the token shows that it may not create or change `repo_id`."""
    owner = repo_id.split("/")[0]
    access = (identity.get("auth") or {}).get("accessToken") or {}
    role = access.get("role")
    if role == "read":
        raise UserError(
            f"the token is read-only, so it cannot push to {repo_id}; set HF_TOKEN to one with write access"
        )
    scopes = access.get("fineGrained")
    if role == "fineGrained" and isinstance(scopes, Mapping):
        writes = "repo.write" in (scopes.get("global") or ())
        for scope in scopes.get("scoped") or ():
            covered = (scope.get("entity") or {}).get("name") in (owner, repo_id)
            writes = writes or (covered and "repo.write" in (scope.get("permissions") or ()))
        if not writes:
            raise UserError(
                f"the fine-grained token has no write permission for the repositories of {owner!r}; "
                "add it in the token's settings or choose another hub_results_org"
            )
        return
    orgs = {org.get("name"): org.get("roleInOrg") for org in identity.get("orgs") or ()}
    if owner != identity.get("name") and orgs.get(owner, "read") == "read":
        accepted = [identity.get("name"), *(name for name, org_role in orgs.items() if org_role != "read")]
        raise UserError(
            f"the token may not push to {repo_id}: it can write to {', '.join(map(str, accepted))}, not to {owner!r}; "
            "change hub_results_org or HF_TOKEN"
        )


# -- after a run: push


def push(api: HfApi, target: Target, files: Mapping[str, Path | bytes], message: str) -> None:
    """Create `target` if needed, gate it if asked, and add `files` (path in the repository: content), one commit."""
    from huggingface_hub import CommitOperationAdd

    repo_id = target.repo_id
    _patiently(lambda: api.create_repo(repo_id, repo_type="dataset", private=target.private, exist_ok=True))
    # Before anything is uploaded, and never over a stricter gate that somebody has set by hand.
    if target.gated and not getattr(_patiently(lambda: api.repo_info(repo_id, repo_type="dataset")), "gated", False):
        _patiently(lambda: api.update_repo_settings(repo_id, repo_type="dataset", gated="auto"))
    _patiently(
        lambda: api.create_commit(
            repo_id,
            repo_type="dataset",
            # Made anew for every attempt: an operation remembers that it was uploaded.
            operations=[CommitOperationAdd(path, blob) for path, blob in files.items()],
            commit_message=message,
        )
    )


def push_card(api: HfApi, target: Target, results: Mapping[str, Any], **about: str | None) -> None:
    """Write the card of `target` from `results`, the files that are there by now, and what `results_card` accepts."""
    repo_id = target.repo_id
    files = _patiently(lambda: api.list_repo_files(repo_id, repo_type="dataset"))
    previous = ""
    if "README.md" in files:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", cache_dir=folder)
            previous = Path(path).read_text(encoding="utf-8")
    card = merge_cards(previous, results_card(results, repo_id=repo_id, files=files, **about))
    push(api, target, {"README.md": card.encode()}, "Update the results card")


def _patiently(call: Callable[[], T], attempts: int = 4) -> T:
    """Repeat `call` when the Hub is busy, when the network drops, or when another run pushed at the same moment."""
    from huggingface_hub.errors import HfHubHTTPError

    # The base of the HTTP client's own errors; which client that is depends on the version of huggingface_hub.
    client_error = HfHubHTTPError.__bases__[0]
    for attempt in range(1, attempts):
        try:
            return call()
        except client_error as error:
            if _status(error) not in (None, 412, 429, 500, 502, 503, 504):
                raise
            _log.warning("The Hub: %s; trying again.", reason(error))
            _sleep(2**attempt)
    return call()


_sleep = time.sleep


def reason(error: BaseException) -> str:
    """An exception of huggingface_hub on one line: status and the server's own words, where there are any."""
    status, words = _status(error), getattr(error, "server_message", None)
    text = f"{status} {words}" if status and words else str(error) or type(error).__name__
    return " ".join(text.split())


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


# -- the card


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
    that `datasets.load_dataset` and the Hub's viewer can open.
    """
    import jinja2
    import yaml

    files = sorted(files)
    config = results.get("config") or {}
    model = str(results.get("model_name") or "unknown model")
    sparse = config.get("sparse") or {}
    configs = sample_configs(files)
    front: dict[str, Any] = {
        "pretty_name": f"{_TITLE} {model}",
        "tags": ["lm-eval-sparse", "lm-evaluation-harness", "sparse-attention", "evaluation"],
    }
    if configs:
        front["configs"] = configs
    template = resources.files("lm_eval_sparse.hub_cards").joinpath("results_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "figure": _number}
    return environment.from_string(template).render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000).strip(),
        begin=BEGIN,
        end=END,
        model=model,
        model_url=model_url,
        repo_id=repo_id,
        sparse=sparse,
        phases=_phases(sparse),
        scores=_scores(results, sparse),
        skipped=_skipped(results, sparse),
        limit=config.get("limit"),
        evaluated=_date(results.get("date")),
        versions=_versions(results, sparse),
        command=reproduce_command(results),
        results_files=sorted(filter(_RESULTS_FILE.fullmatch, files), key=_run_date, reverse=True),
        configs=[entry["config_name"] for entry in configs],
        contact=contact,
        leaderboard=leaderboard,
    )


def merge_cards(previous: str, ours: str) -> str:
    """Put the card `ours` into the repository's `previous` one, keeping whatever people have written there."""
    import yaml

    front, body = _split_card(previous)
    if _LM_EVAL_CARD in previous:
        front, body = {}, ""
    our_front, our_body = _split_card(ours)
    merged = {**front, **our_front}
    if isinstance(front.get("tags"), list):
        merged["tags"] = list(dict.fromkeys([*front["tags"], *our_front["tags"]]))
    if not str(front.get("pretty_name") or _TITLE).startswith(_TITLE):
        merged["pretty_name"] = front["pretty_name"]
    theirs = [entry for entry in front.get("configs") or () if "samples_" not in str(entry)]
    merged["configs"] = [*theirs, *our_front.get("configs", ())]
    merged.pop("viewer", None)
    if not merged["configs"]:
        del merged["configs"]
        # Nested results files are no table; without this the Hub's viewer shows an error on them.
        merged["viewer"] = False
    before, mark, rest = body.partition(BEGIN)
    if mark and END in rest:
        body = before + our_body.strip() + rest.partition(END)[2]
    else:
        body = "\n\n".join(part for part in (body.strip(), our_body.strip()) if part)
    text = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=1000).strip()
    return f"---\n{text}\n---\n\n{body.strip()}\n"


def _split_card(card: str) -> tuple[dict[str, Any], str]:
    import yaml

    found = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.S)
    if not found:
        return {}, card
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), card[found.end() :]


def sample_configs(files: Iterable[str]) -> list[dict[str, Any]]:
    """The card's `configs` for lm-eval's sample files: one per model and task, split `latest` and the run's date.

    Only the newest run of each: samples of older runs may have other columns, and one configuration has one schema.
    """
    newest: dict[str, tuple[str, str]] = {}
    for path in files:
        if found := _SAMPLES_FILE.fullmatch(path):
            folder = re.sub(r'[<>:/\\|?*"]+', "__", found["folder"] or "")
            name = "__".join(part for part in (folder, re.sub(r"\W", "_", found["task"])) if part)
            newest[name] = max(newest.get(name, ("", "")), (found["date"], path))
    return [
        {
            "config_name": name,
            "data_files": [
                {"split": re.sub(r"[^\w.]", "_", date), "path": [path]},
                {"split": "latest", "path": [path]},
            ],
        }
        for name, (date, path) in sorted(newest.items())
    ]


def sample_file_name(task: str, date: str) -> str:
    """The name of the file with a task's samples: as lm-eval's, with `_` for what no file's name can hold."""
    return f"samples_{re.sub(r'[^0-9A-Za-z._-]', '_', task)}_{date}.jsonl"


def reproduce_command(results: Mapping[str, Any]) -> str:
    """The command line that repeats the run, rebuilt from its results (so without local paths and tokens)."""
    config = results.get("config") or {}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(pair.partition("=")[::2] for pair in arguments.split(",") if pair)
    shown = {key: _without_folder(value) for key, value in arguments.items() if key not in ("token", "use_auth_token")}
    parts = ["lm_eval", "--model", str(config.get("model", "sparse-hf"))]
    if shown:
        parts += ["--model_args", ",".join(f"{key}={value}" for key, value in shown.items())]
    parts += ["--tasks", ",".join(results.get("configs") or results.get("results") or ())]
    shots = set((results.get("n-shot") or {}).values())
    if len(shots) == 1 and shots != {0}:
        parts += ["--num_fewshot", str(shots.pop())]
    if (limit := config.get("limit")) is not None:
        parts += ["--limit", f"{limit:g}"]
    if config.get("batch_size") not in (None, 1, "1"):
        parts += ["--batch_size", str(config["batch_size"])]
    if config.get("gen_kwargs"):
        generation = config["gen_kwargs"]
        if isinstance(generation, Mapping):
            generation = ",".join(f"{key}={value}" for key, value in generation.items())
        parts += ["--gen_kwargs", str(generation)]
    if results.get("system_instruction"):
        parts += ["--system_instruction", str(results["system_instruction"])]
    if results.get("chat_template"):
        parts.append("--apply_chat_template")
    return " ".join(shlex.quote(part) for part in parts)


def _without_folder(value: Any) -> Any:
    """Where a folder lies on somebody's machine is nobody's business; its name is enough."""
    if isinstance(value, str) and (value.startswith(("/", ".", "~")) or os.path.isdir(value)):
        return f"path/to/{os.path.basename(os.path.abspath(value))}"
    return value


def _scores(results: Mapping[str, Any], sparse: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task (or group), metric and filter of a results dict."""
    rows = []
    per_task = {**(results.get("results") or {}), **(results.get("groups") or {})}
    for task, values in per_task.items():
        for key, value in values.items():
            metric, comma, metric_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or metric == "bypass":
                continue
            better = ((results.get("higher_is_better") or {}).get(task) or {}).get(metric)
            rows.append(
                {
                    "task": task,
                    "version": (results.get("versions") or {}).get(task),
                    "filter": metric_filter,
                    "shots": (results.get("n-shot") or {}).get(task),
                    "metric": metric + {True: " ↑", False: " ↓"}.get(better, ""),
                    "value": _number(value),
                    "stderr": _number(values.get(f"{metric}_stderr,{metric_filter}")),
                    "sparsity": _measured((sparse.get("tasks") or {}).get(task)),
                    "n": ((results.get("n-samples") or {}).get(task) or {}).get("effective", values.get("sample_len")),
                }
            )
    return rows


def _measured(phases: Mapping[str, Any] | None) -> str:
    """What the sparse phases executed, in their order, or what prefill did when all phases were dense."""
    known = [figures for figures in (phases or {}).values() if figures.get("executed_sparsity") is not None]
    sparse = [figures for figures in known if (figures.get("calls") or {}).get("sparse")]
    return " / ".join(_number(figures["executed_sparsity"]) for figures in sparse or known[:1]) or _number(None)


def _skipped(results: Mapping[str, Any], sparse: Mapping[str, Any]) -> dict[str, str]:
    """Tasks that gave no score, and why if that is known."""
    counts = results.get("n-samples") or {}
    return {task: "" for task, n in counts.items() if not n.get("effective")} | dict(sparse.get("skipped") or {})


def _phases(sparse: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The per-phase figures of the `sparse` block, in the order in which the phases run; none that made no call."""
    phases = {phase: (sparse.get("phases") or {}).get(phase) for phase in ("prefill", "eviction", "decode")}
    return {
        phase: figures for phase, figures in phases.items() if figures and any((figures.get("calls") or {}).values())
    }


def _versions(results: Mapping[str, Any], sparse: Mapping[str, Any]) -> dict[str, str]:
    versions = sparse.get("versions") or {
        "lm_eval_sparse": __version__,
        "lm_eval": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
    }
    return {name: str(version) for name, version in versions.items() if version}


def _run_date(results_file: str) -> str:
    found = _RESULTS_FILE.fullmatch(results_file)
    return found["date"] if found else ""


def _date(timestamp: Any) -> str:
    if not isinstance(timestamp, (int, float)):
        return ""
    return datetime.fromtimestamp(timestamp, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: Any) -> str:
    """A figure for people: four decimals, counts as such, and a dash for what there is not."""
    if value is None or value == "N/A":
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    """Anything as the text of one Markdown table cell; settings are shown as they were typed."""
    text = f"{value:g}" if isinstance(value, float) else _number(value)
    return " ".join(text.replace("|", "\\|").split())
