"""The start-up hook and the two registering patches: they work, cost nothing, and never break lm-eval."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fresh_venv import ROOT, lent_packages, run

import lm_eval_sparse.patches as patches
from lm_eval_sparse import paths
from lm_eval_sparse.patches import read_once, register_model, register_tasks, user_errors

HOOK = ROOT / "patches" / "_lm_eval_sparse_hook.py"
PTH = ROOT / "patches" / "lm_eval_sparse_autoload.pth"

# What `lm_eval` is to the hook, in standard library only: fast, and runs under every Python at hand.
FAKE_LM_EVAL = {
    "lm_eval/__init__.py": "",
    "lm_eval/models/__init__.py": "NAME = __name__",
    "lm_eval/api/__init__.py": "",
    "lm_eval/api/registry.py": """
class Registry(dict):
    def register(self, name, *, target):
        self[name] = target
model_registry = Registry(hf="lm_eval.models.huggingface:HFLM")
""",
    "lm_eval/tasks/__init__.py": "from lm_eval.tasks.manager import TaskManager",
    "lm_eval/tasks/manager.py": """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.include_path, self.paths = include_path, include_path
        self.paths = self.paths if isinstance(self.paths, list) else [self.paths]
        self.rest = (verbosity, include_defaults, metadata)
""",
}
REGISTERED = "from lm_eval.api.registry import model_registry; print('sparse-hf' in model_registry)"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def start_up(folder: Path, with_hook: bool = True) -> str:
    """Code that makes `folder` a site directory with our start-up file in it, as Python's start does."""
    folder.mkdir(exist_ok=True)
    shutil.copy(PTH, folder)
    if with_hook:
        shutil.copy(HOOK, folder)
    return f"import site, sys; site.addsitedir({str(folder)!r})\n"


