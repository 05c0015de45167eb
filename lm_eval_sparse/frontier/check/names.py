"""Names, tags and groups of leaves, and whether a README tells of the task."""

from __future__ import annotations

import re

from ... import frontier
from ...errors import PROGRAM
from ...results.files import read_bytes
from ..leaves import LENGTHS
from ..yamls import leaf_files
from .folder import built_in
from .report import Wrong, fail_on, some
from .subject import Subject

_LEAF = re.compile(r"(?P<forced>forced_)?frontier_(?P<task>.+)_(?P<length>[^_]+)")
_LARGEST_README = 16 * 2**20


def files(subject: Subject) -> str:
    subject.files = leaf_files(subject.folder)
    names = [_LEAF.fullmatch(name) for name, (_, content) in subject.files.items() if "group" not in content]
    tasks = sorted({match["task"] for match in names if match})
    if not tasks:
        raise Wrong(
            f"no leaf called frontier_<task>_<length> among {some(subject.files) or 'no names'}; "
            f"`{PROGRAM} new-task` writes a folder that has them"
        )
    if len(tasks) > 1:
        raise Wrong(f"leaves of {len(tasks)} tasks ({some(tasks)}); give a folder with those of one task")
    subject.name = tasks[0]
    return f"{len(subject.files)} YAML files with names, the task is {subject.name}"


def names(subject: Subject) -> str:
    problems, leaves = [], subject.leaves()
    for name, content in leaves.items():
        match = _LEAF.fullmatch(name)
        if not match or match["length"] not in LENGTHS:
            wanted = f"[forced_]frontier_{subject.name}_<length> with one of {', '.join(LENGTHS)}"
            problems.append(f"{name} is not called {wanted}")
            continue
        length = (content.get("dataset_kwargs") or {}).get("length")
        if length != LENGTHS[match["length"]]:
            problems.append(f"{name} has length {length} in its YAML, expected {LENGTHS[match['length']]}")
        twin = name.removeprefix("forced_") if match["forced"] else f"forced_{name}"
        if twin not in leaves:
            problems.append(f"{name} has no {'sibling' if match['forced'] else 'twin'} {twin}")
    missing = [length for length in LENGTHS if f"frontier_{subject.name}_{length}" not in leaves]
    if missing and subject.built_in:
        problems.append(f"no leaf for {', '.join(missing)}; tasks of this package have all lengths")
    fail_on(problems)
    return f"{len(leaves)} leaves, each with its twin" + (f" (none for {', '.join(missing)})" if missing else "")


def tags(subject: Subject) -> str:
    problems, tags = [], set()
    for name, content in subject.leaves().items():
        given = content.get("tag") or []
        tags |= {str(tag) for tag in (given if isinstance(given, list) else [given])}
        if not given:
            problems.append(f"{name} has no tag; expected such as frontier-{subject.name.replace('_', '-')}")
    groups = [name for name, (_, content) in subject.files.items() if "group" in content]
    problems += [f"tag {tag} has underscores; expected hyphens" for tag in sorted(tags) if "_" in tag]
    for name in groups:
        if name.startswith(("frontier_", "forced_frontier_")):
            problems.append(f"group {name} matches {name.split('frontier_')[0]}frontier_*, which is for leaves only")
    fail_on(problems)
    return f"{len(tags)} tags with hyphens" + (f", {len(groups)} groups" if groups else "")


def clashes(subject: Subject) -> str:
    if subject.built_in:
        roots = [path for name, path in built_in().items() if name != subject.built_in]
    else:
        roots = list(built_in().values())
    others = {name for root in roots for name in leaf_files(root)} | {"frontier", "forced_frontier"}
    problems = [f"{name} is also the name of a built-in task" for name in subject.files if name in others]
    if subject.name in frontier.RECIPES and subject.name != subject.built_in and not problems:
        problems.append(f"{subject.name} is also the name of a built-in task")
    fail_on(problems)
    return "no name is that of another task of this package"


def groups(subject: Subject) -> str:
    roots = leaf_files(subject.folder.parent)
    problems = []
    for forced in ("", "forced_"):
        group = f"{forced}frontier"
        held = (roots.get(group) or (None, {}))[1].get("task") or []
        leaves = [name for name in subject.leaves() if name.startswith("forced_") == bool(forced)]
        problems += [f"{name} is not in the group {group}" for name in leaves if name not in held]
    fail_on(problems)
    return "all leaves are in the groups frontier and forced_frontier"


def readme(subject: Subject) -> str:
    word = re.compile(rf"^\s*[#|].*(?<![\w]){re.escape(subject.name)}(?![\w])", re.MULTILINE)
    looked = [subject.folder / "README.md", subject.folder.parent / "README.md"]
    for path in looked:
        if path.is_file() and word.search(read_bytes(path, most=_LARGEST_README).decode(errors="replace")):
            return f"{path} names the task"
    raise Wrong(
        f"no heading and no table row names {subject.name} in {' or '.join(map(str, looked))}; "
        f"expected such as `## {subject.name}`"
    )
