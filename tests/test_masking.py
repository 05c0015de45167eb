"""Secrets are found by name, by value and by shape, and by nothing else; a run leaves none anywhere."""

from __future__ import annotations

import io
import json
import logging
import random
import string
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tiny

from lm_eval_sparse import harness, masking, patches
from lm_eval_sparse.cli import app as cli
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.patches import saving

patches.install()

SECRETS = (
    "token", "hf_token", "use_auth_token", "api_key", "model.token", "PASSWORD", "x-api-key", "client_secret",
    "accessToken", "apiKey", "pwd", "jwt", "wandb_key",
)  # fmt: skip
NO_SECRETS = (
    "tokenizer", "eos_token", "bos_token", "prefix_token_id", "add_bos_token", "think_end_token", "max_gen_toks",
    "pretrained", "key_mapping", "tokens", "task", "author", "taken", "max_tokens", "key", "sort_key", "secretary",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets(name: str) -> None:
    assert masking.is_secret(name)
    assert masking.masked({"a": [{name: "s3"}]}) == {"a": [{name: masking.MASK}]}


@pytest.mark.parametrize("name", NO_SECRETS)
def test_names_that_are_none(name: str) -> None:
    assert not masking.is_secret(name)
    assert masking.masked({name: "value"}) == {name: "value"}


@pytest.mark.parametrize("value", [None, True, False, "", {}, []])
def test_values_that_are_no_secret(value: Any) -> None:
    assert masking.masked({"token": value}) == {"token": value}


def tokens(seed: int) -> list[str]:
    source = random.Random(seed)

    def word(letters: str, count: int) -> str:
        return "".join(source.choices(letters, k=count))

    mixed = string.ascii_letters + string.digits
    return [
        f"hf_{word(mixed, 34)}",
        f"hf_{word(string.ascii_lowercase, 34)}",
        f"xoxb-{word(string.digits, 12)}-{word(mixed, 24)}",
        f"AIza{word(mixed, 35)}",
        f"eyJ{word(mixed, 20)}.eyJ{word(mixed, 40)}.{word(mixed, 43)}",
        f"api_org_{word(mixed, 34)}",
        f"sk-{word(mixed, 40)}",
        f"ghp_{word(mixed, 36)}",
        f"github_pat_{word(mixed, 40)}",
        f"AKIA{word(string.ascii_uppercase, 16)}",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_shapes_of_secrets(seed: int) -> None:
    for token in tokens(seed):
        for text in (token, f"tokn={token},x=1", f"'{token}'", f"Bearer {token} ", f"see https://u:{token}@host/x"):
            assert token not in masking.mask(text), text
            assert masking.left_in(text)
            assert not masking.left_in(masking.mask(text)), text


@pytest.mark.parametrize(
    "text",
    ["hf_transfer", "hf_overrides", "/data/hf_llama8Bmodels", "hf_gsm8kHard1",
     "hf_hub_log_args", "hf_transformers", "--model hf", "risk-free", "task-based-x",
     "http://host:80/a@b", "a: b@c", "org/hf_model", "scheme://host", "the bearer presented the cheque",
     "Bearer representatives-of-the-people"],
)  # fmt: skip
def test_what_has_no_such_shape(text: str) -> None:
    assert masking.mask(text) == text


def test_a_password_in_an_address() -> None:
    assert masking.mask("http://user:PW@host:1/x?token=abcdef&y=1") == "http://***@host:1/x?token=***&y=1"


def test_values_are_found_in_texts_and_objects_stay() -> None:
    marker = object()
    values = masking.values_in({"token": "geheim1", "deep": [{"api_key": "geheim12"}]}, "a=b,password=klartext")
    assert {"geheim1", "geheim12", "klartext"} <= values
    found = masking.masked({"x": ["geheim12 geheim1", marker, 5], "geheim1": (1.5, "klartext")}, values)
    assert found == {"x": ["*** ***", marker, 5], "***": (1.5, "***")}


@pytest.mark.parametrize("secret", ["plain-words", 'quo"te\\slash', "größe-ß", "a+b/c==", "x y z w v"])
def test_a_value_is_found_however_it_is_spelt(secret: str) -> None:
    for spelt in (secret, repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False), quote(secret, "")):
        assert masking.left_in(f"<{spelt}>", {secret})
        assert not masking.left_in(masking.mask(f"<{spelt}>", {secret}), {secret})


@pytest.mark.parametrize("seed", range(20))
def test_a_masked_file_says_the_same_but_for_its_secrets(seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)
    secret = source.choice(['pass"word\\x', "geheimes-wort", "131072131072"])
    texts = [f"http://x.org/?token={secret}", f"see {secret}", "http://x.org/?token=abcdefgh", "plain", tokens(seed)[0]]
    row = {name: source.choice(texts) for name in ("hf_gsm8kHard12345678ABCDE", "token", "my_secret", "note")}
    content = {**row, "tokens": 131072131072, "deep": {"leak_password": 1, "rows": [row, 5, None, {"token": 2}]}}
    for name, lines in (("r.json", False), ("s.jsonl", True)):
        file = tmp_path / name
        file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        saving._mask(file, name, frozenset({secret}), lines)
        found = json.loads(file.read_text(encoding="utf-8"))
        said = [text for place in (found, found["deep"]["rows"][0]) for text in place.values() if isinstance(text, str)]
        assert len(said) == 2 * len(row) and not any(masking.left_in(text, {secret}) for text in said)
        assert found.keys() == content.keys() and found["tokens"] == 131072131072
        assert found["deep"]["leak_password"] == 1 and found["deep"]["rows"][1:] == [5, None, {"token": 2}]
        assert all(found[key] == row[key] for key in row if row[key] == "plain")


def test_names_tell_secrets_among_settings_only() -> None:
    tables = {
        part: {"my_secret": 1, "leak_password": "Yaml"} for part in ("results", "versions", "n-shot", "task_hashes")
    }
    settings = {
        "config": {"model_args": {"token": "geheim", "credentials": {"pw": "x"}}},
        "configs": {"my_secret": {"metadata": {"api_key": "geheim"}}},
    }
    found = harness.without_secrets({**tables, **settings}, frozenset())
    assert {part: found[part] for part in tables} == tables
    assert found["config"]["model_args"] == {"token": "***", "credentials": {"pw": "***"}}
    assert found["configs"] == {"my_secret": {"metadata": {"api_key": "***"}}}


def test_tracebacks_are_masked(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lm_eval.some")
    stream = io.StringIO()
    logging.getLogger("lm_eval").addHandler(handler := logging.StreamHandler(stream))
    try:
        with masking.masked_logs(frozenset({"geheimes-wort"})):
            try:
                raise RuntimeError("no access with geheimes-wort")
            except RuntimeError:
                logger.exception("oops, 'token': 'kurz'")
    finally:
        logging.getLogger("lm_eval").removeHandler(handler)
    assert "RuntimeError: no access with ***" in stream.getvalue() and "'token': '***'" in stream.getvalue()


def test_texts_without_a_secret_are_the_same_objects() -> None:
    class Measured(str):
        pass

    text = Measured("an answer")
    assert masking.masked([text], {"geheim"})[0] is text


def test_user_errors_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plainwords")
    assert str(UserError("token=hf_Secret1 plainwords http://a:b@c")) == "token=*** *** http://***@c"


def test_user_errors_are_one_line_without_control_characters() -> None:
    assert str(UserError("a\n  b \x1b[31mred\x07 \u202e")) == r"a b \x1b[31mred\x07 \u202e"


# --- a whole run -----------------------------------------------------------------------------------------------------

TOKEN, KEY, TYPED = "hf_Qx7Secret12345678abcd", "geheimes-wort", "falsch-geschrieben"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "tasks"):
        (tmp_path / name).mkdir()
    tiny.tiny_llama(tmp_path / "llama")
    tiny.write_tasks(tmp_path / "tasks", lengths=(40,))
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__

    def __init__(self: TaskManager, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", __init__)
    return tmp_path


def test_a_run_leaves_no_secret(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("lm_eval").addHandler(handler := logging.StreamHandler())
    try:
        status = cli.main(
            ["run", "--model", "sparse-hf", "--model_args", f"pretrained=llama/,token={TOKEN}", "--tasks",
             "tiny_choice", "--include_path", "tasks", "--output_path", "out", "--log_samples", "--show_config",
             "--metadata", json.dumps({"api_key": KEY}), "--use_cache", "cache"]
        )  # fmt: skip
    finally:
        logging.getLogger("lm_eval").removeHandler(handler)
    assert status == 0
    printed = capfd.readouterr()
    written = [path for path in folder.rglob("*") if path.is_file() and "tasks" not in path.parts]
    assert {path.suffix for path in written} >= {".json", ".jsonl", ".db"}
    for secret in (TOKEN, KEY):
        assert secret not in printed.out + printed.err
        for path in written:
            assert secret.encode() not in path.read_bytes(), path
    (results,) = (json.loads(path.read_text()) for path in written if path.name.startswith("results_"))
    assert results["config"]["model_args"]["token"] == masking.MASK
    assert results["configs"]["tiny_choice"]["metadata"]["api_key"] == masking.MASK


@pytest.mark.parametrize(
    "arguments",
    [f"tokn={TYPED}", f"x={TOKEN}", f"pasword={TYPED}", f"tokken={TYPED}", f"pretrained=https://u:{TYPED}@host/x/y"],
)
def test_a_slip_repeats_no_secret(folder: Path, capfd: pytest.CaptureFixture[str], arguments: str) -> None:
    typed = arguments if "pretrained" in arguments else f"pretrained=llama/,{arguments}"
    command = [
        "run",
        "--model",
        "sparse-hf",
        "--model_args",
        typed,
        "--tasks",
        "tiny_choice",
        "--include_path",
        "tasks",
    ]
    assert cli.main(command) == 1
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err and TYPED not in printed.out + printed.err
