"""`python -m lm_eval_sparse`: the same as the script `lm-eval-sparse`."""

import sys

from lm_eval_sparse.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
