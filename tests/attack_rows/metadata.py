"""Bad and odd `--metadata`, of a run and of `show`."""

from __future__ import annotations

from . import DEEP, EITHER, LEGAL, LONG, NAME, REFUSED, Row, evaluate, rows, short

AREA = "metadata"


def _run(text: str) -> tuple[str, ...]:
    return evaluate("pretrained=<llama>", "--metadata", text, "--limit", "1", task="frontier_niah_4k")


def _squad(text: str) -> tuple[str, ...]:
    return evaluate("pretrained=<llama>", "--metadata", text, "--limit", "1", task="frontier_squad_4k")


def _other(text: str) -> tuple[str, ...]:
    return evaluate("pretrained=<llama>", "--metadata", text, "--limit", "1")


def _show(text: str) -> tuple[str, ...]:
    return ("show", "frontier_niah_4k", "--index", "0", "--tokenizer", "<llama>", "--metadata", text)


#: What each field does not take, as JSON.
VALUES: dict[str, tuple[str, ...]] = {
    "samples": ("1e30", '"abc"', "0", "-1", "1.5", "[]", "null", "true", "{}", '""', "1e400", "NaN"),
    "seed": ('"abc"', "1.5", "[]", "true", '"1 2"', "null", "9" * 5000),
    "strict": ('"maybe"', "5", "[]", "null"),
    "question_first": ('"maybe"', "2", "[]", "null"),
}
QA = {
    "qa_folder": ("5", '""', '"/no/such/folder"', '"~nosuchuser/x"', f'"{NAME}"', f'"/{LONG}"', "[]", '"<llama>"',
                  '"/dev/null"', '"a\\u0000b"', '"no\\nsuch"', "true", '"."'),
    "squad_hub": ("5", '""', "[]", "{}"),
}  # fmt: skip

WHOLE = ("{", "[]", "5", "null", '"x"', '{"a":}', "abc", DEEP, '{"a":' * 50_000, "{'samples': 1}")
WHOLE_RUN = ("samples=abc", "samples=0", "seed=x", "strict=maybe", "samples=1e30", "samples")

#: On a task that reads none of it: anything is a field of the task's own.
FREE = ('{"a": 1}', "a=1", '{"größe": [1, {"b": null}]}', "{}", '{"samples": 5}', f'{{"a": "{LONG}"}}')

ROWS: list[Row] = [
    *(
        row
        for name, values in VALUES.items()
        for row in rows(
            AREA, REFUSED, [f'{{"{name}": {value}}}' for value in values if len(value) < 99], _run, says=name
        )
    ),
    # lm-eval reads it, and Python's own words say nothing of names.
    Row(AREA, "a number of 5000 digits", _run(f'{{"seed": {"9" * 5000}}}'), says="metadata"),
    *(
        Row(AREA, f"show {name} {short(value)}", _show(f'{{"{name}": {value}}}'), says=name)
        for name, values in VALUES.items()
        for value in values[:6]
    ),
    *(
        row
        for name, values in QA.items()
        for row in rows(AREA, REFUSED, [f'{{"{name}": {value}}}' for value in values], _squad, says=name)
    ),
    *rows(AREA, REFUSED, WHOLE, _run),
    *rows(AREA, REFUSED, WHOLE_RUN, _run),
    *(Row(AREA, f"show {short(text)}", _show(text)) for text in WHOLE),
    *rows(AREA, LEGAL, FREE, _other),
    Row(AREA, "show seed as text", _show('{"seed": "7"}'), EITHER, proof="says document"),
    Row(AREA, "show seed", _show('{"seed": 7}'), LEGAL, proof="says document"),
    Row(AREA, "show a negative seed", _show('{"seed": -7}'), EITHER, proof="says document"),
    Row(AREA, "show a huge seed", _show('{"seed": 1267650600228229401496703205376}'), EITHER, proof="says document"),
    Row(AREA, "show unknown field", _show('{"nosuch": 7}'), says="nosuch"),
    Row(AREA, "unknown field", _run('{"sampels": 7}'), says="did you mean 'samples'"),
    Row(AREA, "show the question once", _show('{"question_first": false}'), LEGAL, proof="says document"),
    *(
        Row(AREA, f"another model type, trust_remote_code {word}", (
            "run", "--model", "dummy", "--tasks", "frontier_niah_4k", "--limit", "1", "--output_path", "out",
            "--include_path", "<tasks>", "--metadata", f'{{"tokenizer": "<remote>", "trust_remote_code": {word}}}'))
        for word in ('"maybe"', '"off"', "5", '""', "[]")
    ),
]  # fmt: skip
