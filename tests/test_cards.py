"""The dataset card with names, results and earlier cards of any kind, read by a renderer of Markdown and by a shell."""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from read_back import parsed

from lm_eval_sparse import markdown
from lm_eval_sparse.errors import UserError, plain
from lm_eval_sparse.hub import card_text, cards
from lm_eval_sparse.hub import upload as hub
from lm_eval_sparse.results import reproduce
from lm_eval_sparse.results.sample_files import sample_configs, sample_file_name

DATE = "2026-01-01T00-00-00.000000"
TOKEN = "hf_" + "Ab3" * 8


def everywhere(name: str) -> dict[str, Any]:
    """Results in which every name is this one."""
    calls = {"sparse": 3, "dense": 2, "fallback": 1}
    phases = {"prefill": {"method": name, "executed_sparsity": 0.5, "calls": calls, "backends": {name: 3}}}
    return {
        "model_name": name,
        "results": {name: {f"{name},{name}": 0.5, f"{name}_stderr,{name}": 0.1, "sample_len": 2}},
        "configs": {name: {}},
        "versions": {name: name},
        "n-shot": {name: 0},
        "n-samples": {name: {"original": 9, "effective": 2}},
        "higher_is_better": {name: {name: True}},
        "config": {
            "model": name,
            "model_args": {name: name},
            "gen_kwargs": {name: name},
            "limit": 2,
            "sparse": {
                "method": name,
                "requested_sparsity": 0.5,
                "device": name,
                "knobs": {name: {name: name}},
                "versions": {name: name},
                "skipped": {name: name},
                "phases": phases,
                "tasks": {name: phases},
            },
        },
        "date": 1796013962.8,
        "system_instruction": name,
    }


def card_of(name: str) -> str:
    files = [f"m/results_{DATE}.json", f"m/samples_t_{DATE}.jsonl"]
    about = {"contact": name, "leaderboard": name, "model_url": "https://hub/m"}
    return cards.results_card(everywhere(name), repo_id="a/b", files=files, **about)


def tokens(card: str) -> Iterator[tuple[str, str]]:
    """What a renderer finds in the body of a card: kinds and texts; of blocks of code the kind only."""
    body = card.split("\n---\n", 1)[1]
    for block in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        yield block.type, block.content if block.type == "html_block" else ""
        text = ""
        for part in block.children or ():
            if part.type in ("text", "softbreak", "text_special"):
                text += part.content or " "
            else:
                yield part.type, str(part.attrs)
        yield "text", text


