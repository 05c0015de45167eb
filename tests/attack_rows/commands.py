"""Bad arguments of `check-task`, `show`, `new-task` and `methods`, and tasks that misbehave under the first two."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import EITHER, LEGAL, LONG, NAME, REFUSED, REPORTED, Row, short

AREA = "commands"
_T = ("--tokenizer", "<llama>")
_LEAF = "frontier_niah_4k"

SHOW: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "no index": (_LEAF,),
    "no task": ("--index", "0"),
    "an unknown leaf": ("nosuch", "--index", "0", *_T),
    "a slip of a leaf": ("frontier_niah_4l", "--index", "0", *_T),
    "an empty leaf": ("", "--index", "0", *_T),
    "a group": ("frontier", "--index", "0", *_T),
    "a leaf of 10,000 characters": (LONG, "--index", "0", *_T),
    "a leaf of escapes": ("\x1b[2J", "--index", "0", *_T),
    "a leaf with a line end": ("a\nb", "--index", "0", *_T),
    "a leaf that is a path": ("../tasks", "--index", "0", *_T),
    **{f"index {short(index)}": (_LEAF, f"--index={index}", *_T) for index in
       ("-1", "abc", "1.5", "", "1e3", "100", "99999999999999999999", "9" * 5000, "²", "0x1", "0,1", "None")},
    "an unknown option": (_LEAF, "--index", "0", "--nosuch", *_T),
    "a word too many": (_LEAF, "x", "--index", "0", *_T),
    "no such tokenizer": (_LEAF, "--index", "0", "--tokenizer", "/no/such/folder"),
    "an empty tokenizer": (_LEAF, "--index", "0", "--tokenizer", ""),
    "a tokenizer that is none": (_LEAF, "--index", "0", "--tokenizer", "<tasks>"),
    "a tokenizer of 300 characters": (_LEAF, "--index", "0", "--tokenizer", f"./{NAME}"),
    "a tokenizer of another user": (_LEAF, "--index", "0", "--tokenizer", "~nosuchuser/x"),
    "a chat template that is not there": (_LEAF, "--index", "0", "--apply_chat_template", *_T),
    "include_path that is not there": (_LEAF, "--index", "0", "--include_path", "nosuch", *_T),
    "include_path empty": (_LEAF, "--index", "0", "--include_path", "", *_T),
    "include_path of another user": (_LEAF, "--index", "0", "--include_path", "~nosuchuser/x", *_T),
    "include_path of 300 characters": (_LEAF, "--index", "0", "--include_path", NAME, *_T),
    "qa without data": ("frontier_squad_4k", "--index", "0", *_T),
}  # fmt: skip

CHECK: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "an unknown task": ("nosuch", *_T),
    "empty": ("", *_T),
    "a slip of a task": ("niha", *_T),
    "300 characters": (NAME, *_T),
    "10,000 characters": (f"/{LONG}", *_T),
    "another user": ("~nosuchuser/x", *_T),
    "a file": ("<llama>/config.json", *_T),
    "a folder without YAML": ("<llama>", *_T),
    "a device": ("/dev/null", *_T),
    "a line end": ("a\nb", *_T),
    "escapes": ("\x1b[2J", *_T),
    **{f"samples {short(count)}": ("niah", "--samples", count, *_T) for count in
       ("0", "1", "-1", "abc", "1.5", "", "9" * 5000, "²")},
    **{f"lengths {short(lengths)}": ("niah", "--lengths", lengths, *_T) for lengths in
       ("", ",", "5k", "4K", "4k,5k", "4096", LONG, "a\nb")},
    "no such tokenizer": ("niah", "--tokenizer", "/no/such/folder"),
    "metadata that is none": ("niah", "--metadata", "{", *_T),
    "an unknown option": ("niah", "--nosuch", *_T),
}  # fmt: skip

NEW: dict[str, tuple[str, ...]] = {
    "nothing": (),
    **{f"name {short(name)}": (name,) for name in
       ("", "A", "a-b", "a b", "1a", "a__b", "_a", "a/b", "../a", "/tmp/a", ".", "niah", "json", "test", "class",
        "numpy", "a_4k", "frontier_a", "forced_a", "frontier", "größe", "a\nb", "\x1b[2J", "a" * 41, LONG, "a.py",
        "~")},
    "folder empty": ("parcel", "--folder", ""),
    "folder that is not there": ("parcel", "--folder", "nosuch"),
    "folder of another user": ("parcel", "--folder", "~nosuchuser/x"),
    "folder of 300 characters": ("parcel", "--folder", NAME),
    "folder is a file": ("parcel", "--folder", "<llama>/config.json"),
    "folder is a device": ("parcel", "--folder", "/dev/null"),
    "folder in /proc": ("parcel", "--folder", "/proc"),
    "an unknown option": ("parcel", "--nosuch"),
    "a word too many": ("parcel", "x"),
}  # fmt: skip

_LEAF_YAML = """\
task: frontier_broken_4k
class: !function lm_eval_sparse.frontier.task.FrontierTask
dataset_kwargs:
  recipe: !function broken.Broken
  length: 4096
