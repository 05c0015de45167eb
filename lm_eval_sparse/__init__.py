"""lm-eval-sparse: training-free sparse attention for the LM Evaluation Harness.

Kept almost empty on purpose: lm-eval resolves our entry points by importing this package, and a start-up
hook does so in every `lm_eval` process, so nothing heavy (torch, transformers) may be imported here.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout and in an editable install `kernels`, `tasks`, `patches` and `hub_cards` lie beside this
# package; in a wheel they lie inside it. Either way they are `lm_eval_sparse.kernels` and so on.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
