"""A grid file becomes the cells that it asks for, and what it does not say rightly is refused with its line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.sweep import grid

BASE = """\
name: small
models: [org/a, {pretrained: ./there/b, dtype: bfloat16, name: b}]
tasks: [forced_frontier_niah, forced_frontier_vt]
lengths: [4k, 16k]
sparsities: [.5, .9]
limit: {4k: 10, 16k: 5}
options: {apply_chat_template: true}
run: {batch_size: 4}
methods:
  - vertical_slash
  - method: snapkv+quest
    kv_sparsity: [.5]
    decode_sparsity: [.5, .8]
    knobs: {page_size: [16, 32]}
  - method: quest
    sparsity: native
    knobs: {budget: [64, 128]}
    lengths: [4k]
    tasks: [forced_frontier_niah]
"""


def read(tmp_path: Path, text: str, **more: bool) -> grid.Grid:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    return grid.read(path, **more)


def test_all_that_is_asked_for_and_nothing_else(tmp_path: Path) -> None:
    found = read(tmp_path, BASE)
    expected = set()
    for model, task, length in itertools.product(("org/a", "b"), ("niah", "vt"), ("4k", "16k")):
        name = f"forced_frontier_{task}_{length}"
        expected.add((model, name, '{"method": "dense", "sparsity": 0}'))
        for sparsity in (0.5, 0.9):
            expected.add((model, name, json.dumps({"method": "vertical_slash", "sparsity": sparsity})))
        for decode, page in itertools.product((0.5, 0.8), (16, 32)):
            budget = {"method": "snapkv+quest", "kv_sparsity": 0.5, "decode_sparsity": decode, "page_size": page}
            expected.add((model, name, json.dumps(budget)))
        for budget in (64, 128) if (task, length) == ("niah", "4k") else ():
            expected.add((model, name, json.dumps({"method": "quest", "budget": budget})))
    assert {(cell.model, cell.task, json.dumps(dict(cell.sparse))) for cell in found.cells} == expected
    assert len(found.cells) == len(expected) == len({cell.address for cell in found.cells})
    assert {cell.limit for cell in found.cells if cell.length == "4k"} == {10}
    # Model by model, the shortest prompts first, and dense before what is compared with it.
    order = [(cell.model, cell.length, cell.task) for cell in found.cells]
    assert [key for key, _ in itertools.groupby(order)] == list(dict.fromkeys(order))
    for _, cells in itertools.groupby(found.cells, key=lambda cell: (cell.model, cell.length, cell.task)):
        assert [cell.is_dense for cell in cells][0]


def test_the_command_line_of_a_cell(tmp_path: Path) -> None:
    found = read(tmp_path, BASE)
    cell = next(c for c in found.cells if c.model == "b" and c.method == "snapkv+quest" and c.length == "16k")
    argv = cell.argv("out")
    given = dict(zip(argv[::2], argv[1::2], strict=False))
    assert json.loads(given["--model_args"]) == {
        "pretrained": str(Path("there/b").absolute()),
        "dtype": "bfloat16",
        **cell.sparse,
    }
    assert argv[-1] == "4" and argv[-2] == "--batch_size" and "--apply_chat_template" in argv
    assert given["--limit"] == "5" and given["--output_path"] == "out" and given["--tasks"] == cell.task
    seeded = read(tmp_path, BASE + "seeds: [7]\n").cells[0].argv("out")
    assert seeded[seeded.index("--metadata") + 1] == '{"seed": 7}' and seeded[seeded.index("--seed") + 1] == "7"


def test_an_address_is_of_what_decides_the_scores(tmp_path: Path) -> None:
    base = {cell.address for cell in read(tmp_path, BASE).cells}

    def shared(*change: tuple[str, str]) -> int:
        text = BASE
        for old, new in change:
            assert old in text
            text = text.replace(old, new)
        return len(base & {cell.address for cell in read(tmp_path, text).cells})

    # Where weights lie, how many prompts run side by side, and the order of the file decide nothing.
    assert shared(("./there/b", "/other/folder")) == len(base)
    assert shared(("batch_size: 4", "batch_size: 1, device: cpu")) == len(base)
    assert shared(("[4k, 16k]", "[16k, 4k]")) == len(base)
    assert shared(("  - vertical_slash\n", "  - vertical_slash\n  - flexprefill\n")) == len(base)
    half = len([cell for cell in read(tmp_path, BASE).cells if cell.length == "16k"])
    assert shared(("4k: 10", "4k: 11")) == half
    assert shared(("dtype: bfloat16", "dtype: float16")) == len(base) // 2
    for change in (("apply_chat_template: true", "apply_chat_template: false"), ("run:", "seeds: [3]\nrun:")):
        assert shared(change) == 0
    more = {cell.log for cell in read(tmp_path, BASE.replace("4k: 10", "4k: 11")).cells}
    assert more == {cell.log for cell in read(tmp_path, BASE).cells}


def test_dense_attention_is_there_once_whatever_the_methods_and_backends(tmp_path: Path) -> None:
    found = read(tmp_path, BASE + "backends: [gather, triton]\n")
    dense = [cell for cell in found.cells if cell.is_dense]
    assert len(dense) == 8 and all("backend" not in cell.sparse for cell in dense)
    assert {cell.sparse.get("backend") for cell in found.cells if not cell.is_dense} == {"gather", "triton"}
    assert not any(cell.is_dense for cell in read(tmp_path, BASE + "dense: false\n").cells)


def test_blocks_have_what_stands_beside_them_as_defaults(tmp_path: Path) -> None:
    text = BASE.replace("methods:", "blocks:\n- methods: [quest]\n  lengths: [4k]\n- lengths: [16k]\n  methods:")
    text = "\n".join(
        line if "  - " not in line and not line.startswith("    ") else f"  {line}" for line in text.split("\n")
    )
    found = read(tmp_path, text.replace("    lengths: [4k]\n      tasks: [forced_frontier_niah]\n", ""))
    assert {cell.method for cell in found.cells if cell.length == "4k"} == {"dense", "quest"}
    assert {cell.limit for cell in found.cells if cell.length == "16k"} == {5}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("methods:", "method:", "line 9: method: no such key; accepted are name, blocks, models"),
        ("methods:", "models: [x]\nmethods:", "line 9: models stands here twice; the first is in line 2"),
        ("[.5, .9]", "[]", "line 5: sparsities: an empty axis"),
        ("[.5, .9]", "[.5, 1]", "line 5: sparsities[1]: 1: a number above 0 and below 1"),
        ("[.5, .9]", "[.5, .nan]", "line 5: sparsities[1]: nan: a number above 0"),
        ("[.5, .9]", "[.5, true]", "line 5: sparsities[1]: True: a number above 0"),
        ("[.5, .9]", ".5, .9", "line 5"),
        ("[4k, 16k]", "[4k, 5k]", "line 4: lengths[1]: 5k: choose 4k, 8k"),
        ("[4k, 16k]", "[]", "line 4: lengths: an empty axis"),
        ("4k: 10, ", "", "line 6: limit: nothing is said of 4k"),
        ("4k: 10", "4k: 0", "line 6: limit.4k: 0: a number of documents"),
        ("4k: 10", "5k: 10", "line 6: limit.5k: no length"),
        ("[org/a,", "[3,", "line 2: models[0]: 3: a folder or Hub name"),
        ("name: b", "name: org/a", "line 2: models[1]: a second model is called org/a"),
        ("dtype: bfloat16", "sparsity: .5", "line 2: models[1].sparsity: this belongs to methods:"),
        ("dtype: bfloat16", "trust_remote_code: true", "models[1].trust_remote_code: it may run code of others"),
        ("batch_size: 4", "include_path: x", "line 8: run.include_path: it may run code of others; type --allow-code"),
        ("batch_size: 4", "batchsize: 4", "line 8: run.batchsize: no such key; accepted are"),
        ("apply_chat_template", "chat_template", "line 7: options.chat_template: no such key"),
        ("- vertical_slash", "- dense", "line 10: methods[0]: dense attention is in every grid"),
        ("- vertical_slash", "- 3", "line 10: methods[0]: 3: a mapping is expected"),
        ("- vertical_slash", "- x.py:Mine", "line 10: methods[0]: x.py:Mine is a file whose code would run"),
        ("kv_sparsity: [.5]", "kv_sparsity: []", "line 12: methods[1].kv_sparsity: an empty axis"),
        ("kv_sparsity: [.5]", "kv_sparsity: [native]", "line 12: methods[1].kv_sparsity[0]: native: a number above 0"),
        ("kv_sparsity: [.5]", "sparsity: .5", "methods[1]: give either sparsity or decode_sparsity"),
        ("page_size: [16, 32]", "page_size: []", "line 14: methods[1].knobs.page_size: an empty axis"),
        ("knobs: {page_size: [16, 32]}", "knobs: 3", "line 14: methods[1].knobs: 3: a mapping of knobs"),
        ("name: small", "name: ../up", "line 1: name: ../up is no name"),
        ("name: small", "name: !!python/object/apply:os.system [x]", "line 1: the tag tag:yaml.org,2002:python/object"),
        ("name: small", "name: !x y", "line 1: the tag !x is not accepted"),
        ("name: small", "name: [", "not YAML"),
        ("name: small", "name: &a [*a]", "line 1"),
        ("[forced_frontier_niah,", "['a,b',", "line 3: tasks[0]: a,b: the name of one task"),
        ("[forced_frontier_niah,", "[forced_frontier_niah_32k,", "has a length of its own, which is not in lengths"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in BASE
    with pytest.raises(UserError) as error:
        read(tmp_path, BASE.replace(old, new, 1))
    assert said in str(error.value) and str(error.value).startswith(f"{tmp_path / 'g.yaml'}") and "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "[]", "3", "a: b: c", "\x00", "&a [" * 500, "x: *y", "a" * 2_000_000])
def test_what_is_no_grid(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="g.yaml"):
        read(tmp_path, text)


def test_nobody_is_drowned_in_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laughs = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]" for n in range(9))
    with pytest.raises(UserError, match="more or deeper values than any grid has"):
        read(tmp_path, laughs)
    many = ", ".join(str(n / 1000) for n in range(1, 999))
    assert grid.MOST_CELLS == 100_000
    monkeypatch.setattr(grid, "MOST_CELLS", 1_000)  # making so many takes seconds
    with pytest.raises(UserError, match="more than 1,000 cells"):
        read(tmp_path, BASE.replace("[.5, .9]", f"[{many}]").replace("16, 32", ", ".join(map(str, range(9000)))))


def test_code_runs_where_it_was_allowed(tmp_path: Path) -> None:
    text = BASE.replace("- vertical_slash", "- x.py:Mine").replace("dtype: bfloat16", "trust_remote_code: true")
    assert {cell.method for cell in read(tmp_path, text, allow_code=True).cells} >= {"x.py:Mine", "dense"}


@pytest.mark.parametrize("of", [1, 2, 3, 7, 8, 9, 50])
def test_shards_are_all_cells_once(tmp_path: Path, of: int) -> None:
    cells = read(tmp_path, BASE).cells
    parts = [grid.shard(cells, number, of) for number in range(1, of + 1)]
    assert sorted(cell.address for part in parts for cell in part) == sorted(cell.address for cell in cells)
    if of <= 8:  # models times tasks times lengths
        assert all(parts)
        groups = [{(cell.model, cell.task) for cell in part} for part in parts]
        assert sum(map(len, groups)) == 8, "cells on the same documents are together"
