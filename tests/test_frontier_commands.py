"""`show`, `check-task` and `new-task`: what they print, what they find wrong, and one line for each mistake.

Long, since the commands share one folder of tasks.
"""

# ruff: noqa: F811 - fixtures of a helper module are arguments of tests

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lm_eval
import pytest
from command_cases import DRAFT, NAME, cache, command, folder, one_line, tokenizers  # noqa: F401 (fixtures)
from frontier_common import tokenizer
from lm_eval.tasks import TaskManager
from tiny import tiny_llama

from lm_eval_sparse import frontier, protocol
from lm_eval_sparse.errors import UserError, plain
from lm_eval_sparse.frontier import document, show
from lm_eval_sparse.frontier.leaves import BUILT_IN, LENGTHS, TaskFolder
from lm_eval_sparse.frontier.recipe import Unavailable
from lm_eval_sparse.paths import task_folders


def available(name: str) -> bool:
    try:
        recipe = frontier.recipe(name)
        recipe.find({})
    except (Unavailable, ImportError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------- show


@pytest.mark.parametrize("name", [folder.name for folder in BUILT_IN])
@pytest.mark.parametrize("forced", ["", "forced_"])
def test_show_on_every_task(name, forced, command, tokenizers):
    leaf = f"{forced}frontier_{name}_4k"
    status, out, err = command("show", leaf, "--index", 1, "--tokenizer", tokenizers("digits"), "--full")
    if not available(name):
        assert status == 1 and f"{leaf} is skipped: " in one_line(err)
        return
    assert (status, err) == (0, "")
    head, _, prompt = out.partition("\nprompt ---")
    prompt = prompt.partition("\n")[2].removesuffix("\n")
    assert head.startswith(f"task       {leaf}, ") and "document   1 of 0 to 99, seed 0\n" in head
    assert len(tokenizer("digits").encode(prompt)) == 4096 and "length     4096 tokens of 4096\n" in head
    assert "\x1b" not in out and ("\nrequests: " in head) == bool(forced) == ("\nchance     " in head)
    count = int(re.search(r"^evidence: (\d+) ", head, re.MULTILINE).group(1))
    rows = re.findall(r"^ +(\d+) +(\d+\.\d)%  (.+)$", head, re.MULTILINE)
    assert count == len(rows) > 0
    for first, depth, piece in rows:
        assert abs(float(depth) - 100 * int(first) / 4096) < 0.06
        start = piece.split(" ⏎ ")[0].split(" […] ")[0]
        assert start in tokenizer("digits").decode(tokenizer("digits").encode(prompt)[int(first) - 1 :])
    assert max(map(len, head.splitlines())) <= 100


def test_show_renders_the_template_and_ignores_an_active_model(command, tokenizers, monkeypatch):
    from frontier_common import StandIn

    protocol.set_active_lm(StandIn("bytes", max_length=128))
    status, out, _ = command(
        *("show", "frontier_vt_4k", "--index", 0, "--tokenizer", tokenizers("digits"), "--apply_chat_template"),
        "--full",
    )
    prompt = out.partition("\nprompt ---")[2].partition("\n")[2].removesuffix("\n")
    # The template ends in a line end, print adds another.
    assert status == 0 and prompt.startswith("<|im_start|>user\n") and prompt.endswith("<|im_start|>assistant\n")
    assert len(tokenizer("digits").encode(prompt)) == 4096
    assert "with its chat template" in " ".join(out.split())  # a long path may be wrapped


def test_show_takes_the_embedded_tokenizer_by_default(command, tokenizers, monkeypatch):
    monkeypatch.setattr(show, "ensure", lambda: tokenizers("bpe"))
    default, named = (
        command("show", "frontier_vt_4k", "--index", 2, *more)[1] for more in ([], ["--tokenizer", tokenizers("bpe")])
    )
    assert "tokenizer  embedded/SmolLM2-135M-Instruct-Q4_1, no chat template\n" in default
    assert default.partition("gold")[2] == named.partition("gold")[2] != ""


def test_show_marks_evidence_on_a_terminal_only(tokenizers):
    task = show.load_leaves(show.manager(task_folders(), {}), ["frontier_niah_4k"])["frontier_niah_4k"]
    reader = show.Reader.of(tokenizers("bpe"), {}, False)
    found = show.read(task, 0, reader)
    plain, coloured = (document.terminal(found, 100, colour=colour) for colour in (False, True))
    assert coloured.count("\x1b[1;33m") == coloured.count("\x1b[0m") == 4
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert re.findall(r"\x1b\[1;33m(Stored under .*\.)\x1b\[0m", coloured)


@pytest.mark.parametrize("columns, width", [("80", 80), ("500", 100), ("3", 60)])
def test_show_fits_the_terminal_and_folds_the_context(columns, width, command, tokenizers, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    leaf = ["show", "frontier_niah_4k", "--index", 0, "--tokenizer", tokenizers("digits"), "--apply_chat_template"]
    _, out, _ = command(*leaf)
    _, full, _ = command(*leaf, "--full")
    assert max(map(len, out.splitlines())) <= width
    prompt = full.partition("\nprompt ---")[2].partition("\n")[2].removesuffix("\n")
    intro, _, rest = prompt.partition("List of entries:\n")
    context, _, after = rest.partition("\n\n")
    shown = out.partition("\nprompt, the context folded")[2].partition("\n")[2].removesuffix("\n")
    joined = " ".join(shown.split())
    for whole in (intro, after):  # nothing of question and instructions is folded
        assert " ".join(whole.split()) in joined
    evidence = re.findall(r"Stored under (\S+): (\S+)\.", " ".join(shown.split()))
    keys = re.findall(r"^\d\. (\S+)$", intro, re.MULTILINE)
    assert len(keys) == 4 and set(keys) < {key for key, _ in evidence} and len(evidence) < len(context.splitlines())
    notes = re.findall(r"^  … (\d+) lines?, (\d+) tokens …$", shown, re.MULTILINE)
    inside = shown.partition("List of entries:\n")[2].partition("\n\n")[0].splitlines()
    kept = [line for line in inside if not line.startswith("  … ")]
    if width == 100:  # an entry is a row
        assert sum(int(lines) for lines, _ in notes) == len(context.splitlines()) - len(kept)
    assert set(kept) <= set(context.splitlines()) or width < 100
    assert sum(int(tokens) for _, tokens in notes) < 4096


def test_show_writes_markdown(command, tokenizers):
    leaf = ["show", "forced_frontier_niah_4k", "--index", 0, "--tokenizer", tokenizers("bpe"), "--markdown"]
    _, folded, _ = command(*leaf)
    _, full, _ = command(*leaf, "--full")
    for page in (folded, full):
        assert page.startswith("# forced_frontier_niah_4k, teacher-forced twin\n") and page.count("\n```text\n") == 3
        assert page.count("\n| ") == 5 and "## Prompt\n" in page
    assert " tokens …\n" in folded and " tokens …\n" not in full and len(folded) < 0.7 * len(full)


def test_rows_hold_all_of_a_text_and_fit():
    for _ in range(300):
        text = "".join(random.choice("ab   \n漢\x1b") for _ in range(random.randint(0, 80)))
        width, last = random.randint(6, 14), 0
        for start, end in document.rows(text, width):
            row = plain(text[start:end])
            assert len(row) + row.count("漢") <= width and "\n" not in row
            assert text[last:start] in ("", " ", "\n", " \n")
            last = end
        assert text[last:] in ("", " ")


def test_long_evidence_and_unknown_contexts_are_folded():
    lines = [f"line {n}" for n in range(200)]
    prompt = "\n".join(lines)
    span = (prompt.index("line 50"), prompt.index("line 90") - 1)
    piece = document.Piece(prompt[slice(*span)], span)
    found = document.Document({"task": "t"}, "gold", [piece], prompt, show.context_of({"input": "?"}, prompt), len)
    parts = document.folded(
        document.Document(**{**vars(found), "tokens": lambda at: prompt.count("\n", 0, at)}), width=80
    )
    shown = [part if isinstance(part, str) else prompt[slice(*part)] for part in parts]
    assert shown == [
        *lines[:14], "35 lines, 34 tokens", *lines[49:55], "30 lines of evidence, 29 tokens", *lines[85:91],
        "95 lines, 94 tokens", *lines[186:],
    ]  # fmt: skip
    assert show.context_of({"input": "b\nc", "context": [2, 3]}, "<user>b\nc") == (8, 9)


def test_show_takes_metadata_and_other_folders(command, tokenizers, folder):
    def shown(*more):
        status, out, err = command("show", f"frontier_{NAME}_4k", "--index", 0, "--include_path", folder, *more)
        assert (status, err) == (0, "")
        return out

    given = ("--tokenizer", tokenizers("bpe"))
    other = ("--metadata", json.dumps({"seed": 7, "tokenizer": tokenizers("bpe")}))
    assert "seed 0" in shown(*given) and "seed 7" in shown(*other)
    assert shown(*given).partition("gold")[2] != shown(*other).partition("gold")[2]


def test_show_positions_count_what_stands_before(tokenizers):
    for kind in ("bpe", "bos", "unigram"):
        reader, text = show.Reader.of(tokenizers(kind), {}, False), "Stored under here: one two.\nAnd so on."
        position = reader.positions(text)
        assert position(0) in ((0,) if kind == "bpe" else (1, 2)) and position(text.index("And")) > position(
            text.index("two")
        )
        assert position(len(text)) <= len(reader.tok_encode(text))


@pytest.mark.parametrize(
    "argv, told",
    [
        (["frontier_vt_4k"], "required: --index"),
        (["frontier_vt_4k", "--index", "-1"], "--index"),
        (["frontier_vt_4k", "--index", "x"], "--index x given, but it must be a whole number from 0"),
        (["frontier_vt_4k", "--index", "100"], "--index 100 given, but frontier_vt_4k has documents 0 to 99"),
        (["frontier_vt_5k", "--index", "0"], "or 'frontier_vt_4k'"),
        (["frontier", "--index", "0"], "'frontier' given, which is a group of leaves here; show takes one leaf"),
        (["qqq", "--index", "0"], "leaves are called frontier_<task>_<length>"),
        (["frontier_vt_4k", "--index", "0", "--tokenizer", "no/such"], "cannot load the tokenizer 'no/such'"),
        (["frontier_vt_4k", "--index", "0", "--metadata", "{seed: 1}"], "--metadata: not JSON"),
        (["frontier_vt_4k", "--index", "0", "--metadata", "[1]"], "--metadata: a JSON object is expected, this is [1]"),
        (
            ["frontier_vt_4k", "--index", "0", "--metadata", '{"seed": "x"}'],
            "--metadata seed=x is not accepted: seed must be",
        ),
        (["frontier_vt_4k", "--index", "0", "--apply_chat_template"], "has no chat template"),
        (["frontier_vt_4k", "--index", "0", "--include_path", "/no/such"], "/no/such does not exist; give a folder"),
        (["frontier_toefl_4k", "--index", "0"], "frontier_toefl_4k is skipped: no TOEFL data"),
    ],
)
def test_mistakes_in_show(argv, told, command, tokenizers):
    if "--tokenizer" not in argv:
        argv = [*argv, "--tokenizer", tokenizers("bpe")]
    status, out, err = command("show", *argv)
    assert status == 1 and out == "" and told.lower() in one_line(err).lower()


def test_an_exception_in_an_authors_code_is_one_line(command, tokenizers, folder):
    _edit(f"{NAME}.py", DRAFT, DRAFT + "        raise RuntimeError('no lockers')\n")(folder)
    argv = ["show", f"frontier_{NAME}_4k", "--index", 0, "--include_path", folder, "--tokenizer", tokenizers("bpe")]
    status, _, err = command(*argv)
    assert status == 1 and re.search(rf"RuntimeError: no lockers at .*/{NAME}\.py:\d+$", one_line(err))


# ------------------------------------------------------------------------------------------------------------ new-task


def test_a_new_task_is_whole(folder, command):
    names = {path.name for path in folder.iterdir()}
    assert names == {"_generated", "_forced", "README.md", f"{NAME}.py", f"test_{NAME}.py"} | {
        f"{leaf}.yaml" for forced in (False, True) for leaf in TaskFolder(NAME, [], []).leaves(forced)
    }
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert all(len(line) <= 120 for path in folder.glob("*.py") for line in path.read_text().splitlines())
    assert "@" not in (folder / f"{NAME}.py").read_text()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_new_task_passes_its_checks_and_leaves_nothing_behind(folder, command, tokenizers, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    environment = dict(os.environ)
    status, out, err = command("check-task", folder, "--tokenizer", tokenizers("digits"), "--samples", 2)
    assert (status, err) == (0, "") and "FAIL" not in out
    assert out.splitlines()[-1] == f"{out.count(chr(10) + 'ok ') + 1} checks, all ok"
    assert "4k, 8k, 128k (one); with and without chat template" in out
    assert sorted(tmp_path.rglob("*")) == before and dict(os.environ) == environment


def test_a_new_task_passes_its_own_tests(folder):
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder],
        env={**os.environ, "PYTHONPATH": root},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "warning" not in done.stdout


def test_a_new_task_runs_in_lm_eval(folder, tmp_path):
    """With its class in `dataset_kwargs` the configuration can still be dumped."""
    from lm_eval.loggers import EvaluationTracker

    model = tiny_llama(tmp_path / "model", max_position_embeddings=16384)
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    leaves = [f"frontier_{NAME}_4k", f"forced_frontier_{NAME}_4k"]
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=leaves,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, metadata={"pretrained": str(model)}),
        limit=1,
        device="cpu",
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 2},
        log_samples=True,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for leaf in leaves:
        tracker.save_results_samples(task_name=leaf, samples=samples[leaf])
    (file,) = (tmp_path / "out").rglob("results_*.json")
    saved = json.loads(file.read_text())
    assert {"acc,none"} < set(saved["results"][leaves[0]]) and {"exact,none"} < set(saved["results"][leaves[1]])
    assert "ParcelSearch" in saved["configs"][leaves[0]]["dataset_kwargs"]["recipe"]
    assert len(list((tmp_path / "out").rglob("samples_*.jsonl"))) == 2


