"""Makes `--hf_hub_log_args` work for `sparse-hf`; every other model type keeps lm-eval's behaviour.

Works around, in lm-eval up to 0.4.13:
- A push of results without samples always dies in the dataset card (IndexError, RepositoryNotFoundError), after
  the run and before the table is printed. With samples the card reads the results back through `datasets`, which
  fails on model names with spaces and on tokenizers without a BOS token, and uses another token than the push.
- Failed uploads are a logged warning and exit status 0, and what cannot work is found out after hours of compute.
- Samples go up as the whole output folder: other runs too, and with `--output_path results.json` everything that
  lies beside that file.
- A local model's path on this machine becomes the path in the repository and the name of the output folder.
- `gated=True` asks huggingface.co whatever HF_ENDPOINT is; when that fails the samples are published ungated.

Trackers that `preflight` has marked save their local files through lm-eval's own code and push through
`lm_eval_sparse.hub.upload`. Delete when the oldest supported lm-eval pushes results without samples, reports failed
uploads and uploads only its own run; keep what `preflight` refuses then still needs refusing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from lm_eval_sparse import endings, paths
from lm_eval_sparse.errors import UserError, nearest
from lm_eval_sparse.harness import MODEL
from lm_eval_sparse.hub import upload as hub
from lm_eval_sparse.model import embedded
from lm_eval_sparse.patches import saving
from lm_eval_sparse.values import yes_or_no

MODULE = "lm_eval.loggers.evaluation_tracker"
FLAGS = ("push_results_to_hub", "push_samples_to_hub", "public_repo", "gated_repo")


@dataclass
class _Run:
    """What is to be pushed of one tracker's run and how far that has come. Lies on the tracker as `_lm_eval_sparse`."""

    results_target: hub.Target | None = None
    samples_target: hub.Target | None = None
    results: dict[str, Any] | None = None
    samples: Mapping[str, list[Any]] = field(default_factory=dict)
    results_file: Path | None = None
    sample_files: dict[str, Path] = field(default_factory=dict)
    results_pushed: bool = False
    samples_pushed: bool = False
    error: str = ""

    @property
    def targets(self) -> list[hub.Target]:
        """The repositories, each once."""
        return list(dict.fromkeys(filter(None, (self.results_target, self.samples_target))))

    def attempt(self, target: hub.Target, upload: Callable[[], None]) -> bool:
        """Run `upload` unless something failed before; keep the reason of a failure for the end of the run."""
        if self.error:
            return False
        try:
            upload()
        except Exception as error:
            self.error = f"pushing to {target.repo_id} failed ({hub.reason(error)})"
        return not self.error


# -- before the run


def preflight(
    tracker: Any, *, log_samples: bool, limit: float | None, predict_only: bool, model_args: Any = None
) -> None:
    """Mark `tracker` as that of a `sparse-hf` run; raise `UserError` when it cannot save or push what it is to.

    Called before the model is built. Leaves nothing behind, neither here nor on the Hub, and asks the Hub nothing when
    nothing is to be pushed. `limit` is no reason to refuse: the card says that the run was limited. `model_args` name
    the model, under whose name files are saved.
    """
    module = importlib.import_module(MODULE)
    if not isinstance(tracker, module.EvaluationTracker):
        return
    apply(module)
    run = tracker._lm_eval_sparse = _Run()
    if tracker.output_path and os.environ.get("RANK", "0") == "0":  # the process that saves
        _check_output(Path(tracker.output_path), model_args)
    if not (tracker.push_results_to_hub or tracker.push_samples_to_hub):
        return
    for name in FLAGS:
        # A word such as `no` or `off` arrives as a string, which Python takes for true: public_repo=no would publish.
        option = name.removesuffix("_repo") if name == "gated_repo" else name
        setattr(tracker, name, yes_or_no("--hf_hub_log_args ", option, getattr(tracker, name)))
    if not tracker.output_path:
        raise UserError(
            "--hf_hub_log_args pushes the files that are saved under --output_path; add --output_path FOLDER"
        )
    if tracker.push_samples_to_hub and not (log_samples or predict_only):
        raise UserError(
            "push_samples_to_hub=True needs the samples: add --log_samples, or leave push_samples_to_hub out"
        )
    if tracker.gated_repo and not tracker.push_samples_to_hub:
        raise UserError(
            "gated=True gates the repository of the samples, and none are pushed; "
            "add push_samples_to_hub=True and --log_samples, or leave gated out"
        )
    private = not tracker.public_repo
    if tracker.push_results_to_hub:
        run.results_target = hub.Target(tracker.results_repo_private if private else tracker.results_repo, private)
    if tracker.push_samples_to_hub:
        name = tracker.details_repo_private if private else tracker.details_repo
        run.samples_target = hub.Target(name, private, bool(tracker.gated_repo))
        if run.results_target and run.results_target.repo_id == name:
            # One repository: it must be gated before the first file is in it.
            run.results_target = run.samples_target
    identity = hub.check_token(tracker.api)
    for target in run.targets:
        hub.check_target(tracker.api, identity, target)


