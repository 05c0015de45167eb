"""How many tokens stand after the context: question, instructions and the end of the chat template.

Methods that choose by the last queries see this and nothing else of a short prompt, so it has to be as long as the
paper's ("Question+instruction tokens", arXiv 2504.17768, measured by us as tokens that begin behind the context). For
every task, tokenizer and length: mean and range over documents, beside the paper's mean. Twins, whose instructions
are short on purpose, are reported as well.

    python benchmarks/tails.py --tokenizers smollm2= qwen=DIR llama3=DIR --output benchmarks/results/tails

An empty path stands for the embedded model's tokenizer. Further ones come from benchmarks/public_tokenizers.py. Data
of QA tasks that is not found is made up (`made_up`). The JSON keeps a hash of every task's wording: the tests compare
it with the present one, so that a changed wording cannot go without a new measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

import lm_eval_sparse
from lm_eval_sparse import patches
from lm_eval_sparse.frontier import qa, recipe
from lm_eval_sparse.frontier.leaves import BUILT_IN
from lm_eval_sparse.frontier.qa_rows import Item
from lm_eval_sparse.frontier.recipe import Message, Unavailable
from lm_eval_sparse.frontier.show import Reader, load_leaves, make, manager, prompt_of
from lm_eval_sparse.paths import task_folders

#: Mean tokens after the context in the paper's table of tasks, there with Qwen2.5's tokenizer.
PAPER = {
    "niah": 337.7, "vt": 230.0, "cwe": 227.0, "squad": 217.1, "quality": 243.6, "toefl": 237.7,
    "story_retrieval": 457.5, "story_multihop": 193.0, "story_filtering": 184.0,
}  # fmt: skip
#: How far a generated task's mean with that tokenizer may be from the paper's.
TOLERANCE = 0.1
#: The tokenizer that this holds for, by the name it is given here.
REFERENCE = "qwen"

_WORDS = """
    after among answer army because become before began between both bridge built called captain century change
    city company country court daughter death decided during early east end family famous father first followed
    forest found general given government great group harbour held history house increase island journey king known
    large law leader letter local major many member minister most mother mountain moved music name nature near new
    north often old only order original part people period place planet power president problem produce public queen
    reason region report result return river road said school science second several ship small society south speech
    state story system teacher their thought through time town trade tried under used value village war water winter