HOSTILE = {
    "tag": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "code": "`a` ``b`` ```c",
    "fence": "a\n```\n# b\n```",
    "tildes": "~~~\na\n~~~ ~~b~~",
    "cell": "a|b||c\\|d",
    "backslashes": "a\\\\ \\",
    "link": "a](javascript:alert(1)) [b](javascript:alert(1)) ![c](x) [d]: x",
    "autolink": "<javascript:alert(1)> <http://x>",
    "heading": "# a",
    "heading below": "a\n===\nb\n---",
    "list": "- a",
    "numbered": "1. a",
    "numbered otherwise": "12) a",
    "plus": "+ a",
    "line": "---",
    "stars": "* * * **a** *b*",
    "quote": "> a",
    "underscores": "_a_ __b__ a_b c__d",
    "marks": f"a\n{card_text.END}\n{card_text.BEGIN}\nb",
    "comment": "<!-- a --> --> <!--",
    "template": "{{ 7 * 7 }}{% raw %}{# a #}",
    "entity": "&lt;script&gt; &#x3c; &amp;",
    "formula": "$x$ $$y$$",
    "front matter": "a\n---\nlicense: mit\n---\nb",
    "yaml": "a: [b, *c] &d !e {f: g} # h % @ ` ' \"",
    "control": "\x1b[31ma\x07\0b\r\x85\u2028c",
    "right to left": "a\u202eb",
    "surrogate": "a\ud800b",
    "glyphs": "你好 🎉",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_names_are_text_everywhere(what: str) -> None:
    name = HOSTILE[what].replace(",", ";")  # a comma ends the name of a metric
    shown = " ".join(plain(name.replace("\r", "\n").replace("\n", " ")).split())
    expected = [(kind, text.replace("name!", shown)) for kind, text in tokens(card_of("name!"))]
    card = card_of(name)
    assert list(tokens(card)) == expected
    assert "<script" not in card and "<img" not in card
    assert all(character.isprintable() or character == "\n" for character in card)
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front["pretty_name"] == f"{card_text.TITLE} {shown}"
    # A second push replaces the first's section, whatever is in it.
    assert card_text.merge_cards(card_text.merge_cards("", card), card) == card_text.merge_cards("", card)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_model_without_an_address_is_text_or_code(what: str) -> None:
    blocks = MarkdownIt("commonmark").parse(markdown.code(HOSTILE[what]))
    assert [block.type for block in blocks] == ["paragraph_open", "inline", "paragraph_close"]
    assert {part.type for part in blocks[1].children or ()} <= {"text", "text_special", "code_inline"}


@pytest.mark.parametrize("given", ["javascript:alert(1)", "data:text/html,x", "http://", "/x", 5, "http://a b", "x"])
def test_what_is_no_address_is_no_link(given: Any) -> None:
    card = cards.results_card({"model_name": "m"}, repo_id="a/b", model_url=given)
    links = [attrs for kind, attrs in tokens(card) if kind == "link_open"]
    assert links == ([str({"href": "http://a%20b"})] if given == "http://a b" else [])


def test_files_of_other_names_stay_links_to_themselves() -> None:
    odd = [f"javascript:alert(1)/x)>[<`](y_{DATE}.json", f"a b/#?%_{DATE}.json", f"line\nend_{DATE}.json"]
    card = cards.results_card({}, repo_id="a/b", files=odd)
    links = [attrs for kind, attrs in tokens(card) if kind == "link_open"]
    assert len(links) == 2 and not any("href': 'javascript:" in attrs for attrs in links)
    code = next(t.content for t in MarkdownIt().parse(card.split("\n---\n", 1)[1]) if "hf_hub" in t.content)
    opened = [json.loads(part) for part in code.split("hf_hub_download(")[1].split(", repo_type")[0].split(", ")]
    assert opened[0] == "a/b" and opened[1] in odd


@pytest.mark.parametrize("what", [what for what in HOSTILE if what not in ("surrogate", "control")])
def test_the_command_means_what_was_typed(what: str) -> None:
    """A shell takes it apart again."""
    name = HOSTILE[what]
    command = reproduce.reproduce_command(everywhere(name))
    assert command.isprintable() and not command.startswith("`")
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    ).stdout.decode()
    said = words.split("\0")[:-1]
    given = parsed(said[1:])
    assert (given.model, given.system_instruction, given.tasks) == (
        name,
        name,
        [name] if "," not in name else name.split(","),
    )
    if not name.startswith("~"):  # a home folder is left out
        assert given.model_args == given.gen_kwargs == {name: name}


# -- secrets


@pytest.mark.parametrize("name", ["token", "use_auth_token", "hf_token", "api_key", "password"])
@pytest.mark.parametrize("form", [dict, str])
def test_no_secret_is_in_a_card(name: str, form: type) -> None:
    arguments: Any = {"pretrained": "m", name: "geheimnis"}
    if form is str:
        arguments = f"pretrained=m,{name}=geheimnis"
    results = {**everywhere("geheimnis"), "config": {**everywhere("x")["config"], "model_args": arguments}}
    card = cards.results_card(results, repo_id="a/b", contact="geheimnis", leaderboard=f"http://me:pw@x/{TOKEN}")
    assert "geheimnis" not in card and TOKEN not in card and "me:pw" not in card and name not in card
    assert "--model_args pretrained=m " in reproduce.reproduce_command(results)


class Api:
    """Notes what is asked of the Hub."""

    token = "geheimnis-des-hubs"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.asked.append(name)
            return SimpleNamespace(gated=False)

        return call


