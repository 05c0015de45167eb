"""The long-context tasks of "The Sparse Frontier" (Nawrot et al. 2025, arXiv 2504.17768) for lm-eval.

One module per task holds its recipe: how a document is written, how an answer is scored, what its teacher-forced
twin asks. What all tasks share lies beside them: `fill` (exact prompt lengths), `meter` (the evaluated model's
token counts), `store` (documents on disk) and `task` (the classes that lm-eval sees). Nothing here knows about
sparse attention. A new task is one module, one line in `RECIPES`, and its YAML files under tasks/.
"""

from __future__ import annotations

from importlib import import_module

from ..errors import UserError, nearest
from .recipe import Recipe

#: `task` in a YAML file's `dataset_kwargs` -> "module:class" of its recipe. Imported on use.
RECIPES = {
    "niah": "lm_eval_sparse.frontier.niah:Niah",
    "vt": "lm_eval_sparse.frontier.vt:Vt",
    "cwe": "lm_eval_sparse.frontier.cwe:Cwe",
    "squad": "lm_eval_sparse.frontier.squad:Squad",
    "quality": "lm_eval_sparse.frontier.choice:Quality",
    "toefl": "lm_eval_sparse.frontier.choice:Toefl",
    "story_retrieval": "lm_eval_sparse.frontier.story_retrieval:StoryRetrieval",
    "story_multihop": "lm_eval_sparse.frontier.story_multihop:StoryMultihop",
    "story_filtering": "lm_eval_sparse.frontier.story_filtering:StoryFiltering",
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises `UserError` for a name that is not in `RECIPES`."""
    if name not in RECIPES:
        raise UserError(f"unknown frontier task {name!r}; known: {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    module, _, cls = RECIPES[name].partition(":")
    return getattr(import_module(module), cls)()