"""


def made_up(folder: Path, questions: int = 260) -> None:
    """Write SQuAD and QuALITY data of common words into `folder`, in the files that tasks/README.md names.

    SQuAD's questions have 6 to 17 words, 11 in the mean. QuALITY's have 7 to 19 and its options 6 to 15, so that
    question and options take about 76 of Qwen's tokens: the paper's 243.6 less the 167 that its 237.7 for TOEFL leave
    when the questions of TOEFL, which has the same format and is at hand, are taken off.
    """
    source = random.Random(0)

    def prose(least: int, most: int, end: str = ".") -> str:
        words = source.choices(_WORDS.split(), k=source.randint(least, most))
        return " ".join(words).capitalize() + end

    squad, quality = [], []
    for _ in range(questions):
        paragraph = " ".join(prose(9, 24) for _ in range(8))
        asked = prose(6, 17, "?")
        squad.append({"context": paragraph, "question": asked, "answers": {"text": [paragraph.split(".")[0]]}})
        article = " ".join(prose(9, 24) for _ in range(120))
        options = [prose(6, 15) for _ in range(4)]
        quality.append({"article": article, "question": prose(7, 19, "?"), "options": options, "answer": 1})
    for name, rows in (("squad", squad), ("quality", quality)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def wording(name: str) -> str:
    """Hash of what stands after the context in the first documents of a task and its twin, whatever the tokenizer."""
    one = recipe(name)
    texts = []
    for forced in (False, True):
        if isinstance(one, qa.Qa):
            question = one.question(Item("", "Which one?", ("This.", "That.", "Neither."), ("B",)), 1)
            texts.append(Message("", "", question, "", one.instructions(forced)).tail)
        else:
            messages = (one.draft(4096, 0, index, forced).message(24, "") for index in range(3))
            texts += [message.tail for message in messages]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def measure(name: str, reader: Reader, metadata: dict[str, Any], samples: int) -> dict[str, Any] | None:
    """Tokens after the context of the documents of the leaf `name`: `mean`, `least`, `most`. None if it cannot run."""
    task = load_leaves(manager(task_folders(), metadata), [name])[name]
    make(task, reader, list(range(samples)))
    if reason := task.config.metadata.get("skipped"):
        print(f"{name} is left out: {reason}")
        return None
    tokens = []
    for doc, prompt in {i.doc["index"]: (i.doc, prompt_of(i)) for i in task.instances}.values():
        end = prompt.index(doc["input"]) + doc["context"][1]
        # From the token that holds the first character behind the context, which may hold the last one of it, too.
        tokens.append(len(reader.tok_encode(prompt)) - reader.positions(prompt)(end))
    return {"documents": len(tokens), "mean": statistics.fmean(tokens), "least": min(tokens), "most": max(tokens)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows), ""]


def markdown(report: dict[str, Any]) -> str:
    """The tables, from the content of the JSON file."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Tokens after the context",
        "",
        f"{versions}. Chat template applied; question, instructions and the template's end, from the first token "
        f"behind the context on. {report['samples']} documents each: mean (least–most), and the mean as a share of the "
        "paper's. Made by `benchmarks/tails.py`.",
        "",
    ]
    for kind, title in (("generated", "Generated tasks"), ("forced", "Twins, whose instructions are short on purpose")):
        columns = [(name, length) for name in report["tokenizers"] for length in report["lengths"]]
        rows = []
        for task, found in report["tasks"].items():
            row = [task + " (made-up data)" * found["made_up"], f"{found['paper']:g}"]
            for name, length in columns:
                one = found["tokens"].get(name, {}).get(length, {}).get(kind)
                span = f"{one['mean']:.1f} ({one['least']}–{one['most']})" if one else "-"
                row.append(f"{span}, {one['mean'] / found['paper']:.2f}" if one else span)
            rows.append(row)
        lines += [f"## {title}", "", *table(["task", "paper", *(f"{n}, {length}" for n, length in columns)], rows)]
    made = [task for task, found in report["tasks"].items() if found["made_up"]]
    if made:
        lines += [
            f"The data of {' and '.join(made)} was out of reach: their questions and options are made up, of common "
            "words and of a length that `made_up` in the script accounts for.",
            "",
        ]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write at once: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", default=["smollm2="])
    parser.add_argument("--tasks", nargs="+", default=[folder.name for folder in BUILT_IN])
    parser.add_argument("--lengths", nargs="+", default=["16k", "4k"])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--metadata", type=json.loads, default={}, help="where the data of QA tasks is")
    parser.add_argument("--output", help="path without suffix")
    arguments = parser.parse_args()
    patches.install()
    for name in ("lm_eval", "lm_eval_sparse"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    readers = {
        name: Reader.of(path or None, {}, chat=True)
        for name, _, path in (t.partition("=") for t in arguments.tokenizers)
    }
    report: dict[str, Any] = {
        "samples": arguments.samples,
        "lengths": arguments.lengths,
        "tokenizers": list(readers),
        "versions": {
            "lm-eval-sparse": lm_eval_sparse.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "tasks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LM_EVAL_SPARSE_CACHE"] = folder
        made_up(Path(folder))
        for task in arguments.tasks:
            metadata, made = arguments.metadata, False
            try:
                recipe(task).find(metadata)
            except Unavailable as error:
                print(f"{task}: {error}; made-up data is taken")
                metadata, made = {**metadata, "qa_folder": folder}, True
            found: dict[str, Any] = {"paper": PAPER[task], "made_up": made, "wording": wording(task), "tokens": {}}
            for name, reader in readers.items():
                for length in arguments.lengths:
                    kinds = {"generated": f"frontier_{task}_{length}", "forced": f"forced_frontier_{task}_{length}"}
                    rows = {kind: measure(leaf, reader, metadata, arguments.samples) for kind, leaf in kinds.items()}
                    found["tokens"].setdefault(name, {})[length] = {kind: row for kind, row in rows.items() if row}
            report["tasks"][task] = found
            print(task, json.dumps(found["tokens"]), flush=True)
    if arguments.output:
        write(Path(arguments.output).with_suffix(".json"), json.dumps(report, indent=1) + "\n")
        write(Path(arguments.output).with_suffix(".md"), markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