PADDING = {"alone": 0, "first piece": 1000, "across pieces": hub._PIECE - 7, "last piece": 3 * hub._PIECE}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("secret", [Api.token, TOKEN, 'sein "passwort" \\ ü'])
def test_a_secret_that_is_left_stops_the_push(tmp_path: Path, padding: str, secret: str) -> None:
    api, target = Api(), hub.Target("a/b", private=True)
    text = json.dumps({"a": "x" * PADDING[padding] + " " + secret + " y"})
    file = tmp_path / "results_x.json"
    file.write_text(text)
    for content in (file, text.encode()):
        with pytest.raises(UserError, match=r"results_x\.json holds a secret") as error:
            hub.push(api, target, {"m/results_x.json": content}, "message", ['sein "passwort" \\ ü'])
        assert not api.asked and secret not in str(error.value)
    assert file.read_text() == text
    hub.push(api, target, {"m/results_x.json": text.replace(json.dumps(secret)[1:-1], "***").encode()}, "message")
    assert "create_commit" in api.asked


def test_what_only_looks_like_a_secret_is_no_reason() -> None:
    """The middle of a word at the edge of a piece; and a card holds what people have written there."""
    word = b"x" * (hub._PIECE - hub._OVERLAP) + TOKEN.encode() + b"y" * hub._PIECE
    hub.check_no_secrets({"a.json": word, "README.md": TOKEN.encode()}, [])
    for name in ("README.md", "samples.jsonl"):
        with pytest.raises(UserError, match=name):
            hub.check_no_secrets({name: TOKEN.encode()}, [TOKEN])


# -- results of any shape

ODD = (None, [], {}, "a", 5, -1.5, True, float("nan"), 1e308, 10**400, ["a", {}], {"a": []})


def paths(value: Any, way: tuple = ()) -> Iterator[tuple]:
    yield way
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*way, key))


@pytest.mark.parametrize("way", list(paths(everywhere("t"))), ids=".".join)
def test_results_of_any_shape_have_a_card(way: tuple) -> None:
    for value in ODD:
        results: Any = copy.deepcopy(everywhere("t"))
        if not way:
            results = value
        else:
            part = results
            for key in way[:-1]:
                part = part[key]
            part[way[-1]] = value
        card = cards.results_card(results, repo_id="a/b")
        assert card.count("\n## Reproduce\n") == 1
        merged = card_text.merge_cards("", card)
        assert merged.count(card_text.END) == 1


# -- cards of others

OURS = card_of("t")
BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FRONTS = {
    "list": "- a\n- b",
    "text": "just words",
    "number": "5",
    "bomb": BOMB,
    "alias": "a: &x 1\nb: *x",
    "circle": "a: &x [*x]",
    "no YAML": "a: [b",
    "tabs": "a:\n\t- b",
    "tag": "a: !!python/object/apply:os.system [echo]",
    "timestamp": "a: 2026-99-99",
    "bad tag": "a: !!timestamp x\nb: !!bool maybe\nc: !!int x",
    "digits": f"a: {'9' * 5000}",
    "nested": "a: " + "[" * 50_000,
    "nested blocks": "\n".join(" " * n + "a:" for n in range(500)),
    "huge": "a: " + "x" * (11 << 20),
    "control": "a: \x07",
    "keys": "? [a, b]\n: c\n? {d: e}\n: f",
}


@pytest.mark.parametrize("what", FRONTS)
def test_front_matter_that_cannot_be_kept_is_said(what: str, caplog: pytest.LogCaptureFixture) -> None:
    begin = time.process_time()
    merged = card_text.merge_cards(f"---\n{FRONTS[what]}\n---\n# Words of people\n", OURS, "README.md of a/b")
    assert time.process_time() - begin < 2
    assert "# Words of people" in merged and len(merged) < 20_000
    assert card_text.merge_cards("# Words of people\n", OURS) == merged
    (said,) = caplog.messages
    assert said.startswith("README.md of a/b is not kept: its front matter") and "\n" not in said