"""
#: Code of a task's folder that does what it should not, when it is imported.
_CODE: dict[str, str] = {
    "ends the process": "import sys\nsys.exit(0)\n",
    "ends it at once": "import os\nos._exit(0)\n",
    "raises": "raise ValueError('no')\n",
    "raises a line end": "raise ValueError('no\\nTraceback (most recent call last):')\n",
    "is no Python": "def (:\n",
    "is interrupted": "raise KeyboardInterrupt\n",
    "has no recipe": "",
    "calls itself": "def f(): f()\nf()\n",
    "prints escapes": "print('\\x1b[2J')\nraise ValueError('\\x1b[2J')\n",
    "raises something of its own": "class Own(BaseException): pass\nraise Own('x')\n",
}

_YAMLS: dict[str, str | bytes] = {
    "torn": "task: frontier_broken_4k\nrecipe: [",
    "empty": "",
    "a list": "- a\n",
    "bytes": b"\xff\xfe\x00",
    "a tag": "task: frontier_broken_4k\nx: !!python/object/apply:os.system ['touch PWNED']\n",
    "an include of itself": "include: frontier_broken_4k.yaml\ntask: frontier_broken_4k\n",
    "a length of letters": _LEAF_YAML.replace("4096", "long"),
    "nested": "a: " + "[" * 3000,
}


def _working(old: str, new: str) -> Callable[[Path, Any], None]:
    """The task that `new-task` writes, with one line of its code replaced."""

    def make(work: Path, words: Any) -> None:
        from lm_eval_sparse.frontier import scaffold

        (work / "parcel").mkdir()
        for name, text in scaffold.files("parcel").items():
            (work / "parcel" / name).write_text(text.replace(old, new) if name == "parcel.py" else text)
        assert new in (work / "parcel" / "parcel.py").read_text()

    return make


_SCORE = "        found = first_answer(text, _LOCKER.findall)"
_DRAFT = "        return Draft(rng("
_REQUESTS = "        return [_request(doc["
#: What is done to a task that works: where, and what stands there then.
_SPOILED: dict[str, tuple[str, str]] = {
    "ends the process when it scores": (_SCORE, f"        import sys; sys.exit(0)\n{_SCORE}"),
    "ends it when it makes documents": (_DRAFT, f"        import sys; sys.exit(0)\n{_DRAFT}"),
    "ends it when it makes requests": (_REQUESTS, f"        import sys; sys.exit()\n{_REQUESTS}"),
    "ends it without a word": (_DRAFT, f"        import os; os._exit(0)\n{_DRAFT}"),
    "is interrupted when it scores": (_SCORE, f"        raise KeyboardInterrupt\n{_SCORE}"),
    "scores in texts": (_SCORE, f"        return {{'acc': 'x'}}\n{_SCORE}"),
    "scores in NaN": (_SCORE, f"        return {{'acc': float('nan')}}\n{_SCORE}"),
    "returns no draft": (_DRAFT, f"        return None\n{_DRAFT}"),
    "asks nothing": (_REQUESTS, f"        return []\n{_REQUESTS}"),
    "prints and fails": (_DRAFT, f"        print('all ok'); raise ValueError('\\x1b[2J')\n{_DRAFT}"),
}


def _task(*files: tuple[str, str | bytes]) -> dict[str, str | bytes]:
    return {f"task/{name}": content for name, content in files}


ROWS: list[Row] = [
    *(Row(AREA, f"show: {name}", ("show", *argv)) for name, argv in SHOW.items()),
    *(Row(AREA, f"check-task: {name}", ("check-task", *argv)) for name, argv in CHECK.items()),
    *(Row(AREA, f"new-task: {name}", ("new-task", *argv)) for name, argv in NEW.items()),
    *(
        Row(AREA, f"{command}: code that {name}", argv, REPORTED if command == "check-task" else REFUSED,
            files=_task(("broken.py", code), ("frontier_broken_4k.yaml", _LEAF_YAML)), keeps="task/**/*",
            alone=name == "ends it at once", slow=name == "ends it at once")
        for name, code in _CODE.items()
        for command, argv in (
            ("check-task", ("check-task", "task", *_T)),
            ("show", ("show", "frontier_broken_4k", "--index", "0", "--include_path", "task", *_T)),
        )
        if (command, name) != ("show", "ends it at once")  # `show` runs the task's code itself
    ),
    *(
        Row(AREA, f"check-task: YAML {name}", ("check-task", "task", *_T), REPORTED,
            files=_task(("frontier_broken_4k.yaml", content)), keeps="task/**/*")
        for name, content in _YAMLS.items()
    ),
    *(
        Row(AREA, f"check-task: a task that {name}", ("check-task", "parcel", "--samples", "2", "--lengths", "4k", *_T),
            REPORTED, make=_working(old, new), keeps="parcel/**/*", slow=True, alone="without a word" in name)
        for name, (old, new) in _SPOILED.items()
    ),
    Row(AREA, "check-task: a pipe for YAML", ("check-task", "task", *_T), REPORTED, keeps="task/**/*",
        make=lambda work, words: ((work / "task").mkdir(), os.mkfifo(work / "task" / "a.yaml"))),
    Row(AREA, "check-task: YAML in a link to itself", ("check-task", "task", *_T), REPORTED, keeps="task/**/*",
        make=lambda work, words: ((work / "task").mkdir(), (work / "task" / "a.yaml").symlink_to("a.yaml"))),
    Row(AREA, "new-task: is there", ("new-task", "parcel"), files={"parcel/x": "mine"}),
    Row(AREA, "new-task: HOME is empty", ("new-task", "parcel", "--folder", "~/nosuch"), env={"HOME": ""}),
    Row(AREA, "show: HOME is empty", ("show", _LEAF, "--index", "0", "--tokenizer", "~/nosuch"), env={"HOME": ""}),
    Row(AREA, "show: a cache of 300 characters", ("show", _LEAF, "--index", "0", *_T), EITHER, proof="says document",
        env={"LM_EVAL_SPARSE_CACHE": f"/{NAME}"}, doubt="a warning and no cache, or refused"),
    Row(AREA, "show: a cache of another user", ("show", _LEAF, "--index", "0", *_T), EITHER, proof="says document",
        env={"LM_EVAL_SPARSE_CACHE": "~nosuchuser/x"}, doubt="a warning and no cache, or refused"),
    Row(AREA, "show: the cache is a file", ("show", _LEAF, "--index", "0", *_T), EITHER, proof="says document",
        env={"LM_EVAL_SPARSE_CACHE": "<llama>/config.json"}, doubt="a warning and no cache, or refused"),
    Row(AREA, "methods: a word too many", ("methods", "x")),
    Row(AREA, "methods: an unknown option", ("methods", "--nosuch")),
    Row(AREA, "methods", ("methods",), LEGAL, proof="says flexprefill"),
    Row(AREA, "methods: help", ("methods", "--help"), LEGAL, proof="says usage"),
    Row(AREA, "show", ("show", _LEAF, "--index", "3", *_T), LEGAL, proof="says gold answer"),
    Row(AREA, "show: of a chat", ("show", _LEAF, "--index", "0", "--apply_chat_template", "--tokenizer", "<chat>"),
        LEGAL, proof="says gold answer"),
    Row(AREA, "show: a twin", ("show", "forced_frontier_vt_4k", "--index", "0", *_T), LEGAL, proof="says gold answer"),
    Row(AREA, "new-task", ("new-task", "parcel"), LEGAL, proof="parcel/README.md"),
    Row(AREA, "new-task: into a folder", ("new-task", "parcel", "--folder", "<work>"), LEGAL, proof="parcel/parcel.py"),
    Row(AREA, "check-task", ("check-task", "niah", "--samples", "2", "--lengths", "4k", *_T), LEGAL, slow=True,
        proof="says all ok"),
]  # fmt: skip
