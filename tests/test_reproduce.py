"""The command that repeats a run means to lm-eval what was given."""

from __future__ import annotations

from typing import Any

import pytest
from frontier_common import leaf
from read_back import given_of, parsed

from lm_eval_sparse.results.reproduce import reproduce_command

VALUES = (
    "a", "1.0", "0123", "true", "None", "1e5", "inf", "a,b", "a b", "", "-x", "--limit", "{a", "[1, 2]", "a=b", "it's",
    'say "so"', "line\nend\ttab", "ünï 漢字", "<a>`b`$c", 1, -3, 0.25, 1e-9, True, False, None, ["\n", "a,b"], [], {},
    {"a": {"b": [1, "x=y,z"]}}, 2**60, "９",
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_lm_eval_reads_what_was_given(value: Any) -> None:
    arguments = {"pretrained": "org/m", "some": value, "dtype": "bfloat16"}
    config = {"model": "sparse-hf", "model_args": arguments, "gen_kwargs": {"until": value}}
    given = given_of({"config": config, "results": {"t": {}}})
    assert given.model_args == arguments and given.gen_kwargs == {"until": value}
    assert type(given.model_args["some"]) is type(value) or isinstance(value, int)


@pytest.mark.parametrize(
    "typed", ['stop=["a,b","c"],max=3', "a=1.0,b=true", '{"a": "x,y", "b": [1]}', "a=it's, then", "pretrained=m"]
)
def test_arguments_given_as_text_stay_what_they_are(typed: str) -> None:
    assert given_of({"config": {"gen_kwargs": typed}}).gen_kwargs == parsed(["--gen_kwargs", typed]).gen_kwargs


@pytest.mark.parametrize(
    "seeds, said",
    [
        ((0, 1234, 1234, 1234), None),
        ((7, 7, 7, 7), [7, 7, 7, 7]),
        ((0, 1234, 1234, 5), [0, 1234, 1234, 5]),
        ((None, 1234, -1, 1234), [None, 1234, -1, 1234]),
        (("x", 1, 1, 1), None),
    ],
)
def test_seeds_are_repeated(seeds: tuple[Any, ...], said: list[int | None] | None) -> None:
    names = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    assert given_of({"config": dict(zip(names, seeds, strict=True))}).seed == said
    assert given_of({"config": {}}).seed is None


@pytest.mark.parametrize(
    "given",
    [
        {}, {"samples": 7}, {"seed": -3, "question_first": False}, {"strict": True, "tokenizer": "org/t"},
        {"squad_hub": 'a,b "c"', "samples": 250},
    ],
)  # fmt: skip
def test_metadata_of_our_tasks_is_repeated(given: dict[str, Any]) -> None:
    """What the task itself writes into its results for what lm-eval gives it."""
    model_args = {"pretrained": "org/m", "method": "quest", "sparsity": 0.9}
    names = ("frontier_niah_4k", "frontier_niah_8k")
    leaves = {name: {"metadata": dict(leaf(name, **model_args, **given).config.metadata)} for name in names}
    theirs = {"other": {"metadata": {"version": 1.0, "seed": 99, "samples": 5}}}  # not ours: nobody was asked
    results = {"config": {"model_args": model_args}, "configs": leaves | theirs, "n-shot": dict.fromkeys(leaves, 0)}
    read = given_of(results)
    assert (read.metadata or {}) == given and read.model_args == model_args and read.tasks == [*leaves, "other"]
    # What tasks do not share no command line can have given.
    leaves["frontier_niah_8k"]["metadata"]["samples"] = 3
    assert "samples" not in (given_of(results).metadata or {})


@pytest.mark.parametrize(
    "found, template, turns",
    [
        ({"chat_template": "{{ x }}", "fewshot_as_multiturn": True}, True, True),
        ({"chat_template_sha": "c" * 64, "fewshot_as_multiturn": False}, True, False),
        ({"chat_template_sha": "c" * 64}, True, None),
        ({"chat_template": None, "chat_template_sha": None, "fewshot_as_multiturn": True}, None, None),
        ({"fewshot_as_multiturn": False}, None, None),
    ],
)
def test_chat_templates_are_repeated(found: dict[str, Any], template: bool | None, turns: bool | None) -> None:
    given = given_of({"config": {"model": "hf"}, "results": {"t": {}}, **found})
    assert (getattr(given, "apply_chat_template", None), getattr(given, "fewshot_as_multiturn", None)) == (
        template,
        turns,
    )


@pytest.mark.parametrize(
    "shots, said", [({"a": 5, "b": 5}, 5), ({"a": 0, "b": 0}, 0), ({"a": 0, "b": 5}, None), ({}, None)]
)
def test_few_shot_examples_are_repeated(shots: dict[str, int], said: int | None) -> None:
    assert given_of({"configs": dict.fromkeys(shots, {}), "n-shot": shots}).num_fewshot == said


@pytest.mark.parametrize("limit, said", [(2, "2"), (2.0, "2"), (1234567, "1234567"), (0.1, "0.1"), (None, None)])
def test_the_limit_is_written_in_full(limit: Any, said: str | None) -> None:
    words = reproduce_command({"config": {"limit": limit}}).split()
    assert (words[words.index("--limit") + 1] if "--limit" in words else None) == said
