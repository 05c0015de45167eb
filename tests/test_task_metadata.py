"""What --metadata and the paths of `show`, `check-task` and `new-task` may be; whatever else is given is one line."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from command_cases import NAME, cache, command, one_line, tokenizers  # noqa: F401 (fixtures)
from frontier_common import leaf, tokenizer

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import meter, show
from lm_eval_sparse.frontier.metadata import check_metadata, read_metadata

#: Metadata as JSON -> what is said of it.
BAD = {
    '{"samples": 1e30}': "samples=1e+30 is not accepted: samples must be a whole number of at least 1",
    '{"samples": 1e300}': "samples=1e+300",
    '{"samples": Infinity}': "samples=inf",
    '{"samples": NaN}': "samples=nan",
    '{"samples": true}': "samples=True",
    '{"samples": -1}': "samples=-1",
    '{"samples": 0}': "samples=0",
    '{"samples": "five"}': "samples=five",
    '{"samples": [5]}': "samples=[5]",
    '{"samples": {"a": 5}}': 'samples={"a": 5}',
    '{"samples": null}': "samples=None",
    '{"samples": 10000000000000000000}': "of at most 1000000",
    '{"samples": 2.5}': "samples=2.5",
    '{"seed": %s}' % ("9" * 100_000): "not JSON that can be read",
    '{"seed": %s}' % ("9" * 4000): "seed must be a whole number",
    '{"seed": "%s"}' % ("9" * 5000): "seed must be a whole number",
    '{"seed": 0.5}': "seed=0.5",
    '{"seed": false}': "seed=False",
    '{"strict": "maybe"}': "strict=maybe is not accepted: strict must be true or false",
    '{"strict": 2}': "strict=2",
    '{"strict": null}': "strict=None",
    '{"strict": {}}': "strict={}",
    '{"question_first": "maybe"}': "question_first=maybe is not accepted: question_first must be true or false",
    '{"question_first": 2}': "question_first=2",
    '{"question_first": null}': "question_first=None",
    '{"qa_folder": 5}': "qa_folder=5",
    '{"qa_folder": ""}': "qa_folder= is not accepted",
    '{"qa_folder": "/no/such"}': "/no/such does not exist",
    '{"qa_folder": "~nosuchuser/x"}': "there is no home folder for ~nosuchuser",
    '{"qa_folder": "%s"}' % ("x" * 300): "are allowed",
    '{"qa_folder": "a\\u0000b"}': "cannot hold a null character",
    '{"squad_hub": 5}': "squad_hub=5",
    '{"tokenizer": {"a": 1}}': 'tokenizer={"a": 1} is not accepted',
    '{"tokenizer": 5}': "tokenizer=5 is not accepted",
    '{"tokenizer": ""}': "tokenizer= is not accepted",
    '{"tokenizer": "~nosuchuser/x"}': "there is no home folder for ~nosuchuser",
    '{"tokenizer": "%s"}' % ("x" * 5000): "are allowed",
    '{"pretrained": [1]}': "pretrained=[1] is not accepted",
    '{"pretrained": true}': "pretrained=True is not accepted",
    '{"max_length": -5}': "max_length=-5 is not accepted: max_length must be a whole number of at least 1",
    '{"max_length": "abc"}': "max_length=abc",
    '{"max_length": 1e300}': "max_length=1e+300",
    '{"max_model_len": [4]}': "max_model_len=[4]",
    '{"add_bos_token": "maybe"}': "add_bos_token=maybe",
    '{"trust_remote_code": "maybe"}': "trust_remote_code=maybe is not accepted: trust_remote_code must be true",
    '{"trust_remote_code": "off"}': "trust_remote_code=off",
    '{"trust_remote_code": 2}': "trust_remote_code=2",
    '{"revision": 5}': "revision=5",
    '{"subfolder": ["a"]}': 'subfolder=["a"]',
    '{"gguf_file": 5}': "gguf_file=5",
    "[1]": "a JSON object is expected, this is [1]",
    "5": "a JSON object is expected, this is 5",
    "null": "a JSON object is expected",
    "": "not JSON",
    "{": "not JSON",
    "{'a': 1}": "not JSON",
    "[" * 100_000: "not JSON that can be read",
    '{"a":' * 500 + "1" + "}" * 500: "nested more than",
    "\0": "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_metadata_that_no_task_can_take(text):
    with pytest.raises(UserError) as caught:
        read_metadata(text)
    said = str(caught.value)
    assert BAD[text] in said and "\n" not in said and len(said) < 700
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(given, dict):
        with pytest.raises(UserError, match="must be a JSON object"):
            check_metadata(given)
    elif "a" not in given:  # as lm-eval gives it to us, before a model is loaded
        with pytest.raises(UserError):
            check_metadata(given)


@pytest.mark.parametrize("key", ["samples", "seed", "strict", "question_first"])
def test_a_leaf_refuses_the_same(key):
    for value in ("x", [1], 1e300, float("nan"), 10**30):
        with pytest.raises(UserError, match=rf"^frontier_niah_4k: {key}=.* is not accepted: {key} must be"):
            leaf(**{key: value})


def test_metadata_that_tasks_take():
    assert read_metadata(None) == {}
    for good in ({}, {"samples": "5"}, {"samples": 1e3}, {"seed": -3}, {"strict": "false"}, {"qa_folder": "."},
                 {"trust_remote_code": "False"}, {"max_length": "4096"}, {"other": {"a": [1e300]}}):  # fmt: skip
        assert read_metadata(json.dumps(good)) == good
    check_metadata({"pretrained": object(), "tokenizer": None, "max_length": None, "trust_remote_code": None})
    task = leaf(samples="7", seed=-3.0, strict="false")
    assert (task.samples, task.seed, task.strict) == (7, -3, False)


# -------------------------------------------------------------------------------------------------------- unknown names

#: Tasks, metadata, model arguments -> what is refused of it, None for nothing.
KEYS = {
    "misspelt": (["frontier_niah_4k"], {"sample": 3}, None, "sample is unknown; did you mean 'samples'"),
    "misspelt, in a tag": (["frontier-4k"], {"questionfirst": False}, {}, "did you mean 'question_first'"),
    "unlike any": (["forced_frontier"], {"zzz": 1, "seed": 1}, "a=1", "zzz is unknown; frontier tasks read"),
    "a model argument": (["frontier_niah_4k"], {"method": "quest", "seed": 1}, "method=quest,sparsity=0.5", None),
    "model arguments as an object": (["frontier_niah_4k"], {"method": "quest"}, {"method": "quest"}, None),
    "another task beside ours": (["frontier_niah_4k", "niah_single_1"], {"max_seq_lengths": [4096]}, None, None),
    "a task that is like ours": (["frontier_words_4k"], {"words": 3}, None, None),
    "no task of ours": (["arc_easy"], {"sample": 3}, None, None),
    "all that is known": (["frontier_niah_4k"], {"samples": 3, "seed": 0, "strict": False, "question_first": False,
                                                "qa_folder": ".", "tokenizer": "x", "max_length": 9}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_names_in_metadata_that_no_task_reads(case):
    from lm_eval_sparse.patches import preflight

    tasks, metadata, given, told = KEYS[case]
    reached = []

    def simple_evaluate(model, model_args=None, tasks=None, metadata=None):
        reached.append(metadata)

    run = preflight._with_preflight(simple_evaluate)
    if told is None:
        run("dummy", given, tasks, metadata)
        assert reached == [metadata]
        return
    with pytest.raises(UserError) as caught:
        run("dummy", given, tasks, metadata)
    assert told in str(caught.value) and "\n" not in str(caught.value) and not reached


@pytest.mark.parametrize("line", [("show", "frontier_niah_4k", "--index", 0), ("check-task", "niah")])
def test_commands_refuse_them_for_built_in_tasks(line, command):  # noqa: F811
    status, out, err = command(*line, "--metadata", '{"sampels": 3}')
    assert (status, out) == (1, "") and "sampels is unknown; did you mean 'samples'" in one_line(err)


def test_show_shows_the_question_once(command, tokenizers):  # noqa: F811
    line = ("show", "frontier_niah_4k", "--index", 0, "--tokenizer", tokenizers("digits"))
    for given, times in ((), 2), (("--metadata", '{"question_first": false}'), 1):
        status, out, _ = command(*line, *given)
        assert status == 0 and out.count("Which values are stored") == times
        assert "4096 tokens of 4096" in out


# --------------------------------------------------------------------------------------------------- code of tokenizers


@pytest.fixture
def coded(tmp_path) -> Path:
    """A tokenizer whose class lies beside it, which writes a file when it is imported."""
    folder = tmp_path / "coded"
    tokenizer("bpe").save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("value", [None, False, "false", "False", 0])
def test_code_of_a_tokenizer_runs_at_the_users_word_only(coded, tmp_path, value, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked either
    given = {} if value is None else {"trust_remote_code": value}
    for load in (
        lambda: meter.meter_for({"tokenizer": str(coded), "max_length": 9, **given}, None),
        lambda: meter.meter_for({"pretrained": str(coded), "max_length": 9, **given}, None),
        lambda: show.Reader.of(str(coded), given, False),
        lambda: show.Reader.of(None, {"tokenizer": str(coded), **given}, False),
    ):
        try:
            load()
        except UserError as error:
            assert "cannot load the tokenizer" in str(error)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["off", "maybe", "", 2, [True]])
def test_other_words_are_refused_before_anything_is_loaded(coded, tmp_path, value):
    for load in (
        lambda: meter.meter_for({"tokenizer": str(coded), "trust_remote_code": value}, None),
        lambda: show.Reader.of(str(coded), {"trust_remote_code": value}, False),
    ):
        with pytest.raises(UserError, match=r"^trust_remote_code=.* must be true or false"):
            load()
    assert not (tmp_path / "ran").exists()


def test_code_runs_where_the_user_says_so(coded, tmp_path):
    meter.meter_for({"tokenizer": str(coded), "trust_remote_code": "True", "max_length": 9}, None)
    assert (tmp_path / "ran").exists()


def test_special_tokens_by_the_word(tmp_path):
    tokenizer("bos").save_pretrained(tmp_path / "tok")
    counts = [
        meter.meter_for({"tokenizer": str(tmp_path / "tok"), "add_bos_token": value}, None).count("Stored.")
        for value in ("false", False, "true", True)
    ]
    assert counts[0] == counts[1] == counts[2] - 1 == counts[3] - 1


@pytest.mark.parametrize(
    "name, said", [("tokenizer.json", "is no regular file"), ("config.json", "is no regular file")]
)
def test_a_folder_with_a_pipe_is_not_waited_for(tmp_path, name, said):
    tokenizer("bpe").save_pretrained(tmp_path / "tok")
    (tmp_path / "tok" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "tok" / name)
    for load in (
        lambda: meter.meter_for({"tokenizer": str(tmp_path / "tok")}, None),
        lambda: show.Reader.of(str(tmp_path / "tok"), {}, False),
    ):
        with pytest.raises(UserError, match=f"cannot load the tokenizer .*{name} is no regular file"):
            load()


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"model": {"type": "BPE"}}', "\0", "5"])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    tokenizer("bpe").save_pretrained(tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot load the tokenizer") as caught:
        show.Reader.of(str(tmp_path / "tok"), {}, False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


# ---------------------------------------------------------------------------------------------------------------- paths

#: A path -> what is said of it, after the option.
PATHS = {
    "": "is empty",
    "x" * 300: "are allowed",
    "x/" * 3000: "are allowed",
    "~nosuchuser/x": "no home folder for ~nosuchuser",
    "a\0b": "cannot hold a null character",
    "a\nb": "no such folder|does not exist|neither a folder",
    "file": "is a file|no folder",
    "away": "does not exist|no folder|neither a folder",
    "loop": "does not exist|no folder|neither a folder",
    "/dev/null": "is a file|no folder",
}
COMMANDS = {
    "check-task": lambda path: ["check-task", path],
    "new-task": lambda path: ["new-task", NAME, "--folder", path],
    "show": lambda path: ["show", "frontier_vt_4k", "--index", "0", "--include_path", path],
    "tokenizer": lambda path: ["show", "frontier_vt_4k", "--index", "0", "--tokenizer", path],
}


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
@pytest.mark.parametrize("name", COMMANDS)
def test_paths_that_are_none(path, name, command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("away").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(*COMMANDS[name](path))
    said = one_line(err)
    assert (status, out) == (1, "") and len(said) < 700
    assert any(part in said for part in PATHS[path].split("|")) or "cannot load the tokenizer" in said, said
    assert sorted(tmp_path.rglob("*")) == before


NAMES = ["con", "lpt1", "CON", "task\n", "tâche", "名", "../x", "/x", "", " ", "x" * 5000, "a\0b", "-"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_no_folder_should_have(name, command, tmp_path):  # noqa: F811
    status, out, err = command("new-task", "--folder", tmp_path, "--", name)
    assert (status, out) == (1, "") and len(one_line(err)) < 500 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("index", ["", "+1", "-1", "１", "1_0", " 1", "1.0", "9" * 5000, "1000001", "\0"])
def test_indexes_that_are_none(index, command, tokenizers):  # noqa: F811
    status, out, err = command("show", "frontier_vt_4k", f"--index={index}", "--tokenizer", tokenizers("bpe"))
    assert (status, out) == (1, "") and "but it must be a whole number from 0 to 1,000,000" in one_line(err)


@pytest.mark.parametrize("samples", ["", "+2", "-1", "２", "9" * 5000, "1", "1000001"])
def test_numbers_of_documents_that_are_none(samples, command):  # noqa: F811
    status, out, err = command("check-task", "vt", f"--samples={samples}")
    assert (status, out) == (1, "") and "but it must be a whole number from 2 to 1,000,000" in one_line(err)


def test_a_document_that_there_is_none_of_writes_nothing(command, tokenizers, tmp_path):  # noqa: F811
    status, _, err = command("show", "frontier_vt_4k", "--index", 100, "--tokenizer", tokenizers("bpe"))
    assert status == 1 and "has documents 0 to 99; more with --metadata" in one_line(err)
    assert not (tmp_path / "cache").exists()


def test_a_slip_beside_other_tasks_is_a_warning(caplog):
    """They may read more than ours do."""
    from lm_eval_sparse.patches import preflight

    run = preflight._with_preflight(lambda model, model_args=None, tasks=None, metadata=None: None)
    with caplog.at_level(logging.WARNING, "lm_eval_sparse"):
        run("dummy", "a=1", ["frontier_niah_4k", "niah_single_1"], {"question_frist": False, "max_seq_lengths": [1]})
    assert [record.getMessage() for record in caplog.records] == [
        "no frontier task reads question_frist, which --metadata gives; did you mean 'question_first'?"
    ]
