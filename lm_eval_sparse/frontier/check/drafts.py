"""Drafts: pure, with one line of filler, with room for what is forced, and cheap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from .report import Wrong, fail_on
from .subject import Subject

_SLOWEST_DRAFT = 0.02  # seconds


def _drafts(subject: Subject) -> Iterator[tuple[str, Callable[[], Any]]]:
    for made in subject.plain():
        for doc in made.docs[:3]:
            arguments = (made.task.length, made.task.seed, doc["index"], made.task.forced)
            yield (
                f"document {doc['index']} of {made.name}",
                lambda made=made, arguments=arguments: made.task.recipe.draft(*arguments),
            )


def pure(subject: Subject) -> str:
    problems = []
    for where, begin in _drafts(subject):
        used, fresh = begin(), begin()
        few, many = min(3, used.most), min(29, used.most)
        used.message(many, "")
        used.gold(few)
        used.message(0, "A line of filler.")
        if used.message(few, "") != fresh.message(few, ""):
            problems.append(f"`message({few}, '')` of {where} depends on what was asked for before")
        elif used.gold(many) != begin().gold(many):
            problems.append(f"`gold({many})` of {where} depends on what was asked for before")
        sizes = [len(used.message(units, "")) for units in (0, few, many)]
        if sizes != sorted(sizes):
            problems.append(f"`message` of {where} has {sizes} characters for 0, {few}, {many} units; expected growth")
    fail_on(problems)
    return "`message` and `gold` depend on their arguments alone"


def filler(subject: Subject) -> str:
    line = "This line is filler and nothing else."
    problems = []
    for where, begin in _drafts(subject):
        units = min(3, begin().most)
        message = begin().message(units, line)
        if message.count(line) != 1 or len(message) < len(begin().message(units, "")) + len(line):
            problems.append(f"`message` of {where} has its filler line {message.count(line)} times, expected once")
    fail_on(problems)
    return "the filler line stands once in the message"


def room(subject: Subject) -> str:
    problems, longest = [], 0
    for made in subject.twins():
        for doc in made.docs:
            room = made.task.recipe.draft(made.task.length, made.task.seed, doc["index"], True).answer
            need = max(("".join(pair) for pair in made.task.recipe.requests(doc)), key=lambda x: len(x.encode()))
            longest = max(longest, len(need.encode()))
            if len(need.encode()) > len(room.encode()):
                problems.append(
                    f"`answer` of document {doc['index']} of {made.name} has {len(room.encode())} bytes, but "
                    f"{need!r:.60} with {len(need.encode())} is forced"
                )
    fail_on(problems)
    return f"`answer` leaves room for what is forced, up to {longest} bytes"


def cheap(subject: Subject) -> str:
    task = subject.plain()[-1].task
    times = []
    for index in range(15):
        begun = time.perf_counter()
        task.recipe.draft(task.length, task.seed, index % len(task.eval_docs), task.forced)
        times.append(time.perf_counter() - begun)
    median = sorted(times)[len(times) // 2]
    if median > _SLOWEST_DRAFT:
        raise Wrong(
            f"a draft takes {1000 * median:.0f} ms to start, expected at most {1000 * _SLOWEST_DRAFT:.0f}: "
            "the twins start one for every document; do the work in `message`"
        )
    return f"a draft takes {1000 * median:.2g} ms to start"
