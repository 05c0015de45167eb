"""Runs each command line that it reads in a process of its own, and answers with its exit status.

What is imported and which tasks lm-eval has is read once, as it takes a minute for half a dozen processes; then each
command line gets a fork of a process in which nothing has been run.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    from lm_eval_sparse import patches

    patches.install()
    import lm_eval.tasks
    from lm_eval.tasks import manager

    from lm_eval_sparse.cli.app import main as run
    from lm_eval_sparse.model import lm  # noqa: F401 (what all need)

    own = manager.TaskIndex.build
    known = functools.cache(lambda path: own([path]))
    folder = Path(lm_eval.tasks.__file__).parent
    known(folder)

    def build(paths: Any, **options: Any) -> dict[str, Any]:
        assert not options
        return {name: entry for path in paths for name, entry in (known if path == folder else own_of)(path).items()}

    def own_of(path: Path) -> dict[str, Any]:
        return own([path])

    manager.TaskIndex.build = staticmethod(build)
    print("ready", flush=True)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.dup2(2, 1)
                status = run(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
