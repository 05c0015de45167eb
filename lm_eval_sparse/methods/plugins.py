"""Methods of other packages: entry points of the group `lm_eval_sparse.methods`.

    [project.entry-points."lm_eval_sparse.methods"]
    my_method = "my_package.my_module:MyMethod"

Names are read from the metadata of installed packages; a package is imported when its method is asked for, so that one
that is broken breaks nothing else.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import Origin, told

logger = logging.getLogger(__name__)

GROUP = "lm_eval_sparse.methods"


@cache
def found() -> Mapping[str, tuple[EntryPoint, ...]]:
    """The entry points of installed packages by name; nothing is imported."""
    try:
        listed = entry_points(group=GROUP)
    except Exception as error:  # metadata of any package, written by anybody
        logger.warning("plug-ins of other packages cannot be listed (%s)", told(error))
        return {}
    names: dict[str, tuple[EntryPoint, ...]] = {}
    for point in listed:
        names[point.name] = (*names.get(point.name, ()), point)
    return names


def who(point: EntryPoint) -> str:
    """A plug-in as messages name it: the package and its version, and where in it."""
    package = "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f"{package} ({point.value})"


def load(name: str) -> tuple[Any, Origin]:
    """What a plug-in's entry point leads to, and where it is from. Whether it is a method is not looked at.

    Raises:
        UserError: two packages have it, or it cannot be imported.
    """
    points = found()[name]
    if len(points) > 1:
        both = " and ".join(who(point) for point in points)
        raise UserError(f"method={name} is a plug-in of {both}: uninstall one of them")
    (point,) = points
    try:
        value = point.load()
    except AttributeError as error:
        raise broken(name, f"there is no {point.attr} in {point.module} ({told(error)})") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # written by anybody, who may end the program or raise what is no Exception
        raise broken(name, f"it fails when it is imported ({told(error)})") from error
    package = "" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return value, Origin(f"{package} {point.value}".strip(), _digest(value))


def broken(name: str, reason: str) -> UserError:
    """What is said of a plug-in that cannot be used."""
    return UserError(
        f"method={name}: the plug-in of {who(found()[name][0])} cannot be used: {reason}; mend it, or uninstall the "
        "package"
    )


def _digest(value: Any) -> str | None:
    try:
        return hashlib.sha256(Path(inspect.getfile(value)).read_bytes()).hexdigest()
    except (TypeError, OSError):  # made elsewhere, or in an archive
        return None
