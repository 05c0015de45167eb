"""Leaves that load, documents of the length that they say, and not of filler."""

from __future__ import annotations

import math

from ..fill import SENTENCES
from ..leaves import LENGTHS
from ..recipe import Recipe
from .report import Wrong, fail_on
from .subject import Subject

_FULLEST = 0.95
_MOST_FILLER = 0.15


def classes(subject: Subject) -> str:
    problems = []
    for name, task in subject.load(list(subject.leaves()), samples=subject.samples).items():
        wanted = "ForcedFrontierTask, loglikelihood" if name.startswith("forced_") else "FrontierTask, generate_until"
        found = ("ForcedFrontierTask" if task.forced else "FrontierTask") + f", {task.OUTPUT_TYPE}"
        if found != wanted:
            problems.append(f"{name} is a {found}; expected {wanted}")
        if not isinstance(task.recipe, Recipe):
            problems.append(f"{name} has the recipe {type(task.recipe).__name__}, which is no recipe.Recipe")
        elif task.recipe.name != subject.name:
            problems.append(f"the recipe of {name} is called {task.recipe.name!r}; expected {subject.name!r}")
    fail_on(problems)
    return f"{len(subject.leaves())} leaves load"


def documents(subject: Subject) -> str:
    """Make the documents that the other checks look at."""
    present = [length for length in LENGTHS if f"frontier_{subject.name}_{length}" in subject.leaves()]
    if unknown := [length for length in subject.lengths if length not in present]:
        raise Wrong(f"no leaf for the length {unknown[0]} given with --lengths; there are {', '.join(present)}")
    wanted = subject.lengths or present
    skipped, done = "", []
    for length in wanted:
        if not subject.lengths and len(done) == 2:
            break
        made, reason = subject.make_length(length, subject.samples)
        skipped = skipped or reason
        if reason and subject.lengths:
            raise Wrong(f"frontier_{subject.name}_{length} is skipped: {reason}")
        subject.made += made
        done += [length] * bool(made)
    if not done:
        raise Wrong(f"every leaf is skipped: {skipped}" if skipped else "no leaves")
    if not subject.lengths and present[-1] not in done:
        made, _ = subject.make_length(present[-1], 1, chats=[False])
        subject.made += made
        done += [f"{present[-1]} (one)"] * bool(made)
    if not any(len(made.docs) > 1 for made in subject.made):
        raise Wrong("there is only one document; expected several")
    chats = "with and without chat template" if subject.reader.has_template else "the tokenizer has no chat template"
    return f"{sum(len(made.docs) for made in subject.made)} made: {', '.join(done)}; {chats}"


def lengths(subject: Subject) -> str:
    problems, shortest = [], 1.0
    for made in subject.made:
        for doc, prompt in zip(made.docs, made.prompts, strict=True):
            tokens, length = len(made.reader.tok_encode(prompt)), made.task.config.metadata["prompt_tokens"]
            shortest = min(shortest, tokens / length)
            where = f"document {doc['index']} of {made.name} has {tokens} tokens"
            if tokens > length:
                problems.append(f"{where}, more than {length}")
            elif tokens < _FULLEST * length:
                problems.append(f"{where}; expected {math.ceil(_FULLEST * length)} to {length}")
            elif tokens != doc["tokens"]:
                problems.append(f"{where}, but was written as {doc['tokens']}: `message` gave another text later")
    fail_on(problems)
    return f"every prompt has {100 * shortest:.2f} to 100 % of its length, never more"


def content(subject: Subject) -> str:
    """A draft that has too few units is made as long as it should be by filler, which nobody would notice."""
    most, problems = 0.0, []
    for made in subject.made:
        for doc in made.docs:
            text = doc["input"].lower()
            share = sum(len(sentence) * text.count(sentence) for sentence in SENTENCES) / len(text)
            most = max(most, share)
            if share > _MOST_FILLER:
                problems.append(
                    f"{100 * share:.0f} % of document {doc['index']} of {made.name} is filler; expected at most "
                    f"{100 * _MOST_FILLER:.0f} %: units are too large, or `most` is too small"
                )
    fail_on(problems)
    return f"at most {100 * most:.1f} % of a document is filler"
