"""The command line of this package, for tests that start it as a process: without lm-eval's own thousands of tasks.

`python few_tasks.py run --model sparse-hf ...`; listing all tasks takes five seconds, asking the machine about itself
for the results two.
"""

from __future__ import annotations

import functools

import lm_eval.evaluator
from lm_eval.tasks import TaskManager

from lm_eval_sparse import patches
from lm_eval_sparse.cli.app import main

if __name__ == "__main__":
    patches.install()
    TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # type: ignore
    lm_eval.evaluator.add_env_info = lambda results: None
    raise SystemExit(main())
