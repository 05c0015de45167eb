"""Methods from elsewhere: plug-ins of other packages, and files of the user's own; and what is wrong with either.

Long, since the tables of what is wrong stand beside what they are tried with.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from fresh_venv import ROOT, run
from small_lms import score, sparse

from lm_eval_sparse import spelling
from lm_eval_sparse.cli import app
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.methods import METHODS, plugins
from lm_eval_sparse.methods.plan import SparseConfig, parse, split
from lm_eval_sparse.methods.registry import BUILT_IN
from lm_eval_sparse.results.reproduce import reproduce_command

#: A method that works, by the norm of its keys; a wrapper that changes nothing.
METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from lm_eval_sparse.methods import ScoredEviction, number


@dataclass(frozen=True)
class Norms(ScoredEviction):
    name: ClassVar[str] = "{name}"
    importance: ClassVar[str] = "norm of the key"
    reference: ClassVar[str] = "nobody, 2026"
    tiny: ClassVar = {{"capacity": 48}}
    capacity: int = 1024
    {name}_sign: int = -1

    def score(self, call):
        return self.{name}_sign * call.key.float().norm(dim=-1)
"""
WRAPPER = """
from dataclasses import dataclass
from typing import ClassVar

from lm_eval_sparse.methods.wrappers import Wrapper


@dataclass(frozen=True)
class Around(Wrapper):
    name: ClassVar[str] = "around"
    wraps: ClassVar[tuple] = ("decode", "eviction")
    importance: ClassVar[str] = "as inside"
    allocation: ClassVar[str] = "as inside"
    reference: ClassVar[str] = "nobody, 2026"
    share: float = 1.0

    def select(self, call):
        return self.inner.select(call)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package that is one module with entry points, as pip leaves it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules = set(sys.modules)

    def install(package: str, source: str, **points: str) -> None:
        module = package.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        lines = [f"{name} = {value.replace('@', module)}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{plugins.GROUP}]", *lines, ""]))
        plugins.found.cache_clear()

    yield install
    for name in set(sys.modules) - modules:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    plugins.found.cache_clear()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(**typed: Any) -> SparseConfig:
    """What is made of model arguments."""
    ours, others = split(typed)
    assert not others
    return parse(ours)


def line(**typed: Any) -> str:
    """The one line that model arguments are refused with."""
    with pytest.raises(UserError) as raised:
        read(**typed)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- plug-ins ---------------------------------------------------------------------------------------------------------


def test_a_plug_in_is_a_method_like_any_other(install: Install) -> None:
    install("other-methods", METHOD.format(name="norms"), norms="@:Norms")
    assert "norms" in METHODS and "norms" in METHODS.names()
    # Only its metadata was read.
    assert "norms" not in list(METHODS) and "other_methods" not in sys.modules
    read(method="quest", sparsity=0.5)
    line(method="quset")
    line(method="quest", gamma=0.9)
    assert "other_methods" not in sys.modules
    found = read(method="norms+quest", **{"norms.norms_sign": 1, "capacity": 50})
    assert found.method == "norms+quest" and found.methods["eviction"].norms_sign == 1
    code = found.describe()["code"]
    assert code["norms"]["from"] == "other-methods 0.1 other_methods:Norms" and len(code["norms"]["sha256"]) == 64
    assert "code" not in read(method="snapkv+quest", sparsity=0.5).describe()


def test_a_plug_in_runs(install: Install) -> None:
    install("other-methods", METHOD.format(name="norms"), norms="@:Norms")
    lm = sparse(tiny.family("llama"), method="norms", sparsity=0.5, backend="gather")
    score(lm, [(tiny.words(1, 90), " river stone cloud")])
    report = lm.report()
    assert report["phases"]["eviction"]["method"] == "norms" and report["phases"]["eviction"]["calls"]["sparse"]
    assert report["code"]["norms"]["from"].startswith("other-methods 0.1 ")
    assert report["phases"]["eviction"]["executed_sparsity"] == pytest.approx(0.5, abs=0.02)


def test_a_wrapper_may_be_a_plug_in(install: Install) -> None:
    install("wrappers", WRAPPER, around="@:Around")
    assert read(method="around:quest+around:snapkv", sparsity=0.5).method == "around:snapkv+around:quest"
    assert "such as method=around:snapkv" in line(method="around")


#: What is wrong with a package -> its source, where its entry point leads, and what has to be said.
BROKEN: dict[str, tuple[str, str, str]] = {
    "an import that fails": ("import no_such_module", "@:Norms", "No module named 'no_such_module'"),
    "code that fails": ("1 // 0", "@:Norms", "ZeroDivisionError"),
    "code that ends the program": ("raise SystemExit(3)", "@:Norms", "SystemExit: 3"),
    "a slip": ("def f(:", "@:Norms", "SyntaxError: invalid syntax"),
    "no such module": ("", "nowhere.at_all:Norms", "No module named 'nowhere'"),
    "no such class": (METHOD.format(name="norms"), "@:Norm", "there is no Norm in broken"),
    "no method": ("class Norms: pass", "@:Norms", "Norms is no subclass of Method"),
    "a module": ("", "@", "no subclass of Method"),
    "an object": ("Norms = 5", "@:Norms", "5 is no subclass of Method"),
    "another name": (METHOD.format(name="other"), "@:Norms", "calls itself 'other', and its entry point 'norms'"),
    "no reference": (METHOD.format(name="norms").replace("nobody, 2026", ""), "@:Norms", "does not say its reference"),
    "no score": (METHOD.format(name="norms").replace("def score", "def scores"), "@:Norms", "does not score"),
    "no dataclass": (METHOD.format(name="norms").replace("@dataclass(frozen=True)", ""), "@:Norms", "no frozen data"),
    "a knob of everybody": (
        METHOD.format(name="norms").replace("capacity: int", "sparsity: int"), "@:Norms", "an argument of every method",
    ),
    "a knob of the model": (
        METHOD.format(name="norms").replace("norms_sign: int", "dtype: int"), "@:Norms", "an argument of the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plug_in_breaks_nothing_else(
    what: str, install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, value, words = BROKEN[what]
    install("broken", source, norms=value)
    install("whole", METHOD.format(name="whole"), whole="@:Norms")
    assert read(method="snapkv", sparsity=0.5).method == "snapkv"
    assert "accepted" in line(method="snapvk")
    found = line(method="norms", sparsity=0.5)
    assert found.startswith("method=norms: the plug-in of broken 0.1 (") and words in found, found
    assert read(method="whole", sparsity=0.5).method == "whole"
    monkeypatch.setenv("COLUMNS", "100")
    assert app.main(["methods"]) == 0
    shown = capsys.readouterr().out
    (paragraph,) = (text for text in shown.split("\n\n") if text.startswith("norms (cannot be used)"))
    assert words in " ".join(paragraph.split())
    assert all(f"\n\n{name} (" in shown for name in BUILT_IN) and "whole-0.1" not in shown and "whole (ev" in shown
    assert app.main(["methods", "--markdown"]) == 0
    assert "norms" not in capsys.readouterr().out


def test_a_built_in_method_cannot_be_replaced(
    install: Install, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = METHODS["quest"]
    install("shadow", METHOD.format(name="quest"), quest="@:Norms")
    assert METHODS["quest"] is before and "shadow" not in sys.modules
    with caplog.at_level(logging.WARNING):
        assert type(read(method="quest", sparsity=0.5).methods["decode"]) is before
    said = "method=quest is the built-in method; the plug-in shadow 0.1 (shadow:Norms) of the same name is not used"
    assert said in caplog.messages
    caplog.clear()
    read(method="snapkv", sparsity=0.5)
    assert not caplog.messages
    assert app.main(["methods"]) == 0
    assert "plug-in shadow 0.1" in " ".join(capsys.readouterr().out.split())


def test_two_plug_ins_of_one_name_are_refused_by_both_names(install: Install) -> None:
    install("one", METHOD.format(name="norms"), norms="@:Norms")
    install("two", METHOD.format(name="norms"), norms="@:Norms", more="@:Norms")
    found = line(method="norms", sparsity=0.5)
    assert "one 0.1 (one:Norms)" in found and "two 0.1 (two:Norms)" in found and "uninstall one of them" in found
    assert read(method="quest", sparsity=0.5) and "one" not in sys.modules


def test_metadata_that_cannot_be_read_hides_plug_ins_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise ValueError("not a line of entry points")

    plugins.found.cache_clear()
    monkeypatch.setattr(plugins, "entry_points", fail)
    with caplog.at_level(logging.WARNING):
        assert read(method="quest", sparsity=0.5).method == "quest"
        assert METHODS.names() == list(METHODS)
    assert caplog.messages == ["plug-ins of other packages cannot be listed (ValueError: not a line of entry points)"]
    plugins.found.cache_clear()


# --- files ------------------------------------------------------------------------------------------------------------

#: What is typed -> its parts by phase.
SPELT = {
    "quest": [["quest"]],
    "flexprefill+twilight:quest": [["flexprefill"], ["twilight", "quest"]],
    "own.py:Own": [["own.py:Own"]],
    "a/own.py:Own+quest": [["a/own.py:Own"], ["quest"]],
    "twilight:./own.py:Own+snapkv": [["twilight", "./own.py:Own"], ["snapkv"]],
    "snapkv+/a b/own.py:Own": [["snapkv"], ["/a b/own.py:Own"]],
    "./w.py:W:./own.py:Own+~/x.py:X": [["./w.py:W", "./own.py:Own"], ["~/x.py:X"]],
    "./a+b/c:d/own.py:Own+quest": [["./a+b/c:d/own.py:Own"], ["quest"]],
    "../own.pyx/own.py:Own": [["../own.pyx/own.py:Own"]],
    "quest:": [["quest", ""]],
    "+quest": [[""], ["quest"]],
    "": [[""]],
    "./own:Own+quest": [["./own:Own"], ["quest"]],
}


@pytest.mark.parametrize("typed", SPELT)
def test_a_colon_of_a_file_stays_with_it(typed: str) -> None:
    assert spelling.chains(typed) == SPELT[typed]
    assert "+".join(":".join(chain) for chain in spelling.chains(typed)) == typed


def test_files_are_methods(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "a b+c"
    folder.mkdir()
    for path, source in (
        ("own.py", METHOD.format(name="own")),
        ("w.py", WRAPPER),
        ("a b+c/o.py", METHOD.format(name="o")),
    ):
        (here / path).write_text(source)
    monkeypatch.setenv("HOME", str(here))
    for typed, name in (
        ("own.py:Norms", "own"),
        ("./own.py:Norms+quest", "own+quest"),
        ("~/own.py:Norms", "own"),
        (f"{here}/own.py:Norms", "own"),
        ("w.py:Around:own.py:Norms", "around:own"),
        ("quest+./w.py:Around:./a b+c/o.py:Norms", "around:o+quest"),
        ("w.py:Around:quest", "around:quest"),
        ("around:own+quest", "around:own+quest"),  # known by their names from now on
    ):
        assert read(method=typed, sparsity=0.5).method == name
    found = read(method="./own.py:Norms", **{"own.own_sign": 1, "capacity": 20}).methods["eviction"]
    assert (found.own_sign, found.capacity) == (1, 20)
    assert not list(here.rglob("__pycache__"))
    assert "own.nothing=1: own has no knob 'nothing'" in line(method="own.py:Norms", **{"own.nothing": 1})
    assert "type method=flexprefill+own.py:Norms,gamma=0.5 " in line(method="own.py:Norms", gamma=0.5)


def test_results_tell_an_edited_file_from_what_it_was(here: Path) -> None:
    model, path, prints = tiny.family("llama"), here / "own.py", []
    for source in (METHOD, METHOD, METHOD + "\n# another formula\n", METHOD.replace("self.{name}_sign *", "2 +")):
        path.write_text(source.format(name="own"))
        lm = sparse(model, method="./own.py:Norms", sparsity=0.5, backend="gather")
        (found,) = score(lm, [(tiny.words(1, 90), " river stone cloud")])
        prints.append((lm.fingerprint(), float(found[0]), lm.report()["code"]["own"]))
    assert prints[0] == prints[1]
    assert len({json.dumps(one, sort_keys=True) for one, *_ in prints}) == 3
    assert prints[0][1] == prints[2][1] != prints[3][1], "what is run is what is in the file"
    assert {where["from"] for *_, where in prints} == {"own.py:Norms"}, "no folder of anybody's"


#: Content of own.py (None: there is none), what is typed, and what has to be said.
BAD_FILES: dict[str, tuple[str | None, str, str]] = {
    "no file": (None, "./own.py:Own", "own.py does not exist; type method=path/to/file.py:Class"),
    "a folder": (None, "./folder.py:Own", "folder.py is a folder; give a file"),
    "no Python": ("", "./own.txt:Own", "a file with a method ends in .py"),
    "no ending": ("", "./own:Own", "a file with a method ends in .py"),
    "no class": (METHOD.format(name="own"), "own.py", "without a class; methods in it: Norms; type method=own.py:N"),
    "an empty class": (METHOD.format(name="own"), "own.py:", "is named without a class"),
    "another class": (METHOD.format(name="own"), "own.py:Norm", "has no 'Norm'; did you mean 'Norms'?"),
    "no methods": ("x = 1", "own.py:Norms", "there is no method in it"),
    "a function": ("def Norms(): pass", "own.py:Norms", "Norms is no subclass of Method"),
    "a number": ("Norms = 3", "own.py:Norms", "3 is no subclass of Method"),
    "a base class": ("from lm_eval_sparse.methods import ScoredEviction as Own", "own.py:Own", "does not say its name"),
    "an import": ("\n\nimport nothing_there", "own.py:Norms", "Error: No module named 'nothing_there', line 3"),
    "a slip": ("x = 1\ny = (", "own.py:Norms", "SyntaxError: '(' was never closed, line 2"),
    "an exit": ("import sys\nsys.exit(0)", "own.py:Norms", "SystemExit: 0, line 2"),
    "half a character": ("\udcff", "own.py:Norms", "SyntaxError"),
    "a built-in name": (METHOD.format(name="quest"), "own.py:Norms", "'quest' is the name of a built-in method"),
    "no score": (METHOD.format(name="own").replace("score(", "scores("), "own.py:Norms", "does not score"),
    "a colon in its name": (METHOD.format(name="own").replace('"own"', '"o:n"'), "own.py:Norms", "cannot be typed"),
    "a name that is none": (METHOD.format(name="own").replace('"own"', "5"), "own.py:Norms", "5 cannot be typed"),
    "a user who is nobody": (None, "~nosuchuser/own.py:Own", "there is no home folder for ~nosuchuser"),
    "two of one name": (METHOD.format(name="own"), "own.py:Norms+./other.py:Around", "methods call themselves 'own'"),
    "a method as a wrapper": (METHOD.format(name="own"), "own.py:Norms:quest", "own goes around no method"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line(what: str, here: Path) -> None:
    source, typed, words = BAD_FILES[what]
    if source is not None:
        (here / "own.py").write_bytes(source.encode("utf-8", "surrogateescape"))
    (here / "other.py").write_text(WRAPPER.replace("around", "own").replace('("decode", "eviction")', '("decode",)'))
    (here / "folder.py").mkdir()
    typed = typed.replace("./other.py:Around", "./other.py:Around:quest")
    found = line(method=typed, sparsity=0.5)
    assert words in found and found.startswith("method="), found
    assert read(method="quest", sparsity=0.5).method == "quest"


def test_a_file_of_a_plug_in_s_name_is_meant(here: Path, install: Install) -> None:
    """Whoever writes a plug-in may try its file while another version is installed."""
    install("mine", METHOD.format(name="own"), own="@:Norms")
    (here / "own.py").write_text(METHOD.format(name="own"))
    found = read(method="./own.py:Norms", sparsity=0.5)
    assert found.describe()["code"]["own"]["from"] == "own.py:Norms" and "mine" not in sys.modules


# --- whose word runs a file -------------------------------------------------------------------------------------------


@pytest.fixture
def config(here: Path) -> Path:
    (here / "own.py").write_text("open('ran', 'w').close()\n" + METHOD.format(name="own"))
    path = here / "run.yaml"
    path.write_text(
        "model: sparse-hf\ntasks: [x]\nmodel_args:\n  method: flexprefill+./own.py:Norms\n  sparsity: 0.5\n"
    )
    return path


def configured(path: Path, **typed: Any) -> Any:
    """lm-eval's settings from a file and from what is typed beside it."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    return EvaluatorConfig.from_cli(argparse.Namespace(config=str(path), **typed))


