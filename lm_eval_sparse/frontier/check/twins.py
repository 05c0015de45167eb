"""Teacher-forced twins: the gold answers of their siblings, one prompt, a score that is best for gold, chance."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import combinations

from ..show import prompt_of
from .report import Wrong, fail_on, told_scores
from .subject import Subject

_LOW, _HIGH = (-50.0, False), (0.0, True)
_DRAWS = 200


def same_gold(subject: Subject) -> str:
    problems, pairs = [], 0
    siblings = {(made.task.length, made.reader.chat): made for made in subject.generated()}
    for twin in subject.twins():
        sibling = siblings.get((twin.task.length, twin.reader.chat))
        for doc, other in zip(twin.docs, sibling.docs if sibling else twin.docs, strict=False):
            pairs += 1
            if doc["target"] != other["target"]:
                problems.append(
                    f"document {doc['index']} of {twin.name} has the gold answer {doc['target']!r:.60}, "
                    f"its sibling {other['target']!r:.60}"
                )
    fail_on(problems)
    return f"{pairs} documents with the gold answer of their siblings"


def one_prompt(subject: Subject) -> str:
    problems, most = [], 0
    for made in subject.twins():
        for prompt, row in zip(made.prompts, made.instances, strict=True):
            most = max(most, len(row))
            where = f"document {row[0].doc['index']} of {made.name}"
            if any(prompt_of(instance) != prompt for instance in row):
                problems.append(f"the requests of {where} have several prompts; expected one")
            if any(not str(instance.args[1]).strip() for instance in row):
                problems.append(f"a request of {where} has an empty continuation")
            asked = [(str(instance.args[0]), str(instance.args[1])) for instance in row]
            if len(set(asked)) < len(asked):
                problems.append(f"{where} asks the same twice")
    fail_on(problems)
    return f"all requests of a document (up to {most}) share its prompt"


def gold_requests(subject: Subject) -> str:
    """Which requests are gold is found out: they are those that raise the score."""
    problems = []
    for made in subject.twins():
        better = made.task.higher_is_better()
        for doc, row in zip(made.docs, made.instances, strict=True):
            where = f"document {doc['index']} of {made.name}"

            def scores(raised: Sequence[int], made=made, doc=doc, row=row) -> dict[str, float]:
                results = [_HIGH if i in raised else _LOW for i in range(len(row))]
                return made.task.process_results(doc, results)

            def perfect(found: Mapping[str, float], better=better) -> bool:
                return all(math.isclose(v, 1.0, abs_tol=1e-9) for k, v in found.items() if better.get(k, True))

            none = scores(())
            if bad := [name for name, value in none.items() if not math.isfinite(value)]:
                problems.append(f"{bad[0]} of {where} is {none[bad[0]]}; expected a finite number")
                continue
            gold = [i for i in range(len(row)) if _raised(none, scores((i,)), better)]
            if not perfect(scores(gold)) and len(row) <= 10:  # several options must be right together
                sets = (s for n in range(1, len(row) + 1) for s in combinations(range(len(row)), n))
                gold = list(next((s for s in sets if perfect(scores(s))), gold))
            best = scores(gold)
            if not perfect(best):
                problems.append(
                    f"{where}: preferring its gold requests {gold[:12]} gives {told_scores(best)}; expected 1"
                )
            elif perfect(none):
                problems.append(
                    f"{where}: a model that finds nothing likely gets {told_scores(none)}; expected less than 1"
                )
            if len(gold) == len(row):
                lower = {name: value for name, value in best.items() if not better.get(name, True)}
                problems += [f"{where}: certainty gives {name} {value:.4g}; expected 0"
                             for name, value in lower.items() if abs(value) > 1e-9]  # fmt: skip
    fail_on(problems)
    return "preferring the gold requests gives the best score"


def chance(subject: Subject) -> str:
    """Random likelihoods, and equal ones, which must gain nothing over chance."""
    problems, shown = [], {}
    for made in subject.plain(True):
        differences: dict[str, list[float]] = {}
        levels: dict[str, list[float]] = {}
        for doc, row in zip(made.docs, made.instances, strict=True):
            chance = made.task.recipe.chance(doc)
            source = random.Random(doc["index"])
            equal = made.task.process_results(doc, [(-1.0, False)] * len(row))
            for _ in range(_DRAWS):
                found = made.task.process_results(doc, [(-20 * source.random(), False) for _ in row])
                for name, level in chance.items():
                    if name not in found:
                        raise Wrong(f"`chance` of {made.name} has {name}, which is no metric ({', '.join(found)})")
                    if not math.isfinite(found[name]):
                        raise Wrong(f"{name} of {made.name} is {found[name]}; expected a finite number")
                    differences.setdefault(name, []).append(found[name] - level)
            for name, level in chance.items():
                levels.setdefault(name, []).append(level)
                if equal[name] > level + 1e-9:
                    problems.append(
                        f"equal likelihoods give {name} {equal[name]:.4g} on document {doc['index']} of "
                        f"{made.name}; expected at most chance, {level:.4g}"
                    )
        for name, values in differences.items():
            mean, level = sum(values) / len(values), sum(levels[name]) / len(levels[name])
            shown.setdefault(name, level)
            error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
            if abs(mean) > 4 * error + 1e-9:
                problems.append(
                    f"random likelihoods give {name} {level + mean:.4g} on {made.name} (standard error "
                    f"{error:.2g}); expected what `chance` says, {level:.4g}"
                )
    fail_on(problems)
    return told_scores(shown) if shown else "`chance` names no metric"


def _raised(before: Mapping[str, float], after: Mapping[str, float], better: Mapping[str, bool]) -> bool:
    return any(after[name] > before[name] + 1e-12 for name in after if better.get(name, True))