def _check_output(output: Path, model_args: Any) -> None:
    """lm-eval finds out when it saves, and then only logs it: the scores of the whole run would be lost."""
    date = "2026-01-01T00-00-00.000000"
    if output.suffix == ".json":
        folder, name = output.parent, f"{output.stem}_{date}.json"
    else:
        folder, name = output / _sanitized(public_name(model_args)[0]), f"results_{date}.json"
    paths.check_writable(f"--output_path {output}", folder, [name])


# -- lm-eval's classes


def apply(module: ModuleType) -> None:
    """Wrap the methods of `module.EvaluationTracker` and `module.GeneralConfigTracker` that push and name things."""
    tracker, names = module.EvaluationTracker, module.GeneralConfigTracker
    if getattr(tracker, "_lm_eval_sparse_patched", False):
        return
    wrappers = (
        (tracker, "__init__", _init),
        (tracker, "save_results_aggregated", _save_results),
        (tracker, "save_results_samples", _save_samples),
        (tracker, "recreate_metadata_card", _push_card),
        (names, "log_experiment_args", _log_experiment_args),
    )
    # All originals are looked up before the first is replaced: a lm-eval that lacks one stays as it is.
    wrapped = [(cls, name, wrap(getattr(cls, name))) for cls, name, wrap in wrappers]
    tracker._lm_eval_sparse_originals = {name: getattr(tracker, name) for cls, name, _ in wrappers if cls is tracker}
    for cls, name, method in wrapped:
        setattr(cls, name, method)
    tracker._lm_eval_sparse_patched = True


def run_of(tracker: Any) -> _Run | None:
    """The run of a marked tracker, or None: then lm-eval's own code runs (another model, or nothing to save)."""
    run = getattr(tracker, "_lm_eval_sparse", None)
    # A Python caller may reuse a tracker for another model; CUSTOM is a model given as an object.
    ours = tracker.general_config_tracker.model_source in (MODEL, "CUSTOM")
    return run if ours and isinstance(run, _Run) and tracker.output_path else None


def _init(original: Callable[..., None]) -> Callable[..., None]:
    accepted = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        frame = inspect.currentframe()
        if _model_of(frame.f_back if frame else None) != MODEL:
            return original(self, *args, **kwargs)
        for name in kwargs:
            if name not in accepted:
                # Not the value: it could be a token.
                raise UserError(
                    f"--hf_hub_log_args {name}= is unknown{nearest(name, accepted)} (accepted: {', '.join(accepted)})"
                )
        try:
            original(self, *args, **kwargs)
        except Exception as error:
            if not (kwargs.get("push_results_to_hub") or kwargs.get("push_samples_to_hub")):
                raise
            if getattr(self, "api", None) is None:
                raise UserError(
                    "--hf_hub_log_args asks for a push, but there is no token; set HF_TOKEN to one with write access "
                    "(the login stored by `hf auth login` is not read: HF_TOKEN=$(hf auth token))"
                ) from error
            # lm-eval asks whose token it is when no hub_results_org is given. Ask again, for a message of one line.
            hub.check_token(self.api)
            raise

    return __init__


def _model_of(frame: FrameType | None) -> str | None:
    """The model type that lm-eval's command line is about to run; the tracker it makes is never told.

    `frame` is the caller's. Anything but lm-eval's own command line has no such variable, and gets None.
    """
    return getattr(frame.f_locals.get("cfg"), "model", None) if frame else None


