"""Fresh virtual environments for the install tests: offline, made in a fraction of a second.

Heavy dependencies are lent from the interpreter that runs the tests, through links to everything in its
site-packages except this project's own files, which it usually has installed as well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OURS = ("lm_eval_sparse", "_lm_eval_sparse")


def clean_env(**extra: str) -> dict[str, str]:
    """The environment for child processes: nothing of ours or of the caller's Python in it, no network."""
    drop = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONWARNINGS", "LM_EVAL_SPARSE_NO_AUTOLOAD", "VIRTUAL_ENV")
    env = {key: value for key, value in os.environ.items() if key not in drop}
    return {**env, "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra}


def run(*argv: object, cwd: Path | None = None, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a clean environment, away from the checkout. With `check`, show its output if it fails."""
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd or tempfile.gettempdir(),
        env=clean_env(**env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert done.returncode == 0, f"{argv} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@functools.cache
def lent_packages() -> Path:
    """A folder of links to the running interpreter's installed packages, without this project's.

    Always the same one, so that bytecode which is kept by path is found again.
    """
    folder = ROOT / ".pytest_cache" / "lent-packages"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for entry in sys.path:
        if Path(entry).name not in ("site-packages", "dist-packages") or not Path(entry).is_dir():
            continue
        for item in Path(entry).iterdir():
            skip = item.name.startswith(_OURS) or item.suffix == ".pth" or item.name == "__pycache__"
            if not skip:
                wanted.setdefault(item.name, item)
    for link in folder.iterdir():
        if link.name not in wanted or link.readlink() != wanted[link.name]:
            link.unlink(missing_ok=True)
    for name, item in wanted.items():
        with contextlib.suppress(FileExistsError):  # another process of the tests makes the same links
            (folder / name).symlink_to(item)
    return folder


class Venv:
    """A virtual environment without pip; the running interpreter's pip acts on it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt", with_pip=False)
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run(self.python, "-c", code).stdout.strip())
        # Sorts before every other .pth file, so an editable path comes after it, as it would after real packages.
        (self.site / "__lent.pth").write_text(f"{lent_packages()}\n")

    def pip(self, *argv: object) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *argv)

    def install(self, *argv: object) -> None:
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *argv)

    def listing(self) -> set[str]:
        """All files of the environment except byte code."""
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if not path.is_dir())
        return {path.as_posix() for path in files if "__pycache__" not in path.parts}

    def code(self, code: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return run(self.python, "-c", code, check=check, **env)
