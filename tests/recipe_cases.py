"""Leaves of every recipe, with documents and evidence, for tests of what all recipes promise."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib import import_module

import pytest
import yaml
from frontier_common import TASKS, StandIn

from lm_eval_sparse.frontier import RECIPES, recipe
from lm_eval_sparse.frontier.task import ForcedFrontierTask, FrontierTask
from lm_eval_sparse.protocol import set_active_lm

LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 128000}
QA = ("squad", "quality", "toefl")


def _there(name: str) -> bool:
    module, _, cls = RECIPES[name].partition(":")
    try:
        return hasattr(import_module(module), cls)
    except ImportError:
        return False


NAMES = [name for name in RECIPES if _there(name)]
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def qa_folder(tmp_path_factory) -> str:
    """Made-up passages, two questions each, in the formats that `qa_data` documents."""
    folder = tmp_path_factory.mktemp("qa")
    source = random.Random(8)
    syllables = ["ba", "der", "lin", "mo", "ser", "tal", "un", "ver", "wo", "xi", "ste", "gra", "pel", "nor", "qua"]

    def prose(count: int) -> str:
        words = ["".join(source.choices(syllables, k=source.randint(1, 3))) for _ in range(count)]
        return " ".join(words).capitalize() + "."

    squad, quality, toefl = [], [], []
    for _ in range(130):
        context = " ".join(prose(8) for _ in range(source.randint(6, 11)))
        words = context.replace(".", "").split()
        asked = [f"What does the text say about {prose(3)[:-1].lower()}?" for _ in range(2)]
        spans = [" ".join(words[i : i + 3]) for i in source.sample(range(len(words) - 3), 4)]
        squad.append(
            {
                "context": context,
                "qas": [
                    {"id": "x", "question": q, "is_impossible": False, "answers": [{"text": s, "answer_start": 0}]}
                    for q, s in zip(asked, spans, strict=False)
                ],
            }
        )
        right = [source.randrange(4) for _ in range(2)]
        quality.append(
            {
                "article": context,
                "questions": [
                    {"question": q, "options": spans, "gold_label": r + 1} for q, r in zip(asked, right, strict=True)
                ],
            }
        )
        several = ["".join(sorted(source.sample("ABCD", source.choice((1, 1, 1, 2, 3))))) for _ in range(2)]
        options = "".join(
            f"{letter}.{span}" + " " * (letter != "D") for letter, span in zip("ABCD", spans, strict=True)
        )
        toefl.append(
            {
                "context": context,
                "questions": [f"Question: {q} Options: {options}" for q in asked],
                "answer": several,
            }
        )
    (folder / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": squad}]}))
    (folder / "QuALITY.v1.0.1.htmlstripped.dev").write_text("\n".join(map(json.dumps, quality)))
    (folder / "toeflqa.jsonl").write_text("\n".join(map(json.dumps, toefl)) + "\n")
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return tmp_path / "docs"


def active(kind: str, **kwargs) -> StandIn:
    model = StandIn(kind, **kwargs)
    set_active_lm(model)
    return model


@cache
def _config(name: str, length: str, forced: bool) -> str:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    file = TASKS / name / f"{'forced_' if forced else ''}frontier_{name}_{length}.yaml"
    config = yaml.load(file.read_text(), Loader)
    shared = yaml.load((file.parent / config.pop("include")).read_text(), Loader)
    return json.dumps({k: v for k, v in {**shared, **config}.items() if k not in ("tag", "class")})


def leaf(name: str, length: str = "4k", forced: bool = False, **metadata) -> FrontierTask:
    config = json.loads(_config(name, length, forced))
    config["metadata"] |= metadata
    return (ForcedFrontierTask if forced else FrontierTask)(config=config)


def docs(task, **kwargs):
    return dict(task.doc_iterator(**kwargs))


def bound(name: str, qa_folder: str, length: int = 4096, seed: int = 0):
    """The recipe, ready to draft."""
    one = recipe(name)
    one.find({"qa_folder": qa_folder} if name in QA else {})
    one.bind(length, seed, StandIn("digits").tokens, "digits")
    return one


def check_evidence(one, doc):
    rest = doc["input"]
    pieces = one.evidence(doc)
    assert pieces and all(pieces)
    for piece in pieces:
        assert rest.count(piece) == 1
    for piece in pieces:
        doc_without = rest.replace(piece, "\n")
        assert doc_without != rest
        rest = doc_without
    for secret in one.secrets(doc):
        assert secret in doc["input"] and secret not in rest
    return rest