def _log_experiment_args(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def log_experiment_args(self, model_source, model_args, *args, **kwargs):
        original(self, model_source, model_args, *args, **kwargs)
        if model_source == MODEL:
            self.model_name, self._lm_eval_sparse_hub_id = public_name(model_args)
            self.model_name_sanitized = _sanitized(self.model_name)

    return log_experiment_args


def _save_results(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_results_aggregated(self, results, samples=None):
        run = run_of(self)
        if run is None:
            return original(self, results=results, samples=samples)
        run.results, run.samples, run.sample_files, run.error = results, samples or {}, {}, ""
        run.results_file, run.results_pushed, run.samples_pushed = None, False, False
        with _saving_only(self):
            try:
                run.results_file = file = saving.results(self, original, results, samples)
            except saving.NotSaved as error:
                print_tables(results)
                where = saving.rescue(self, original, original_of(self, "save_results_samples"), results, run.samples)
                raise UserError(f"what was to be saved in {error} could not be, {where}{_unpushed(run)}") from error
        endings.keep(f"the results are in {file}; type `lm-eval-sparse plot` or read them there")
        if run.results_target:
            name, target = self.general_config_tracker.model_name, run.results_target
            files = {f"{name}/{file.name}": file}
            run.results_pushed = run.attempt(
                target, lambda: hub.push(self.api, target, files, f"Add results of {name}", _secrets(self))
            )

    return save_results_aggregated


def _save_samples(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def save_results_samples(self, task_name, samples):
        run = run_of(self)
        if run is None:
            return original(self, task_name=task_name, samples=samples)
        if run.results_file is None:
            raise UserError("no results are saved beside which samples could be: call save_results_aggregated before")
        with _saving_only(self):
            try:
                run.sample_files[task_name] = saving.task_samples(self, original, task_name, samples)
            except saving.NotSaved as error:
                print_tables(run.results or {})
                left = {task_name: samples, **run.samples}
                left = {task: rows for task, rows in left.items() if task not in run.sample_files}
                where = saving.rescue(self, None, original, run.results or {}, left)
                raise UserError(
                    f"the results are in {run.results_file}, but the samples that were to be saved beside them in "
                    f"{error} could not be, {where}{_unpushed(run)}"
                ) from error
        # One commit for all tasks (the Hub limits commits per hour), as soon as the last one is there.
        if run.sample_files.keys() >= set((run.results or {}).get("configs") or ()):
            _push_samples(self, run)

    return save_results_samples


def _push_card(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def recreate_metadata_card(self):
        run = run_of(self)
        if run is None or not run.targets:
            return original(self)
        if run.results is None:
            raise UserError("nothing to push: call save_results_aggregated before recreate_metadata_card")
        if run.sample_files and not run.samples_pushed:
            _push_samples(self, run)
        if run.samples_target and not run.sample_files:
            run.error = run.error or "there were no samples to push"
        if run.error:
            print_tables(run.results)
            raise UserError(_failure(self, run))
        model = getattr(self.general_config_tracker, "_lm_eval_sparse_hub_id", None)
        for target in run.targets:
            run.attempt(
                target,
                lambda target=target: hub.push_card(
                    self.api,
                    target,
                    run.results,
                    _secrets(self),
                    model_url=f"{self.api.endpoint}/{model}" if model else None,
                    contact=self.point_of_contact,
                    leaderboard=self.leaderboard_url,
                ),
            )
        if run.error:
            print_tables(run.results)
            raise UserError(f"everything is pushed but the card: {run.error}; the next push writes it")

    return recreate_metadata_card


# -- helpers


def original_of(tracker: Any, name: str) -> Callable[..., None]:
    """lm-eval's own method of this name."""
    return type(tracker)._lm_eval_sparse_originals[name]


def _secrets(tracker: Any) -> frozenset[str]:
    """The secrets that were typed for this run."""
    return getattr(tracker, "_lm_eval_sparse_secrets", frozenset())


def _unpushed(run: _Run) -> str:
    return f"; nothing was pushed to {run.targets[0].repo_id}" if run.targets and not run.results_pushed else ""


def public_name(model_args: str | Mapping[str, Any] | None) -> tuple[str, str | None]:
    """Return the name under which a `sparse-hf` model is published, and its id on the Hub if it has one.

    The name of a folder is its last part (or the model it is a download of), never the way to it.
    """
    if isinstance(model_args, str):
        model_args = {key: value for key, _, value in (arg.partition("=") for arg in model_args.split(","))}
    arguments = model_args or {}
    # As in lm-eval, an adapter is what is evaluated. Other keys that lm-eval takes for a name (`delta`, `path`, …)
    # could be the knob of a method.
    given = arguments.get("peft") or arguments.get("pretrained") or embedded.NAME
    if not isinstance(given, (str, os.PathLike)):
        given = getattr(getattr(given, "config", None), "name_or_path", "") or type(given).__name__
    name = str(given)
    if name == embedded.NAME:
        return name, None
    folder = os.path.abspath(paths.expand(f"pretrained={name!r}", name))
    if not os.path.exists(folder):
        return name, name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None
    *_, cached, snapshots, _commit = ("", "", "", *Path(folder).parts)
    if snapshots == "snapshots" and cached.startswith("models--"):
        return (original := cached.removeprefix("models--").replace("--", "/")), original
    return _sanitized(os.path.basename(folder)) or "model", None


def _sanitized(name: str) -> str:
    return importlib.import_module("lm_eval.utils").sanitize_model_name(name)


@contextlib.contextmanager
def _saving_only(tracker: Any) -> Iterator[None]:
    """Let lm-eval's code save files and push nothing."""
    flags = tracker.push_results_to_hub, tracker.push_samples_to_hub
    tracker.push_results_to_hub = tracker.push_samples_to_hub = False
    try:
        yield
    finally:
        tracker.push_results_to_hub, tracker.push_samples_to_hub = flags


def saved_results(tracker: Any) -> Path | None:
    """The results file that lm-eval has just written, or None when it could not (it only logs that)."""
    output, date = Path(tracker.output_path), getattr(tracker, "date_id", None)
    if output.suffix == ".json":
        file = output.with_name(f"{output.stem}_{date}.json")
    else:
        file = output / str(tracker.general_config_tracker.model_name_sanitized) / f"results_{date}.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))  # a full disk leaves half a file
    except (OSError, ValueError):
        return None
    return file


def _push_samples(tracker: Any, run: _Run) -> None:
    target, file = run.samples_target, run.results_file
    if target is None or file is None:
        return
    names = tracker.general_config_tracker
    files = {f"{names.model_name_sanitized}/{path.name}": path for path in (file, *run.sample_files.values())}
    message = f"Add samples of {names.model_name}"
    run.samples_pushed = run.attempt(target, lambda: hub.push(tracker.api, target, files, message, _secrets(tracker)))


def _failure(tracker: Any, run: _Run) -> str:
    """What a run that could not push says: what went wrong, where the files are, what to type."""
    names, folder = tracker.general_config_tracker, saving.place(tracker)[0]
    missing: list[tuple[hub.Target, list[str]]] = []
    if run.results_target and not run.results_pushed:
        missing.append((run.results_target, [str(run.results_file), f"{names.model_name}/{run.results_file.name}"]))
    if run.samples_target and run.sample_files and not run.samples_pushed:
        only = f"*_{tracker.date_id}.json*"  # the folder holds other runs too
        missing.append((run.samples_target, [str(folder), str(names.model_name_sanitized), "--include", only]))
    said = f"the results are safe in {folder}, but {run.error}"
    if not missing:
        return said
    commands = [
        shlex.join(["hf", "upload", target.repo_id, *what, "--repo-type", "dataset", *["--private"] * target.private])
        for target, what in missing
    ]
    gate = "create and gate the repository by hand and " if any(target.gated for target, _ in missing) else ""
    return f"{said}; to push them {gate}type: {' && '.join(commands)}"


def print_tables(results: Mapping[str, Any]) -> None:
    """Print the tables of lm-eval, which prints them after the push only."""
    make_table = importlib.import_module("lm_eval.utils").make_table
    config = results.get("config") or {}
    shown = ("gen_kwargs", "limit", "batch_size")
    settings = ", ".join(f"{key}: {config.get(key)}" for key in shown)
    print(f"{config.get('model', MODEL)} ({config.get('model_args')}), {settings}")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    sys.stdout.flush()
