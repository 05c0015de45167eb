"""Tells lm-eval-sparse when lm-eval's modules have been imported, so that a released lm-eval finds us by itself.

Works around: lm-eval up to 0.4.13 looks for no plug-ins. The wheel puts this module and
`lm_eval_sparse_autoload.pth` at the root of site-packages, so every Python start of the environment imports it.
Hence it imports nothing but os and sys, touches nothing but `sys.meta_path`, and knows of lm-eval only the names
below. What happens to each module is decided in `lm_eval_sparse.patches`, imported only once lm-eval is.

Delete when the oldest supported lm-eval reads the entry-point groups `lm_eval.models` and `lm_eval.tasks`
and no patch in this folder is left.
"""

import os
import sys

#: Modules whose import `lm_eval_sparse.patches.after_import` is told of. The keys of `patches.PATCHES`.
TARGETS = (
    "lm_eval.models",
    "lm_eval.tasks.manager",
    "lm_eval.evaluator",
    "lm_eval.config.evaluate_config",
    "lm_eval.loggers.evaluation_tracker",
)

#: Set to anything but the empty string, it keeps the start-up files from doing anything.
OPT_OUT = "LM_EVAL_SPARSE_NO_AUTOLOAD"

_finding = set()
_state = {"warned": False}


def _after_import(name, module):
    """Hand an imported module to our patches. Whatever goes wrong there, lm-eval goes on, with one warning."""
    try:
        from lm_eval_sparse import patches

        patches.after_import(name, module)
    except Exception as error:
        if _state["warned"]:
            return
        _state["warned"] = True
        import logging

        # Logged rather than warned: under `-W error` a warning would be the exception we promise not to raise.
        logging.getLogger("lm_eval_sparse").warning(
            "lm-eval-sparse could not be loaded (%s: %s); lm-eval runs without its models and tasks. "
            "Reinstall or uninstall lm-eval-sparse, or set %s=1.",
            type(error).__name__,
            error,
            OPT_OUT,
        )


class PostImportFinder:
    """A meta-path finder that finds nothing itself: it lets the real finders work and wraps what they found."""

    lm_eval_sparse_hook = True

    @staticmethod
    def find_spec(name, path=None, target=None):
        # The second condition ends the recursion when another such finder delegates back to us.
        if name not in TARGETS or name in _finding:
            return None
        _finding.add(name)
        try:
            spec = _find_by_others(name, path, target)
        finally:
            _finding.discard(name)
        loader = getattr(spec, "loader", None)
        run = getattr(loader, "exec_module", None)
        if run is None:
            return spec

        def exec_module(module):
            run(module)
            if module.__name__ == name:  # one loader may serve many modules (zip archives)
                _after_import(name, module)

        try:  # noqa: SIM105 - contextlib is one import more than this file may have
            # On the instance: the loader keeps its type, and with it everything else it can do.
            loader.exec_module = exec_module
        except AttributeError:
            pass
        return spec


def _find_by_others(name, path, target):
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is None or getattr(finder, "lm_eval_sparse_hook", False):
            continue
        spec = find(name, path, target)
        if spec is not None:
            return spec
    return None


def install():
    """Patch lm-eval's modules as soon as they are imported, and at once those that already are."""
    # By mark, not by identity: an editable install has this file twice, in site-packages and in the checkout.
    if not any(getattr(finder, "lm_eval_sparse_hook", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportFinder)
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is not None:
            _after_import(name, module)


def autoload():
    """What the start-up files call: `install()`, unless the user opted out."""
    if not os.environ.get(OPT_OUT):
        install()
