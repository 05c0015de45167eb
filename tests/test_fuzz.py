"""Damaged input of every kind that is read from outside: read, or refused in one line, soon, and nothing is written.

What is made is nearly right, since what is not even that is refused by the first look. With `--fuzz` fifty times more.
"""

from __future__ import annotations

import json
import logging
import os
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_rows import ggufs
from attack_rows.shared import result
from damage import damaged, examples, file_of, json_values, lines_of, odd, text, torn
from hypothesis import given
from hypothesis import strategies as st
from sqlitedict import SqliteDict

from lm_eval_sparse import masking
from lm_eval_sparse.analysis import curve
from lm_eval_sparse.analysis.study import build
from lm_eval_sparse.cli import plot
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import qa_data, show
from lm_eval_sparse.frontier.metadata import check_metadata
from lm_eval_sparse.frontier.recipe import Unavailable
from lm_eval_sparse.frontier.store import DocumentStore
from lm_eval_sparse.hub import upload as hub
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.methods.plan import argument_names, parse, split
from lm_eval_sparse.model import gguf_check, response_cache
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.protocol import MeasuredText
from lm_eval_sparse.results import files
from lm_eval_sparse.results import load as results
from lm_eval_sparse.results.records import records


def is_one_line(message: str) -> bool:
    """Whether a terminal shows a message as one line and obeys nothing in it."""
    return all(character.isprintable() or character in "\t\u00a0\u3000" for character in message)