@pytest.mark.parametrize("key", ["tags", "configs", "pretty_name", "viewer", "license", "5", "true"])
@pytest.mark.parametrize(
    "value", [None, 5, "a", [], {}, [None], [{"a": [1]}], {"a": 1}, True, 1.5, "a\n---\nb"], ids=str
)
def test_front_matter_of_other_types(key: str, value: Any) -> None:
    previous = f"---\n{key}: {json.dumps(value)}\n---\nwords\n"
    merged = card_text.merge_cards(previous, OURS)
    assert card_text.merge_cards(merged, OURS) == merged
    front = yaml.safe_load(merged.split("\n---\n")[0].removeprefix("---\n"))
    assert {"lm-eval-sparse", "sparse-attention"} <= set(map(str, front["tags"]))
    assert front["configs"][-1]["config_name"] == "m__t"
    if key == "license":
        assert front["license"] == value
    if key == "tags" and value:
        assert front["tags"][0] == (value[0] if isinstance(value, list) else value) or not isinstance(value, list | str)


def test_front_matter_of_a_thousand_tasks_survives() -> None:
    files = [f"m/samples_task_{number}_{DATE}.jsonl" for number in range(1000)]
    ours = cards.results_card({}, repo_id="a/b", files=files)
    merged = card_text.merge_cards(card_text.merge_cards("---\nlicense: mit\n---\n", ours), ours)
    front, _ = card_text._split(merged, "")
    assert len(front["configs"]) == 1000 and front["license"] == "mit"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"# caf\xe9", b"x" * (card_text.MOST_BYTES + 1)], ids=len)
def test_a_card_that_is_no_text_is_not_kept(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert card_text.decoded(content, "README.md of a/b") == ""
    assert "the repository's history has it" in caplog.text
    assert card_text.decoded("\ufeff# ü".encode(), "") == "# ü"


BODIES = ("", "words", card_text.END, card_text.BEGIN, f"{card_text.END}\n{card_text.BEGIN}", f"`{card_text.BEGIN}` x")


@pytest.mark.parametrize("body", BODIES)
def test_marks_that_are_none_stay(body: str) -> None:
    merged = card_text.merge_cards(body, OURS)
    assert merged.split("---\n\n", 1)[1].startswith(body)
    assert card_text.merge_cards(merged, OURS).count("## Reproduce") == merged.count("## Reproduce") == 1


def test_lines_end_in_other_ways() -> None:
    merged = card_text.merge_cards("---\r\nlicense: mit\r\n---\r\nbefore\r\n", OURS).replace("\n", "\r\n")
    again = card_text.merge_cards(merged, OURS)
    assert again.count("## Reproduce") == 1 and "license: mit" in again and "before" in again


# -- names of samples

TASKS = [
    "a/b",
    "..",
    ".",
    "/",
    "a\\b",
    "con",
    "a b",
    "x" * 300,
    "ü" * 300,
    "a\nb\x1b",
    "a*[b]?",
    "a:b|c<d>",
    "",
    "\ud800",
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: ascii(task)[:20])
def test_every_task_has_a_file(task: str, tmp_path: Path) -> None:
    name = sample_file_name(task, DATE)
    (tmp_path / name).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert name.isprintable() and not set(name) & set('<>:"/\\|?*[]\n')
    (config,) = sample_configs([f"m/{name}"])
    assert config["data_files"][1] == {"split": "latest", "path": [f"m/{name}"]}
    assert all(character.isalnum() or character == "_" for character in config["config_name"])


def test_tasks_never_share_a_file_and_usual_ones_keep_lm_evals() -> None:
    assert sample_file_name("mmlu_pro-1.0+x y", DATE) == f"samples_mmlu_pro-1.0+x y_{DATE}.jsonl"
    tasks = ["a/b", "a_b", "a\\b", "a:b", "x" * 300, "x" * 301, "é" * 200, "é" * 201]
    assert len({sample_file_name(task, DATE) for task in tasks}) == len(tasks)


def test_tasks_never_share_a_configuration() -> None:
    files = [f"m/samples_{task}_{DATE}.jsonl" for task in ("a-b", "a_b", "a b")]
    configs = sample_configs([*files, "m/samples_c\nd_" + DATE + ".jsonl"])
    assert sorted(config["data_files"][0]["path"][0] for config in configs) == sorted(files)
    assert len({config["config_name"] for config in configs}) == 3


def test_markdown_of_what_is_written_already() -> None:
    assert markdown.text(markdown.Written("<b>")) == "<b>" and markdown.text(None) == "None"
