"""`lm-eval-sparse show`."""

from __future__ import annotations

from .parser import Command, Parser, add_task_options


def run(argv: list[str]) -> int:
    """Print a document of a leaf."""
    parser = Parser.of("show", "Print one document of a leaf as a model would get it.")
    parser.add_argument(
        "task", metavar="TASK", help="name of a leaf, such as frontier_niah_4k or forced_frontier_vt_8k"
    )
    parser.add_argument("--index", metavar="I", required=True, help="number of the document, from 0")
    add_task_options(parser)
    parser.add_argument("--apply_chat_template", action="store_true", help="render the tokenizer's chat template")
    parser.add_argument("--include_path", metavar="DIR", help="folder with more tasks, as in lm_eval")
    parser.add_argument("--full", action="store_true", help="the whole prompt, nothing folded or broken into rows")
    parser.add_argument("--markdown", action="store_true", help="write Markdown")
    options = parser.parse_args(argv)
    from lm_eval_sparse.frontier import show

    return show.run(
        options.task,
        options.index,
        tokenizer=options.tokenizer,
        metadata=options.metadata,
        include_path=options.include_path,
        chat=options.apply_chat_template,
        full=options.full,
        markdown=options.markdown,
    )


COMMAND = Command("show TASK --index I", "print a document of a task: prompt, evidence, gold answer", run)