def python(
    code: str,
    *paths: Path,
    flags: tuple[str, ...] = (),
    executable: str = sys.executable,
    check: bool = True,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run code under a Python that has `paths` on its path and none of the runner's site-packages."""
    search = os.pathsep.join(str(path) for path in paths)
    return run(executable, "-S", *flags, "-c", code, check=check, PYTHONPATH=search, **env)


# --- the start-up file ---------------------------------------------------------------------------------------


def test_start_up_files_are_one_line_each() -> None:
    (line,) = PTH.read_text().splitlines()
    assert line.startswith("import ")  # site executes no other lines
    module, _, function = PTH.with_suffix(".start").read_text().strip().partition(":")
    assert module == HOOK.stem
    assert f"def {function}()" in HOOK.read_text()


def test_start_up_file_without_the_hook_is_silent(tmp_path: Path) -> None:
    done = python(start_up(tmp_path / "site", with_hook=False) + "print('alive')", tmp_path)
    assert (done.stdout, done.stderr) == ("alive\n", "")


@pytest.mark.parametrize("value, hooked", [("1", False), ("", True)])
def test_opt_out(tmp_path: Path, value: str, hooked: bool) -> None:
    write(tmp_path, FAKE_LM_EVAL)
    code = start_up(tmp_path / "site") + "import lm_eval.models\n" + REGISTERED
    done = python(code, tmp_path, ROOT, LM_EVAL_SPARSE_NO_AUTOLOAD=value)
    assert (done.stdout.strip(), done.stderr) == (str(hooked), "")


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14", "3.15"])
def test_start_up_under_every_python_at_hand(tmp_path: Path, version: str) -> None:
    executable = shutil.which(f"python{version}")
    if not executable or subprocess.run([executable, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    write(tmp_path, FAKE_LM_EVAL)
    code = f"""{start_up(tmp_path / "site")}
import lm_eval.models, lm_eval.tasks
{REGISTERED}
print(lm_eval.tasks.TaskManager().paths)
"""
    done = python(code, tmp_path, ROOT, executable=executable)
    assert done.stdout.splitlines() == ["True", str([str(ROOT / "tasks")])]
    assert done.stderr == ""


def test_hook_costs_under_5_ms_and_imports_nothing() -> None:
    code = f"""
import os, sys, time
sys.path.insert(0, {str(HOOK.parent)!r})
before = set(sys.modules)
start = time.perf_counter()
import _lm_eval_sparse_hook; _lm_eval_sparse_hook.autoload()
print(1e3 * (time.perf_counter() - start), *(set(sys.modules) - before))
"""
    # -S: where the package is installed, site has imported the hook already.
    runs = [run(sys.executable, "-S", "-c", code).stdout.split() for _ in range(8)]
    # The least of several fresh processes, so that a busy machine does not matter.
    assert min(float(first) for first, *_ in runs) < 5
    assert all(new == ["_lm_eval_sparse_hook"] for _, *new in runs)


def test_other_imports_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"other/__init__.py": "", "other/models.py": "", "lm_eval/__init__.py": "", "lm_eval/api.py": ""})
    code = f"""{start_up(tmp_path / "site")}
import other.models, lm_eval.api
for module in (other.models, lm_eval.api):
    assert "exec_module" not in vars(module.__loader__), module
assert not [name for name in sys.modules if name.startswith("lm_eval_sparse")]
"""
    assert python(code, tmp_path, ROOT).stderr == ""


# --- the hook ------------------------------------------------------------------------------------------------


def load_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hook_under_test", HOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hook_and_patches_name_the_same_modules() -> None:
    assert tuple(patches.PATCHES) == load_hook().TARGETS


def test_every_patch_exists_and_says_when_to_delete_it() -> None:
    for name in (name for names in patches.PATCHES.values() for name in names):
        module = importlib.import_module(f"lm_eval_sparse.patches.{name}")
        assert "Delete" in module.__doc__ or "delete" in module.__doc__, name
        assert callable(module.apply)


def test_modules_imported_before_the_hook_are_patched(tmp_path: Path) -> None:
    write(tmp_path, FAKE_LM_EVAL)
    code = f"""
import lm_eval.models, lm_eval.tasks
{REGISTERED}
import lm_eval_sparse.patches
lm_eval_sparse.patches.install()
lm_eval_sparse.patches.install()
{REGISTERED}
print(len(lm_eval.tasks.TaskManager().paths))
import sys; print(sum("PostImport" in str(finder) for finder in sys.meta_path))
"""
    done = python(code, tmp_path, ROOT)
    assert done.stdout.split() == ["False", "True", "1", "1"]
    assert done.stderr == ""


def test_two_copies_of_the_hook_install_one_finder(tmp_path: Path) -> None:
    # An editable install: the start-up file loads the copy in site-packages, the script the one in the checkout.
    code = f"""{start_up(tmp_path / "site")}
import lm_eval_sparse.patches
lm_eval_sparse.patches.install()
print(sum(getattr(finder, "lm_eval_sparse_hook", False) for finder in sys.meta_path))
"""
    assert python(code, ROOT).stdout.split() == ["1"]


@pytest.mark.parametrize("position", [0, 1])
def test_another_delegating_finder_does_not_recurse(tmp_path: Path, position: int) -> None:
    write(tmp_path, FAKE_LM_EVAL)
    code = f"""{start_up(tmp_path / "site")}
class Delegating:
    @staticmethod
    def find_spec(name, path=None, target=None):
        for finder in sys.meta_path:
            if finder is not Delegating:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
sys.meta_path.insert({position}, Delegating)
import lm_eval.models
{REGISTERED}
"""
    done = python(code, tmp_path, ROOT)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_reload_patches_again(tmp_path: Path) -> None:
    write(tmp_path, FAKE_LM_EVAL)
    code = f"""{start_up(tmp_path / "site")}
import importlib, lm_eval.tasks.manager as manager
importlib.reload(manager)
print(len(manager.TaskManager(include_path="mine").paths))
"""
    assert python(code, tmp_path, ROOT).stdout.split() == ["2"]


def test_works_from_a_zip_archive(tmp_path: Path) -> None:
    # One loader object serves every module of an archive, so the wrapper must tell them apart.
    write(tmp_path / "src", FAKE_LM_EVAL)
    archive = shutil.make_archive(str(tmp_path / "fake"), "zip", tmp_path / "src")
    code = f"""{start_up(tmp_path / "site")}
import lm_eval.models, lm_eval.tasks, lm_eval.api.registry
{REGISTERED}
print(len(lm_eval.tasks.TaskManager(include_path="mine").paths))
"""
    done = python(code, Path(archive), ROOT)
    assert (done.stdout.split(), done.stderr) == (["True", "2"], "")


@pytest.mark.parametrize("flags", [(), ("-W", "error")])
def test_a_broken_package_breaks_nothing(tmp_path: Path, flags: tuple[str, ...]) -> None:
    write(tmp_path, {**FAKE_LM_EVAL, "lm_eval_sparse/__init__.py": "raise RuntimeError('half an upgrade')"})
    code = start_up(tmp_path / "site") + "import lm_eval.models, lm_eval.tasks\nprint(lm_eval.tasks.TaskManager().rest)"
    done = python(code, tmp_path, flags=flags)
    assert done.stdout.strip() == "(None, True, None)"
    (line,) = done.stderr.splitlines()
    assert "half an upgrade" in line and "LM_EVAL_SPARSE_NO_AUTOLOAD" in line


def test_a_broken_package_does_not_break_the_real_lm_eval(tmp_path: Path) -> None:
    write(tmp_path, {"lm_eval_sparse/__init__.py": "raise RuntimeError('half an upgrade')"})
    code = f"""{start_up(tmp_path / "site")}
import lm_eval.models
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
print("hf" in model_registry, "sparse-hf" in model_registry, TaskManager(include_defaults=False).all_tasks)
"""
    done = python(code, tmp_path, lent_packages())
    assert done.stdout.strip() == "True False []"
    assert done.stderr.count("half an upgrade") == 1


def test_a_missing_or_failing_patch_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    applied = []
    good = ModuleType("good")
    good.apply = applied.append
    bad = ModuleType("bad")
    bad.apply = lambda module: module.nothing_of_the_kind
    monkeypatch.setitem(sys.modules, "lm_eval_sparse.patches.good", good)
    monkeypatch.setitem(sys.modules, "lm_eval_sparse.patches.bad", bad)
    monkeypatch.setattr(patches, "PATCHES", {"some.module": ("absent", "bad", "good")})
    monkeypatch.setattr(patches, "_warned", set())
    target = ModuleType("some.module")
    with caplog.at_level(logging.WARNING, "lm_eval_sparse"):
        patches.after_import("some.module", target)
        patches.after_import("some.module", target)
        patches.after_import("a.stranger", target)
    assert applied == [target, target]
    assert [message.split(" was not applied")[0] for message in caplog.messages] == [
        "lm-eval-sparse: patch 'absent'",
        "lm-eval-sparse: patch 'bad'",
    ]


# --- the patches ---------------------------------------------------------------------------------------------


def released_manager() -> ModuleType:
    """A fresh stand-in for `lm_eval.tasks.manager` 0.4.13."""
    module = ModuleType("lm_eval.tasks.manager")
    exec(FAKE_LM_EVAL["lm_eval/tasks/manager.py"], vars(module))
    return module


@pytest.mark.parametrize(
    "given, theirs",
    [(None, []), ("mine", ["mine"]), (Path("mine"), [Path("mine")]), (["a", "b"], ["a", "b"]), (("a",), ["a"])],
)
def test_user_paths_come_after_ours(given: object, theirs: list) -> None:
    module = released_manager()
    register_tasks.apply(module)
    register_tasks.apply(module)
    ours = paths.task_folders()
    assert ours == [str(ROOT / "tasks")]
    for manager in (module.TaskManager(include_path=given), module.TaskManager(None, given)):
        assert manager.paths == [*ours, *theirs]
        assert manager.include_path == given
        assert manager.rest == (None, True, None)
    assert module.TaskManager("INFO", given, True, {"a": 1}).rest == ("INFO", True, {"a": 1})


@pytest.mark.parametrize("given", [None, "mine", Path("mine"), ["a", "b"], ("a",), []])
def test_without_default_tasks_there_are_none_of_ours(given: object) -> None:
    original, wrapped = released_manager(), released_manager()
    register_tasks.apply(wrapped)
    for args, kwargs in [((), {"include_path": given, "include_defaults": False}), (("INFO", given, False), {})]:
        expected = vars(original.TaskManager(*args, **kwargs))
        assert vars(wrapped.TaskManager(*args, **kwargs)) == expected


def test_the_real_task_manager_without_default_tasks_lists_what_is_included(tmp_path: Path) -> None:
    """The shape of a test of lm-eval's own, which must not see that we are installed."""
    from lm_eval.tasks import TaskManager

    patches.install()
    write(tmp_path / "mine", {"one.yaml": "task: one_of_mine\ndataset_path: json\n"})
    for given in (str(tmp_path / "mine"), tmp_path / "mine", [tmp_path / "mine"]):
        assert TaskManager(include_path=given, include_defaults=False).all_tasks == ["one_of_mine"]
        assert TaskManager(None, given, False).all_tasks == ["one_of_mine"]
    assert TaskManager(include_defaults=False).all_tasks == []


def test_included_files_are_read_once_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against lm-eval's own: settings, tags, what is left out (a ring, and a file that comes twice), what is listed."""
    from lm_eval.tasks import _yaml_loader, manager

    def plain(function: object) -> object:
        while getattr(function, "_lm_eval_sparse", False):
            function = function.__wrapped__
        return function

    files = {f"t{i}.yaml": f"include: [base.yaml]\ntask: t{i}\nrepeats: {i}\n" for i in range(1, 6)}
    files |= {
        "base.yaml": "include: sub/deep.yaml\ndataset_path: json\nmetadata: {version: 1, of: [a]}\ntask_list: [x]\n",
        "sub/deep.yaml": "output_type: generate_until\ntag: [all]\ndoc_to_text: !function utils.text\n",
        "ring.yaml": "include: ring2.yaml\ntask: ring\n",
        "ring2.yaml": "include: ring.yaml\n",
        "twice.yaml": "include: [base.yaml, sub/deep.yaml]\ntask: twice\n",
        "missing.yaml": "include: nowhere.yaml\ntask: missing\n",
        "group.yaml": "group: g\ntask: [t1, t2]\n",
    }
    write(tmp_path, files)
    original = _yaml_loader.load_yaml
    monkeypatch.setattr(manager.TaskIndex, "build", staticmethod(plain(manager.TaskIndex.build)))
    monkeypatch.setattr(manager.TaskManager, "list_all_tasks", plain(manager.TaskManager.list_all_tasks))

    def found() -> tuple[dict, str, int]:
        parsed = []
        with monkeypatch.context() as patched:
            load = _yaml_loader.yaml.load
            patched.setattr(_yaml_loader.yaml, "load", lambda *a, **k: parsed.append(1) or load(*a, **k))
            tasks = manager.TaskManager(include_path=str(tmp_path), include_defaults=False)
            entries = {name: (e.kind, e.yaml_path, e.cfg, e.tags) for name, e in tasks._index.items()}
            return entries, tasks.list_all_tasks(), len(parsed)

    wanted, table, often = found()
    read_once.apply(manager)
    read_once.apply(manager)
    entries, listed, once = found()
    assert entries == wanted and listed == table and {"t1", "t5", "g", "all"} <= entries.keys()
    assert not {"ring", "twice", "missing"} & entries.keys()
    assert once < often - 4 * 2 and _yaml_loader.load_yaml is original  # base and deep, for four more tasks


def test_nothing_is_done_where_lm_eval_discovers_plugin_tasks() -> None:
    module = released_manager()
    module.discover_plugin_task_paths = list
    original = module.TaskManager.__init__
    register_tasks.apply(module)
    assert module.TaskManager.__init__ is original
    assert not hasattr(module.TaskManager, "_lm_eval_sparse")


def test_an_unknown_task_manager_is_refused_not_broken() -> None:
    module = ModuleType("lm_eval.tasks.manager")
    module.TaskManager = type("TaskManager", (), {"__init__": lambda self, folders=(): None})
    with pytest.raises(TypeError, match="include_path"):
        register_tasks.apply(module)
    module.TaskManager()


def test_an_entry_point_that_came_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("lm_eval.api.registry")
    mine = registry.Registry("model")
    monkeypatch.setattr(registry, "model_registry", mine)
    register_model.apply(ModuleType("lm_eval.models"))
    register_model.apply(ModuleType("lm_eval.models"))
    assert mine._objs == {"sparse-hf": "lm_eval_sparse.model.lm:SparseHFLM"}

    theirs = registry.Registry("model")
    monkeypatch.setattr(registry, "model_registry", theirs)
    theirs.register("sparse-hf", target="from.an:EntryPoint")
    register_model.apply(ModuleType("lm_eval.models"))
    assert theirs._objs == {"sparse-hf": "from.an:EntryPoint"}


def test_user_error_is_one_line(tmp_path: Path) -> None:
    # Under the hook alone, as with plain `lm_eval`.
    write(tmp_path, {**FAKE_LM_EVAL, "lm_eval/evaluator.py": "def simple_evaluate(*args, **kwargs): pass"})
    code = f"""{start_up(tmp_path / "site")}
import lm_eval.evaluator
from lm_eval_sparse.errors import UserError
raise UserError("sparsity=2 is out of range")
"""
    done = python(code, tmp_path, ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "lm-eval-sparse: error: sparsity=2 is out of range"
    assert "Traceback" not in done.stderr


def test_user_errors_patch_is_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    user_errors.apply(ModuleType("lm_eval.evaluator"))
    first = sys.excepthook
    user_errors.apply(ModuleType("lm_eval.evaluator"))
    assert sys.excepthook is first is not sys.__excepthook__


# --- the real lm-eval ----------------------------------------------------------------------------------------


def test_real_task_manager_lets_the_user_win(tmp_path: Path) -> None:
    write(tmp_path / "mine", {"niah.yaml": "task: frontier_niah_4k\ndataset_path: json\n"})
    code = f"""{start_up(tmp_path / "site")}
import lm_eval.tasks.manager as module
module.__file__ = {str(tmp_path / "none" / "manager.py")!r}  # lm-eval's own thousands take five seconds to list
manager = module.TaskManager(include_path={str(tmp_path / "mine")!r})
print(manager.task_index["frontier_niah_4k"].yaml_path)
"""
    done = python(code, ROOT, lent_packages())
    assert done.stdout.strip() == str(tmp_path / "mine" / "niah.yaml")


@pytest.mark.slow
def test_module_command_works_without_start_up_files() -> None:
    """`python -S` reads no .pth file; our command installs the hook itself and passes on lm-eval's arguments."""
    path = os.pathsep.join([str(lent_packages()), str(ROOT)])
    argv = [sys.executable, "-S", "-m", "lm_eval_sparse", "validate", "--tasks", "frontier_niah_4k"]
    done = run(*argv, check=False, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "frontier_niah_4k" in done.stdout