class Place:
    """Where input lies, beside a working folder and a cache that stay as they are."""

    def __init__(self, root: Path):
        self.input, self.work, self.cache = (root / name for name in ("input", "work", "cache"))
        for folder in (self.input, self.work, self.cache):
            folder.mkdir()

    def file(self, name: str, content: bytes) -> Path:
        """An input file."""
        path = self.input / name
        path.write_bytes(content)
        return path

    def holds(self, call: Callable[..., Any], *args: Any, also: tuple[type[Exception], ...] = (), **more: Any) -> Any:
        """What `call` returns, or the `UserError` of one line it raises. All else fails, and so does a new file."""
        try:
            found = call(*args, **more)
        except UserError as error:
            found = error
            assert is_one_line(str(error)) and len(str(error)) < 4000, str(error)
        except also as error:
            found = error
        assert not any(self.work.iterdir()) and not any(self.cache.iterdir()), "something was written"
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.WARNING)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found.work)
        patch.setenv("LM_EVAL_SPARSE_CACHE", str(found.cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield found
    logging.disable(logging.NOTSET)


# --- GGUF headers -----------------------------------------------------------------------------------------------------

_KEYS = [
    b"general.architecture", b"general.alignment", b"split.count", b"split.no", b"split.tensors.count",
    b"llama.context_length", b"tokenizer.ggml.tokens", b"tokenizer.ggml.model", b"", b"\xff", b"a",
]  # fmt: skip
_counts = st.sampled_from([None, None, None, 0, 1, 2, 3, 2**31, 2**32, 2**61, 2**63, 2**64 - 1])
_numbers = st.sampled_from([0, 1, 2, 16, 32, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
_values = (
    st.binary(max_size=12).map(lambda content: ggufs.value(8, content))
    | st.tuples(st.sampled_from([4, 5, 6, 7, 10, 11, 12]), st.binary(min_size=8, max_size=8)).map(
        lambda pair: ggufs.value(pair[0], pair[1][: {7: 1, 4: 4, 5: 4, 6: 4}.get(pair[0], 8)])
    )
    | st.tuples(st.integers(0, 14), _numbers, st.binary(max_size=24)).map(
        lambda some: ggufs.value(9, some[0].to_bytes(4, "little") + some[1].to_bytes(8, "little") + some[2])
    )
    | st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=16)).map(lambda pair: ggufs.value_of(*pair))
)
_tensors = st.builds(
    ggufs.tensor,
    st.binary(max_size=8),
    st.lists(_numbers, max_size=6).map(tuple),
    st.sampled_from([0, 1, 2, 3, 8, 12, 14, 30, 31, 99, 2**32 - 1]),
    _numbers,
)


@examples(250)
@given(
    values=st.dictionaries(st.sampled_from(_KEYS), _values, max_size=4),
    tensors=st.lists(_tensors, max_size=3),
    version=st.sampled_from([3, 3, 3, 2, 1, 4, 0, 3 << 24]),
    n_values=_counts,
    n_tensors=_counts,
    data=st.sampled_from([0, 100, 4096]),
)
def test_a_gguf_header(place: Place, **header: Any) -> None:
    content = ggufs.file(header.pop("values"), header.pop("tensors"), **header)
    place.holds(gguf_check.check, place.file("m.gguf", content))


@examples(150)
@given(torn(ggufs.file({b"a": ggufs.value(8, b"x"), b"general.alignment": ggufs.value(4, 32)}, data=64)))
def test_a_gguf_file_of_other_bytes(place: Place, content: bytes) -> None:
    place.holds(gguf_check.check, place.file("m.gguf", content))


# --- result files -----------------------------------------------------------------------------------------------------


@examples(150)
@given(file_of(result()))
def test_a_result_file(place: Place, content: bytes) -> None:
    def read() -> list[Any]:
        rows = list(records(results.load(place.file("results_1.json", content))))
        return curve.table(curve.rows_of(build(rows))) if rows else []

    place.holds(read)


@examples(6, seconds=20)  # the first waits for matplotlib and its fonts, on a busy machine
@given(content=damaged(result(), most=1))
def test_a_picture(place: Place, content: dict[str, Any]) -> None:
    given_file, drawn = place.file("results_1.json", json.dumps(content).encode()), place.input / "p.png"
    drawn.unlink(missing_ok=True)
    was_drawn = place.holds(lambda argv: plot.run(argv) is None, [str(given_file), "--output", str(drawn)])
    assert drawn.exists() == (was_drawn is True)


# --- documents and data ---------------------------------------------------------------------------------------------

_DOCUMENTS = [
    {"index": index, "input": f"text {index} ü", "target": str(index), "tokens": 40 + index, "length": 4096}
    for index in range(4)
]


@examples(150)
@given(st.data())
def test_the_documents_of_a_cache(place: Place, data: st.DataObject) -> None:
    """What comes back is what was put there: a damaged line is no document."""
    store = DocumentStore("leaf", "f" * 64)
    try:
        for document in _DOCUMENTS:
            store.add(document)
        store.path.write_bytes(data.draw(torn(store.path.read_bytes())))
        found = store.load()
        assert all(found[index] == _DOCUMENTS[index] for index in found)
        for document in _DOCUMENTS:
            if document["index"] not in found:
                store.add(document)
        assert DocumentStore("leaf", "f" * 64).load() == dict(enumerate(_DOCUMENTS))
        assert [path.name for path in place.cache.rglob("*") if path.is_file()] == [store.path.name]
    finally:
        store.path.unlink(missing_ok=True)
        store.path.parent.rmdir()


_PARAGRAPH = {"context": "A b.", "qas": [{"question": "What?", "answers": [{"text": "b"}]}]}
_SQUAD = {"context": "A b c.", "question": "What?", "answers": {"text": ["b"], "answer_start": [2]}}
_QA: dict[str, tuple[str, st.SearchStrategy[bytes]]] = {
    "dev-v2.0.json": ("squad", file_of({"data": [{"paragraphs": [_PARAGRAPH]}]})),
    "squad.jsonl": ("squad", lines_of(_SQUAD, {**_SQUAD, "question": "Who?"})),
    "QuALITY.v1.0.1.htmlstripped.dev": (
        "quality",
        lines_of({"article": "A b.", "questions": [{"question": "What?", "options": ["a", "b"], "gold_label": 2}]}),
    ),
    "quality.jsonl": (
        "quality",
        lines_of({"article": "A b.", "question": "What?", "options": ["a", "b"], "answer": 1}),
    ),
    "toeflqa.jsonl": (
        "toefl",
        lines_of({"context": "A b.", "questions": ["Question: What? Options: A.a B.b"], "answer": ["B"]}),
    ),
}


@pytest.mark.parametrize("name", _QA)
def test_the_data_of_qa(place: Place, name: str) -> None:
    task, contents = _QA[name]
    folder = place.input / f"qa-{name}"
    folder.mkdir()

    @examples(80)
    @given(contents)
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        qa_data._known.clear()
        found = place.holds(qa_data.load, task, {"qa_folder": str(folder)}, also=(Unavailable,))
        if isinstance(found, qa_data.DataSet):
            assert found.items and all(item.context and item.question and item.answers for item in found.items)

    check()


# --- what is typed ----------------------------------------------------------------------------------------------------

_FIELDS = st.sampled_from(["samples", "seed", "strict", "qa_folder", "tokenizer", "max_seq_lengths", "pretrained"])


@examples(200)
@given(st.dictionaries(_FIELDS | text, json_values, max_size=4))
def test_metadata(place: Place, metadata: dict[str, Any]) -> None:
    place.holds(check_metadata, metadata)


@examples(200)
@given(torn(b'{"seed": 7, "samples": 5, "qa_folder": "x"}') | st.binary(max_size=20))
def test_metadata_as_typed(place: Place, content: bytes) -> None:
    found = place.holds(show.read_metadata, content.decode("utf-8", errors="surrogateescape"))
    assert isinstance(found, dict | UserError)


_METHODS = ["dense", *(name for name in METHODS if name != "dense"), "flexprefill+quest", "snapkv+quest"]
_OURS = st.sampled_from(sorted(argument_names() - {"method"}))
_ours = st.dictionaries(_OURS, odd | st.sampled_from([16, 64, 0.9]), max_size=4)


@examples(300)
@given(st.sampled_from(_METHODS) | odd, _ours)
def test_sparse_arguments(place: Place, method: Any, ours: dict[str, Any]) -> None:
    place.holds(lambda: parse(split({"method": method, **ours})[0]).describe())


_HF = [
    "dtype", "device", "max_length", "tokenizer", "gguf_file", "prefix_token_id", "add_bos_token", "load_in_4bit",
    "peft", "quantization_config", "device_map", "delta", "revision", "subfolder", "trust_remote_code", "batch_size",
    "token", "parallelize", "max_memory", "use_fast_tokenizer", "think_end_token", "chat_template_args",
    "softmax_dtype", "mixed_precision_dtype", "truncation", "logits_cache", "hidden_size", "max_batch_size", "nosuch",
]  # fmt: skip


@examples(300)
@given(st.dictionaries(st.sampled_from(_HF) | text, odd, max_size=3))
def test_arguments_of_a_model_that_is_not_there(place: Place, model_args: dict[str, Any]) -> None:
    """Whatever else is given, a folder that does not exist is refused, and nothing else happens."""
    given_args = {"pretrained": "/no/such/folder", **model_args}
    found = place.holds(SparseHFLM.create_from_arg_obj, given_args, {"device": None})
    assert isinstance(found, UserError)


_FIELDS_OF_GENERATION = st.sampled_from([
    "temperature", "do_sample", "top_k", "top_p", "num_beams", "until", "max_gen_toks", "repetition_penalty", "seed",
    "eos_token_id", "stop", "use_cache", "bad_words_ids", "max_new_tokens", "suppress_tokens", "min_p",
    "early_stopping", "pad_token_id", "generation_config", "sequence_bias", "exponential_decay_length_penalty",
    "watermarking_config",
])  # fmt: skip


@examples(300)
@given(st.dictionaries(_FIELDS_OF_GENERATION | text, json_values, max_size=4))
def test_arguments_of_generation(place: Place, arguments: dict[str, Any]) -> None:
    from lm_eval_sparse.model import generation_checks

    place.holds(generation_checks.check_early, arguments)


# --- cards of the Hub -------------------------------------------------------------------------------------------------

_FILES = st.lists(
    st.sampled_from(["README.md", "m/samples_niah_2025-01-01T00-00-00.0.jsonl", "m/results_2025-01-01T00-00-00.0.json"])
    | text.map(lambda name: f"{name}/samples_{name}_2025-01-01T00-00-00.0.jsonl"),
    max_size=3,
)


@examples(60)
@given(damaged(result()), _FILES)
def test_a_card(place: Place, content: dict[str, Any], names: list[str]) -> None:
    found = place.holds(hub.results_card, content, repo_id="a/b", files=names)
    assert isinstance(found, UserError) or "<script" not in found


_CARD = hub.results_card(result(), repo_id="a/b", files=["m/samples_niah_2025-01-01T00-00-00.0.jsonl"])


@examples(60)
@given(torn(_CARD.encode()) | torn(b"---\ntags: [a]\nconfigs:\n- config_name: b\n---\n\n# Mine\n"))
def test_a_card_that_people_changed(place: Place, previous: bytes) -> None:
    merged = place.holds(hub.merge_cards, previous.decode(errors="replace"), _CARD)
    if not isinstance(merged, UserError):
        assert place.holds(hub.merge_cards, merged, _CARD) == merged, "a push without news changes the card"


# --- response caches --------------------------------------------------------------------------------------------------

_ANSWERS = {f"{number:064x}": MeasuredText(f"answer {number}", {"run": "r"}) for number in range(3)}
_MADE_BY = {"method": "dense", "dtype": "float32", "max_length": 2048}


@pytest.mark.parametrize("which", ["database", "beside"])
def test_a_response_cache(place: Place, which: str) -> None:
    """What is damaged is refused, or gives the answers that were put there."""
    database = place.input / f"{which}_rank0.db"
    with SqliteDict(str(database), autocommit=True) as store:
        response_cache.guard(store, _MADE_BY)
        for key, answer in _ANSWERS.items():
            store[key] = answer
    names = [place.input / name for name in response_cache.names(database)]
    good = [path.read_bytes() for path in names]
    damaged_one = names.index(database) if which == "database" else 1 - names.index(database)

    def read() -> dict[str, Any]:
        response_cache.check(str(database).removesuffix("_rank0.db"))
        with SqliteDict(str(database), autocommit=True) as store:
            response_cache.guard(store, _MADE_BY)
            return {key: store[key] for key in _ANSWERS if key in store}  # as lm-eval asks

    @examples(40)
    @given(torn(good[damaged_one]))
    def check(content: bytes) -> None:
        for path, kept in zip(names, good, strict=True):
            path.write_bytes(kept)
        names[damaged_one].write_bytes(content)
        found = place.holds(read)
        assert isinstance(found, UserError) or all(_ANSWERS[key] == answer for key, answer in found.items())

    check()


# --- what everything above stands on ----------------------------------------------------------------------------------


@examples(300)
@given(torn(b'{"a": [1, 2.5, {"b": null}], "c": "x"}') | st.binary(max_size=30))
def test_json(place: Place, content: bytes) -> None:
    found = place.holds(files.parse_json, content, "here")
    if not isinstance(found, UserError):
        assert found == json.loads(content) or "NaN" in content.decode()


@examples(200)
@given(st.text() | odd.map(str))
def test_a_message(place: Place, words: str) -> None:
    message = str(UserError(words))
    assert is_one_line(message)


_NAMES = st.sampled_from(["token", "hf_token", "api_key", "password", "Authorization", "my.secret", "access_key"])
_SECRETS = st.text(string.ascii_letters + string.digits, min_size=12, max_size=30).map(lambda word: f"Q7{word}")


@examples(200)
@given(json_values, _NAMES, _SECRETS)
def test_masks(place: Place, around: Any, name: str, secret: str) -> None:
    """A secret under its name is gone from a copy, however deep it stands, and what stands beside it is not."""
    value = {"beside": around, "deep": [{"er": {name: secret}}], name: secret}
    found = masking.masked(value, masking.values_in(value))
    assert secret not in json.dumps(found)
    assert found.keys() == value.keys()
    assert os.environ.get("HF_TOKEN") is None or os.environ["HF_TOKEN"] not in json.dumps(found)
