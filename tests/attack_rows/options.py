"""Bad and odd options of a run beside the arguments of the model and of generation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import DEEP, EITHER, LEGAL, LONG, NAME, REFUSED, Row, evaluate, rows, short

AREA = "options"
_M = "pretrained=<llama>"

#: Values that an option does not take. The message has to name the option.
VALUES: dict[str, tuple[str, ...]] = {
    "--limit": ("-1", "abc", "nan", "-0.5", "", "0", "-inf"),
    "--num_fewshot": ("-1", "abc", "1.5", "1000000", ""),
    "--batch_size": ("0", "-1", "abc", "1.5", "auto:x", "auto:-1", "1e3"),
    "--max_batch_size": ("0", "abc", "-1"),
    "--seed": ("abc", "1,2", "1,2,3,4,5", "1.5", "", "-1", "1099511627776", "1,,2,3", "9" * 5000),
    "--device": ("mars", "cuda:99", "5", "cpu:x"),
    "--samples": ('{"tiny_choice": [99]}', '{"nosuch": [0]}', '{"tiny_choice": 5}', '{"tiny_choice": ["a"]}', "{",
                  '{"tiny_choice": [-1]}', "5", "abc", '{"tiny_choice": {}}', "[0]", '{"tiny_choice": [0.5]}',
                  '{"tiny_choice": []}', DEEP, "<tasks>/docs.json"),
    "--use_cache": (f"./{NAME}", "~nosuchuser/x", "/dev/null/x", "/proc/nosuch/x"),
    "--include_path": ("/no/such/folder", "<llama>/config.json", "~nosuchuser/x", f"/{NAME}"),
    "--verbosity": ("nosuch",),
    "--cache_requests": ("maybe",),
    "--hf_hub_log_args": ("abc", "nosuch=1", "{", "[]"),
    "--config": ("nosuch.yaml", ".", f"{NAME}.yaml", "/dev/null"),
    "--wandb_args": ("project=x",),
    "--trackio_args": ("project=x",),
}  # fmt: skip

#: What a message has to hold where it need not be the option's name.
SAYS = {"--trackio_args": "trackio"}

#: --apply_chat_template and what goes with it, of a model without and with a template.
_CHAT = [
    Row(AREA, "chat template that is not there", evaluate(_M, "--apply_chat_template"), says="template"),
    Row(AREA, "chat template by a name", evaluate(_M, "--apply_chat_template", "nosuch"), says="template"),
    Row(AREA, "chat template by a name, of one", evaluate("pretrained=<chat>", "--apply_chat_template", "nosuch"),
        says="template"),
    Row(AREA, "multiturn without a template", evaluate(_M, "--fewshot_as_multiturn", "true"), says="multiturn"),
    Row(AREA, "multiturn maybe", evaluate("pretrained=<chat>", "--apply_chat_template", "--fewshot_as_multiturn",
        "maybe", "--limit", "1"), EITHER, doubt="lm-eval takes any other word for false"),
    Row(AREA, "chat template", evaluate("pretrained=<chat>", "--apply_chat_template", "--limit", "1"), LEGAL),
    Row(AREA, "system instruction", evaluate("pretrained=<chat>", "--apply_chat_template", "--limit", "1",
        "--system_instruction", "Be brief. \x1b[2J {{x}} {% y %}"), LEGAL),
    Row(AREA, "empty system instruction", evaluate(_M, "--system_instruction", "", "--limit", "1"), LEGAL),
    Row(AREA, "chat template, multiturn", evaluate("pretrained=<chat>", "--apply_chat_template", "--num_fewshot", "1",
        "--fewshot_as_multiturn", "--limit", "1"), LEGAL),
]  # fmt: skip


def _run(*more: str) -> tuple[str, ...]:
    return ("run", "--model", "sparse-hf", "--model_args", _M, "--include_path", "<tasks>", "--output_path", "out",
            *more)  # fmt: skip


_YAML = "task: broken\ndataset_path: json\n"
#: What --tasks does not take.
TASKS = (
    "nosuch", "", ",", "nosuch_*", "tiny_choice,nosuch", "<tasks>/nosuch.yaml", "/", "~nosuchuser/x", f"./{NAME}",
    "tiny_choise", "TINY_CHOICE", "tiny choice", "[", "tiny_[", LONG, "größe", "a\nb", "\x1b[2J", "<tasks>/docs.json",
    "..", "frontier_niah_5k", "frontier_", "../*",
)  # fmt: skip

#: Files of --include_path that are no tasks: a run of one of them is refused in one line.
_FILES: dict[str, str | bytes] = {
    "torn": "task: broken\ndataset_path: [",
    "a list": "- task: broken",
    "no task": "a: 1",
    "bytes": b"task: broken\n\xff\xfe\x00",
    "a tag": "task: broken\ndataset_path: !!python/object/apply:os.system ['touch PWNED']",
    "an unknown tag": "task: broken\ndoc_to_text: !nosuch x",
    "no data set": _YAML,
    "a function that is not there": f"{_YAML}doc_to_text: !function nosuch.f\n",
    "an include that is not there": "task: broken\ninclude: nosuch.yaml\n",
    "an include of itself": "task: broken\ninclude: broken.yaml\n",
    "an unknown field": f"{_YAML}nosuch: 5\n",
    "a metric that is not there": f"{_YAML}metric_list: [{{metric: nosuch}}]\n",
    "aliases without end": "a: &a [x, x]\nb: &b [*a, *a]\ntask: broken\ndataset_path: *b\n",
}


def _fifo(work: Path, words: Any) -> None:
    os.mkfifo(work / "pipe")


def _locked(work: Path, words: Any) -> None:
    (work / "out").write_text("a file where a folder must be")


_CONFIG = "model: sparse-hf\nmodel_args: {pretrained: <llama>}\ninclude_path: <tasks>\noutput_path: out\nlimit: 1\n"
#: Damaged files of --config.
_CONFIGS: dict[str, str | bytes] = {
    "torn": f"{_CONFIG}tasks: [",
    "a list": "- tasks\n",
    "a text": "tasks",
    "empty": "",
    "bytes": b"\xff\xfe\x00tasks: tiny_choice",
    "unknown key": f"{_CONFIG}tasks: [tiny_choice]\nnosuch: 1\n",
    "a tag": "tasks: !!python/object/apply:os.system ['touch PWNED']\n",
    "seed of letters": f"{_CONFIG}tasks: [tiny_choice]\nseed: abc\n",
    "limit of letters": f"{_CONFIG}tasks: [tiny_choice]\n".replace("limit: 1", "limit: abc"),
    "model_args of numbers": "model: sparse-hf\nmodel_args: 5\ntasks: [tiny_choice]\ninclude_path: <tasks>\n",
    "tasks of numbers": f"{_CONFIG}tasks: 5\n",
    "gen_kwargs of numbers": f"{_CONFIG}tasks: [tiny_choice]\ngen_kwargs: 5\n",
    "metadata of numbers": f"{_CONFIG}tasks: [tiny_choice]\nmetadata: 5\n",
    "no tasks": _CONFIG,
    "nested deep": "a: " + "[" * 5000,
}

#: Whole command lines.
WHOLE: dict[str, tuple[str, ...]] = {
    "no tasks": _run(),
    "tasks without a value": _run("--tasks"),
    "limit without a value": _run("--tasks", "tiny_choice", "--limit"),
    "an unknown option": _run("--tasks", "tiny_choice", "--nosuch"),
    "a slip of an option": _run("--tasks", "tiny_choice", "--limt", "1"),
    "an unknown command": ("nosuch",),
    "a slip of a command": ("ru", "--tasks", "x"),
    "an empty command": ("",),
    "a command of dashes": ("--", "run"),
    "an unknown model type": ("run", "--model", "nosuch", "--tasks", "tiny_choice", "--include_path", "<tasks>"),
    "an empty model type": ("run", "--model", "", "--tasks", "tiny_choice", "--include_path", "<tasks>"),
    "validate an unknown task": ("validate", "--tasks", "nosuch", "--include_path", "<tasks>"),
    "validate nothing": ("validate",),
    "ls of nothing known": ("ls", "nosuch"),
    "a word too many": _run("--tasks", "tiny_choice", "--limit", "1", "--device", "cpu", "--", "x"),
    "log_samples without a folder": ("run", "--model", "sparse-hf", "--model_args", _M, "--tasks", "tiny_choice",
                                     "--include_path", "<tasks>", "--log_samples"),
    "limit and samples": evaluate(_M, "--limit", "1", "--samples", '{"tiny_choice": [0]}'),
    "stats=full without a folder": ("run", "--model", "sparse-hf", "--model_args", f"{_M},stats=full", "--tasks",
                                    "tiny_choice", "--include_path", "<tasks>"),
    "push without an organisation": evaluate(_M, "--hf_hub_log_args", "push_results_to_hub=True"),
    "push to an empty organisation": evaluate(_M, "--hf_hub_log_args", "hub_results_org=,push_results_to_hub=True"),
    "push to no name": evaluate(_M, "--hf_hub_log_args", "hub_results_org=a/b/c,push_results_to_hub=True"),
    "push maybe": evaluate(_M, "--hf_hub_log_args", "hub_results_org=a,push_results_to_hub=maybe"),
    "push offline": evaluate(_M, "--hf_hub_log_args", "hub_results_org=a,push_results_to_hub=True,token=abc"),
}  # fmt: skip

#: Where results cannot go.
OUTPUTS = (
    "/dev/null", f"./{NAME}", "/proc/nosuch", "<llama>/config.json/x", "<tasks>/tiny_choice.yaml", "~nosuchuser/x",
    f"/{'x/' * 4000}", "/dev/full",
)  # fmt: skip

LEGAL_OPTIONS: dict[str, tuple[str, ...]] = {
    "limit 0.5": ("--limit", "0.5"),
    "limit beyond the documents": ("--limit", "100"),
    "no examples": ("--num_fewshot", "0", "--limit", "1"),
    "one example": ("--num_fewshot", "1", "--limit", "1"),
    "batches of two": ("--batch_size", "2", "--limit", "1"),
    "batches by themselves": ("--batch_size", "auto", "--limit", "1"),
    "one seed": ("--seed", "42", "--limit", "1"),
    "four seeds": ("--seed", "0,None,8,52", "--limit", "1"),
    "samples": ("--samples", '{"tiny_choice": [1]}'),
    "a response cache": ("--use_cache", "answers", "--limit", "1"),
    "a response cache in a folder": ("--use_cache", "new/folder/answers", "--limit", "1"),
    "prompts written out": ("--write_out", "--limit", "1"),
    "samples logged": ("--log_samples", "--limit", "1"),
    "generation arguments of a scored task": ("--gen_kwargs", "temperature=0", "--limit", "1"),
    "configuration shown": ("--show_config", "--limit", "1"),
}

ROWS: list[Row] = [
    *(
        Row(AREA, f"{option} {short(value)}", evaluate(_M, option, value), says=SAYS.get(option, option.strip("-")))
        for option, values in VALUES.items()
        for value in values
    ),
    *_CHAT,
    *rows(AREA, REFUSED, [f"tasks {task}" for task in TASKS], lambda text: _run("--tasks", text[6:])),
    *(Row(AREA, name, argv) for name, argv in WHOLE.items()),
    *(
        Row(AREA, f"task file: {name}", _run("--tasks", "broken", "--include_path", "more"),
            files={"more/broken.yaml": content})
        for name, content in _FILES.items()
    ),
    *(
        Row(AREA, f"config file: {name}", ("run", "--config", "given.yaml"), files={"given.yaml": content})
        for name, content in _CONFIGS.items()
    ),
    Row(AREA, "config file", ("run", "--config", "given.yaml"), LEGAL,
        files={"given.yaml": f"{_CONFIG}tasks: [tiny_choice]\n"}),
    Row(AREA, "config is a pipe", ("run", "--config", "pipe"), make=_fifo),
    *(
        Row(AREA, f"output {short(path)}", (*evaluate(_M, "--limit", "1"), "--output_path", path), says="output")
        for path in OUTPUTS
    ),
    Row(AREA, "output is a file", evaluate(_M, "--limit", "1"), make=_locked, says="output"),
    Row(AREA, "use_cache names a folder", evaluate(_M, "--limit", "1", "--use_cache", "answers"),
        make=lambda work, words: (work / "answers_rank0.db").mkdir(), says="use_cache"),
    Row(AREA, "use_cache holds text", evaluate(_M, "--limit", "1", "--use_cache", "answers"),
        files={"answers_rank0.db": "no database"}, says="use_cache"),
    Row(AREA, "use_cache is a pipe", evaluate(_M, "--limit", "1", "--use_cache", "answers"),
        make=lambda work, words: os.mkfifo(work / "answers_rank0.db"), says="use_cache"),
    *rows(AREA, LEGAL, ["tiny_ch*", "tiny_choice,tiny_choice", "<tasks>/tiny_choice.yaml"],
          lambda text: _run("--tasks", text, "--limit", "1")),
    *(Row(AREA, name, evaluate(_M, *options), LEGAL) for name, options in LEGAL_OPTIONS.items()),
    *(
        Row(AREA, f"{' '.join(options)} or not", evaluate(_M, *options), EITHER,
            doubt="lm-eval takes an empty text for none given" if "" in options else "")
        for options in (
            ("--use_cache", "", "--limit", "1"), ("--batch_size", "", "--limit", "1"), ("--limit", "1.5"),
            ("--verbosity", "", "--limit", "1"), ("--config", "", "--limit", "1"), ("--limit", "1e30"),
            ("--samples", "null", "--limit", "1"), ("--samples", '{"tiny_choice": [0, 0]}'), ("--limit", "inf"),
            ("--include_path", "", "--limit", "1"), ("--seed", "1,2,3", "--limit", "1"), ("--tasks", "***"),
        )
    ),
    Row(AREA, "predictions alone", evaluate(_M, "--predict_only", "--limit", "1"), LEGAL,
        proof="out/**/samples_*.jsonl"),
    Row(AREA, "output empty", (*evaluate(_M, "--limit", "1"), "--output_path", ""), EITHER, proof="says tiny_choice",
        doubt="lm-eval takes an empty text for none given"),
    Row(AREA, "run and nothing", ("run",), EITHER, proof="says usage"),
    Row(AREA, "the help", ("--help",), LEGAL, proof="says usage"),
    Row(AREA, "the version", ("--version",), LEGAL, proof="says lm-eval-sparse"),
    Row(AREA, "nothing", (), LEGAL, proof="says usage"),
    Row(AREA, "validate a task", ("validate", "--tasks", "tiny_choice", "--include_path", "<tasks>"), LEGAL,
        proof="says tiny_choice"),
]  # fmt: skip