@pytest.mark.parametrize(
    "name, told",
    [
        ("Parcels", "'Parcels' given, but a task's name is lower-case words"),
        ("a__b", "lower-case words"),
        ("2x", "lower-case words"),
        ("../x", "lower-case words"),
        ("x" * 41, "at most 40 characters"),
        ("lambda", "no word of the Python language"),
        ("niah", "this task exists; names that are taken: niah, vt"),
        ("words_4k", "may not end in a length"),
        ("frontier_words", "get frontier_ and forced_ themselves"),
        ("json", "a module of Python has this name"),
        ("torch", "a Python module has this name"),
    ],
)
def test_names_that_a_task_may_not_have(name, told, command, tmp_path):
    status, out, err = command("new-task", name, "--folder", tmp_path)
    assert status == 1 and out == "" and told in one_line(err)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder, command, tmp_path):
    (folder / "README.md").write_text("mine")
    status, _, err = command("new-task", NAME, "--folder", tmp_path)
    assert status == 1 and "exists already, and nothing is overwritten" in one_line(err)
    assert (folder / "README.md").read_text() == "mine"
    assert "there is no such folder" in one_line(command("new-task", NAME, "--folder", tmp_path / "no")[2])


def test_a_disk_that_is_full_leaves_nothing(command, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    status, _, err = command("new-task", NAME, "--folder", tmp_path)
    assert status == 1 and "No space left on device" in one_line(err) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- check-task


@pytest.mark.parametrize("name", ["niah", "vt", "cwe"])
def test_built_in_tasks_pass(name, command, tokenizers):
    _, out, err = command("check-task", name, "--tokenizer", tokenizers("bos"), "--samples", 2, "--lengths", "4k")
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    # tasks/README.md is written by other hands; the check itself is tested below.
    assert not [line for line in failed if not line.startswith("FAIL  README")] and err == ""
    assert "\nok    groups " in out


def test_data_out_of_reach_is_told(command, tokenizers):
    status, out, _ = command("check-task", "toefl", "--tokenizer", tokenizers("bpe"), "--samples", 2)
    assert status == 1 and re.search(r"^FAIL  documents +every leaf is skipped: no TOEFL data.*qa_folder", out, re.M)


GOLD = '"target": self.locker}'
SCORE = '{"acc": float(found[:1] == [doc["locker"]])}'
SEED = "rng(self.name, self.version, length, seed, index)"
BROKEN = {
    "hash order": ("for _, line in placed)", "for line in {x for _, x in placed})", "other process", "hash order"),
    "a clock": (SEED, "__import__('random').Random()", "order", "has another 'input'"),
    "calls counted": (
        "lines = ",
        "self.calls = getattr(self, 'calls', 0) + 3\n        placed += [(0, 'Again.')] * self.calls\n        lines = ",
        "lengths",
        r"has \d+ tokens, more than 4096",
    ),
    "impure message": (
        "placed = sorted(self._lines[: 1 + units])",
        "placed = sorted(self._lines)",
        "draft: pure",
        "depends on what was asked for before",
    ),
    "too little material": ("self.most = 100_000", "self.most = 3", "content", "% of document 0 of .* is filler"),
    "leaked answer": ("question = _QUESTION", "question = self.locker[:0] + 'Not ' + self.locker + '. ' + _QUESTION",
                      "secrets", "outside the evidence"),
    "wrong gold": (GOLD, '"target": self.locker[1:] + "x"}', "gold answer", "scores acc 0; expected 1"),
    "garbage pays": (SCORE, '{"acc": float(not found or found[0] == doc["locker"])}', "no answer", "scores acc 1"),
    "copying pays": (SCORE, '{"acc": float(doc["locker"] in text)}', "copied prompt", "a copy of the prompt"),
    "anything pays": (SCORE, '{"acc": float(bool(found))}', "wrong answer", "the gold answer of document"),
    "no index": (SEED, SEED.replace(", index", ""), "variety", "documents 0 and 1 of .* are equal"),
    "no seed": (SEED, SEED.replace(", seed", ""), "other seed", "is the same with seed 1"),
    "one gold": (GOLD, '"target": "the same"}', "variety", "have the same gold answer 'the same'"),
    "tuples": (GOLD, '"pair": (1, 2), ' + GOLD, "JSON", "has another 'pair'"),
    "sets": (GOLD, '"pair": {1, 2}, ' + GOLD, "documents", r"TypeError: .*set.* at .*store.py:\d+"),
    "metric": (SCORE, SCORE.replace("acc", "accuracy"), "metrics", "scores accuracy; its metric_list has acc"),
    "evidence twice": ("placed = sorted(self._lines[: 1 + units])", "placed = sorted([*self._lines[: 1 + units], "
                       "(0.5, self._lines[0][1])])", "evidence", "stands 2 times in the prompt"),
    "no evidence": ("return [_LINE.format(parcel=doc[\"parcel\"], locker=doc[\"locker\"])]", "return []", "evidence",
                    "no evidence"),
    "twin of others": (SEED, SEED.replace("index", "index, forced"), "twin: same gold", "its sibling"),
    "wrong chance": ('{"exact": 0.0}', '{"exact": 0.25}', "twin: chance", "what `chance` says, 0.25"),
    "chance of nothing": ('{"exact": 0.0}', '{"acc": 0.0}', "twin: chance", "has acc, which is no metric"),
    "twin never right": ("return slot_scores([doc[\"locker\"]], results)",
                         "return {'exact': 0.0, 'bits_per_char': 1.0}", "twin: gold requests", "gives exact 0"),
    "infinite": ("return slot_scores([doc[\"locker\"]], results)",
                 "return {'exact': 0.0, 'bits_per_char': float('inf')}", "twin: gold requests", "a finite number"),
    "asked twice": ('return [_request(doc["parcel"], doc["locker"])]',
                    'return [_request(doc["parcel"], doc["locker"])] * 2', "twin: one prompt", "asks the same twice"),
    "no room": ('self.answer = "".join(_request(self.parcel, self.locker))', 'self.answer = "x"', "draft: room",
                "has 1 bytes"),
    "no filler": ("if filler:", "if False:", "draft: filler", "has its filler line 0 times"),
    "slow": (DRAFT, DRAFT + "        __import__('time').sleep(0.025)\n", "draft: cheap", "ms to start"),
    "exception": (DRAFT, DRAFT + "        raise RuntimeError('no lockers')\n", "documents",
                  rf"RuntimeError: no lockers at .*/{NAME}/{NAME}\.py:\d+"),
    "exception in a scorer": ("found = first_answer", "1 / len(text)\n        found = first_answer", "no answer",
                              rf"ZeroDivisionError: .* at .*/{NAME}\.py:\d+"),
    "syntax": ("class Draft:", "class Draft", "classes", rf"SyntaxError: .* at .*/{NAME}\.py:\d+"),
    "no such class": ("class ParcelSearch", "class Other", "classes", "has no function 'ParcelSearch'"),
    "no recipe": ("class ParcelSearch(Recipe)", "class ParcelSearch", "classes", ""),
    "other name": (f'name = "{NAME}"', 'name = "parcels"', "classes", "is called 'parcels'; expected 'parcel_search'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe_is_found(case, folder, command, tokenizers):
    before, after, check, told = BROKEN[case]
    module = folder / f"{NAME}.py"
    text = module.read_text()
    assert text.count(before) == 1
    module.write_text(text.replace(before, after))
    failed = checked(folder, command, tokenizers)
    assert check in failed and re.search(told, failed[check])


def test_an_answer_that_the_prompt_tells_is_found_though_no_secret_is_named(folder, command, tokenizers):
    module = folder / f"{NAME}.py"
    text = module.read_text().replace('return [doc["locker"]]', "return []")
    module.write_text(text.replace("question = _QUESTION", "question = f'Hint: {self.locker}. ' + _QUESTION"))
    status, out, _ = command(
        "check-task", folder, "--tokenizer", tokenizers("digits"), "--samples", 4, "--lengths", "4k"
    )
    assert status == 1 and re.search(r"^FAIL  secrets .*the prompt seems to tell it", out, re.MULTILINE)


def test_a_file_beside_a_recipe_decides_its_documents(folder):
    """Documents made from one content of the file must not be found again with another."""
    from lm_eval_sparse.frontier.sources import sources

    (folder / "data.txt").write_text("Rome")
    leaf = f"frontier_{NAME}_4k"
    loaded = TaskManager(include_defaults=False, include_path=str(folder)).load([leaf])["tasks"][leaf]
    digest = sources.__wrapped__
    before = digest(type(loaded.recipe))
    assert digest(type(loaded.recipe)) == before
    (folder / "data.txt").write_text("Oslo")
    assert digest(type(loaded.recipe)) != before


def checked(folder: Path, command, tokenizers) -> dict[str, str]:
    """The failed checks of a folder: name -> what was found."""
    status, out, err = command(
        "check-task", folder, "--tokenizer", tokenizers("bpe"), "--lengths", "4k", "--samples", 2
    )
    failed = re.findall(r"^FAIL  (\S.{19}) (.+)$", out, re.MULTILINE)
    assert status == bool(failed) and err == "" and "Traceback" not in out
    assert out.splitlines()[-1].endswith(f", {len(failed)} FAILED" if failed else ", all ok")
    return {name.strip(): found for name, found in failed}


def _edit(name: str, before: str, after: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))

    return edit


LEAF = f"frontier_{NAME}_8k"
FILES = {
    "missing twin": (lambda f: (f / f"forced_{LEAF}.yaml").unlink(), "names", f"{LEAF} has no twin forced_{LEAF}"),
    "missing sibling": (lambda f: (f / f"{LEAF}.yaml").unlink(), "names", f"forced_{LEAF} has no sibling {LEAF}"),
    "other length": (_edit(f"{LEAF}.yaml", "8192", "8000"), "names", "has length 8000 in its YAML, expected 8192"),
    "name": (_edit(f"{LEAF}.yaml", f"task: {LEAF}", f"task: frontier_{NAME}_9k"), "names", "is not called "),
    "tag": (_edit(f"{LEAF}.yaml", "frontier-8k", "frontier_8k"), "tags", "frontier_8k has underscores"),
    "group": (
        lambda f: (f / "group.yaml").write_text(f"group: frontier_{NAME}\ntask: [{LEAF}]\n"),
        "tags",
        f"group frontier_{NAME} matches frontier_\\*",
    ),
    "clash": (_edit(f"{LEAF}.yaml", f"task: {LEAF}", "task: frontier_niah_8k"), "files", "leaves of 2 tasks"),
    "README": (lambda f: (f / "README.md").write_text(f"About {NAME}.\n"), "README", "no heading and no table row"),
    "metric_list": (
        _edit("_generated", "{metric: acc,", "{metric: iou,"),
        "metrics",
        "scores acc; its metric_list has iou",
    ),
    "class": (
        _edit("_forced", "task.ForcedFrontierTask", "task.FrontierTask"),
        "classes",
        "expected ForcedFrontierTask",
    ),
    "other class": (
        _edit("_generated", "lm_eval_sparse.frontier.task.FrontierTask", "lm_eval.api.task.ConfigurableTask"),
        "classes",
        "",
    ),
    "YAML": (lambda f: (f / f"{LEAF}.yaml").write_text("task: [\n"), "files", f"{LEAF}.yaml cannot be read as YAML"),
    "include": (lambda f: (f / "_forced").unlink(), "files", "_forced cannot be read as YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_found(case, folder, command, tokenizers):
    edit, check, told = FILES[case]
    edit(folder)
    failed = checked(folder, command, tokenizers)
    assert check in failed and re.search(told, failed[check])


def test_the_name_of_a_built_in_task_is_a_clash(tmp_path, command, tokenizers):
    (tmp_path / "mine").mkdir()
    for name, text in TaskFolder("vt", ["iou"], ["average_precision"]).files().items():
        (tmp_path / "mine" / name).write_text(text)
    failed = checked(tmp_path / "mine", command, tokenizers)
    assert "frontier_vt_128k is also the name of a built-in task" in failed["clashes"]


@pytest.mark.parametrize(
    "argv, told",
    [
        ([], "required: PATH"),
        (["/no/such"], "neither a folder nor a built-in task (niah, vt"),
        (["nia"], "did you mean 'niah'?"),
        (["vt", "--lengths", "5k"], "'5k' is none of 4k, 8k"),
        (["vt", "--lengths", ","], "it must name lengths"),
        (["vt", "--samples", "1"], "a whole number from 2"),
        (["vt", "--metadata", "x"], "--metadata: not JSON"),
        (["vt", "--tokenizer", "no/such"], "cannot load the tokenizer"),
        ([__file__], "which is a file"),
        (["EMPTY"], "has no YAML files"),
    ],
)
def test_mistakes_in_check_task(argv, told, command, tmp_path):
    status, out, err = command("check-task", *[str(tmp_path) if part == "EMPTY" else part for part in argv])
    assert status == 1 and out == "" and told in one_line(err)


def test_lengths_of_the_names_are_those_of_the_package():
    assert list(LENGTHS) == ["4k", "8k", "16k", "32k", "64k", "128k"]
    with pytest.raises(UserError, match="did you mean"):
        show.check_leaf_name("frontier_nia_4k", task_folders())