def test_a_configuration_file_runs_no_code(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    for load in (lambda: configured(config), lambda: EvaluatorConfig.from_config(str(config))):
        with pytest.raises(UserError, match="./own.py:Norms is a file with code, which runs only when you type it"):
            load()
    config.write_text(config.read_text().replace("model_args:\n  method: ", "model_args: method=").split("\n  sp")[0])
    with pytest.raises(UserError, match=r"run.yaml has method=flexprefill.*, set LM_EVAL_SPARSE_ALLOW_CODE=1"):
        configured(config)
    whole = config.read_text()
    for twice in (
        '"method=./own.py:Norms, method=quest"',
        '"method=quest, method=./own.py:Norms"',
        '{method: ./own.py:Norms, " method": quest}',
        '{" method": ./own.py:Norms, method: quest}',
    ):
        config.write_text(re.sub(r"model_args:.*", lambda _, twice=twice: f"model_args: {twice}", whole))
        with pytest.raises(UserError, match="is a file with code, which runs only when you type it"):
            configured(config)
    config.write_text(whole)
    for value in ("", "0"):
        monkeypatch.setenv("LM_EVAL_SPARSE_ALLOW_CODE", value)
        with pytest.raises(UserError):
            configured(config)
    assert not (config.parent / "ran").exists()
    monkeypatch.setenv("LM_EVAL_SPARSE_ALLOW_CODE", "1")
    assert configured(config).model_args["method"] == "flexprefill+./own.py:Norms"


def test_what_is_typed_takes_the_place_of_the_file(config: Path) -> None:
    found = configured(config, model_args={"method": "own.py:Norms", "sparsity": 0.5})
    assert found.model_args["method"] == "own.py:Norms"
    assert read(**found.model_args).method == "own" and (config.parent / "ran").exists()


def test_methods_are_looked_at_with_the_settings(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tasks are listed and models are made later, which takes a while."""
    for model_args, words in (
        ({"method": "quset"}, "did you mean 'quest'"),
        ({"method": "quest", "quest.bugdet": 5}, "did you mean 'budget'"),
        ({"method": "quest", "sparsity": 2}, "sparsity=2 is not accepted"),
    ):
        with pytest.raises(UserError, match=words):
            configured(config, model_args=model_args)
    caplog.clear()
    assert configured(config, model_args={"method": "snapkv+quest", "sparsity": 0.5}).tasks
    assert not [record for record in caplog.records if record.name.startswith("lm_eval_sparse")], "said once, later"


def test_plain_lm_eval_says_it_in_one_line(config: Path) -> None:
    code = (
        "import sys; from lm_eval_sparse import patches; patches.install(); sys.argv[0] = 'lm_eval'; "
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    words = (sys.executable, "-c", code, "run", "--config", config)
    done = run(*words, cwd=config.parent, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and not (config.parent / "ran").exists()
    assert done.stderr.splitlines()[-1].startswith("lm-eval-sparse: error: ") and "Traceback" not in done.stderr
    assert "own.py:Norms is a file with code" in done.stderr


def test_a_configuration_file_for_another_model_is_not_ours(config: Path) -> None:
    config.write_text(config.read_text().replace("sparse-hf", "hf"))
    assert configured(config).model_args["method"]


def test_a_configuration_file_may_name_methods(config: Path) -> None:
    config.write_text(config.read_text().replace("./own.py:Norms", "quest"))
    assert configured(config).model_args == {"method": "flexprefill+quest", "sparsity": 0.5}


def test_allow_code_is_an_option_of_our_command_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.__main__

    seen: list[Any] = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append((sys.argv[1:], configured(config).model)))
    assert app.main(["run", "--config", str(config)]) == 1
    assert "--allow-code" in capsys.readouterr().err and not seen
    assert app.main(["run", "--config", str(config), "--allow-code"]) == 0
    assert seen == [(["run", "--config", str(config)], "sparse-hf")]
    with pytest.raises(UserError):
        configured(config)


def test_a_command_that_repeats_a_run_shows_no_folder() -> None:
    for typed, shown in (
        ("/home/me/own.py:Own", "path/to/own.py:Own"),
        ("twilight:~/a+b/own.py:Own+snapkv", "twilight:path/to/own.py:Own+snapkv"),
        ("own.py:Own", "own.py:Own"),
        ("flexprefill+quest", "flexprefill+quest"),
    ):
        results = {"config": {"model": "sparse-hf", "model_args": {"method": typed}}, "results": {"t": {}}}
        assert f"--model_args method={shown} " in reproduce_command(results)


# --- what is typed wrong ----------------------------------------------------------------------------------------------

#: Model arguments -> what has to be said, and what to type instead; `around` goes around decode and eviction methods.
TYPED: dict[str, tuple[str, str | None]] = {
    "method=around:": ("a name is missing beside a colon; around goes around one of snapkv,", "method=around:snapkv"),
    "method=flexprefill+around:": ("around goes around one of", "method=flexprefill+around:snapkv"),
    "method=:quest": ("a name is missing beside a colon", "method=quest"),
    "method=quest++snapkv": ("a name is missing beside a plus sign", "method=quest+snapkv"),
    "method=around": ("around goes around a method", "method=around:snapkv"),
    "method=flexprefill+around": ("around goes around a method", "method=flexprefill+around:snapkv"),
    "method=around:around:quest": ("around stands there twice; give it once", "method=around:quest"),
    "method=around:flexprefill": ("goes around methods of the decode or eviction", "method=flexprefill+around:snapkv"),
    "method=quest:around": ("around goes around quest, and stands in front of it", "method=around:quest"),
    "method=quest:snapkv": ("quest goes around no method", "method=quest+snapkv"),
    "method=twilight:magicpig": ("twilight does not go around magicpig, which weighs the keys", "method=magicpig"),
    "method=snapkv+twilight:magicpig": ("one of quest, oracle_topk, oracle_topp behind", "method=snapkv+magicpig"),
    "method=twilight:": ("twilight goes around one of quest, oracle_topk, oracle_topp;", "method=twilight:quest"),
    "method=foo:quest": ("method='foo' in method=foo:quest is unknown (what goes around a me", "method=quest"),
    "method=aruond:quest": ("did you mean 'around'?", "method=quest"),
    "method=snapkv+foo:quest": ("what goes around a method: ", "method=snapkv+quest"),
    "method=around:quest,share=0.5,sha=1": ("", None),
    "method=quest,share=0.5": ("is a knob of around (decode or eviction phase)", "method=around:quest,share=0.5"),
    "method=flexprefill,share=0.5": ("is a knob of around", "method=flexprefill+around:snapkv,share=0.5"),
    "method=flexprefill+quest,around.share=1": ("a knob of around", "method=flexprefill+around:quest,around.share=1"),
    "method=around:quest,capacity=900": ("(eviction phase)", "method=snapkv+around:quest,capacity=900"),
    "method=around:snapkv,floor=0.3": ("ada_snapkv (eviction phase)", "method=around:ada_snapkv,floor=0.3"),
    "method=around:quest,quest.bugdet=9": ("has no knob 'bugdet'; did you mean 'budget'? (knobs of quest:", None),
    "method=around:quest,around.shrae=9": ("around has no knob 'shrae'; did you mean 'share'?", None),
    "method=flexprefill,every=64": ("(eviction phase), but method=flexprefill has no such knob", "method=flexprefill+"),
    "method=quest,every=64": ("every=64 is a knob of ", "+quest,every=64 or leave it out"),
    "method=snapkv,every=64": ("(eviction phase), but method=snapkv", ",every=64 or leave it out"),
    "method=periodic,every=0": ("every=0 is not accepted: give a whole number of at least 1", None),
    "method=periodic,every=-3": ("every=-3 is not accepted", None),
    "method=periodic,every=1.5": ("every=1.5 is not accepted: give a whole number", None),
    "method=periodic,every=often": ("every='often' is not accepted", None),
    "method=periodic,every=True": ("every=True is not accepted", None),
    "method=periodic,every=nan": ("is not accepted", None),
}  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_wrong(typed: str, here: Path) -> None:
    """One line that says what; the first thing in it that can be typed instead works as it stands."""
    from lm_eval.utils import simple_parse_args_string

    (here / "w.py").write_text(WRAPPER)
    periodic = METHOD.format(name="periodic").replace("periodic_sign: int = -1", "every: int | None = None")
    (here / "p.py").write_text(periodic.replace("self.periodic_sign", "-1"))
    METHODS.add_file("w.py:Around")
    METHODS.add_file("p.py:Norms")
    words, instead = TYPED[typed]
    ours, others = split(simple_parse_args_string(typed))
    if others:
        assert list(others) == ["sha"]  # for the model to refuse, with all names that are near
        return
    with pytest.raises(UserError) as raised:
        parse(ours)
    assert words in str(raised.value), str(raised.value)
    if instead is not None:
        assert instead in str(raised.value), str(raised.value)
        (advice,) = re.findall(r"(?:type|as in|such as|type for example) (method=[^ ]+)", str(raised.value))
        assert parse(split(simple_parse_args_string(advice.rstrip(":;,")))[0]).methods


def test_a_name_alone_is_told_how_to_type_it(here: Path) -> None:
    (here / "w.py").write_text(WRAPPER)
    METHODS.add_file("w.py:Around")
    for name, typed in (("quest", "method=quest"), ("around", "method=around:snapkv")):
        with pytest.raises(UserError, match=f"{name} stands alone among the model arguments: type {typed},"):
            sparse(tiny.family("llama"), **{name: ""})
