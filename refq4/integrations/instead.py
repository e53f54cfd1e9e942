"""Functions in the place of another library's, which offers no registry for what they say.

@instead_of(BaseTuner, "_check_merge_allowed")
def _merges_what_it_can(original, self): ...      called as the library's was, which comes before the arguments
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

__all__: list[str] = []  # for the modules beside it


def instead_of(owner: Any, name: str, package: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put the decorated function in the place of ``owner.name``: a function of a module, or any method of a class.

    It gets the function that was there before its arguments, which of a class method begin with the class.

    Args:
        package: replace it under the name that this package's modules have imported it by, too.

    Example:
        >>> import types
        >>> library = types.SimpleNamespace(double=lambda x: 2 * x)
        >>> @instead_of(library, "double")
        ... def also_of_none(original, x):
        ...     return None if x is None else original(x)
        >>> library.double(3), library.double(None)
        (6, None)
    """

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        found: Any = inspect.getattr_static(owner, name)
        kind = type(found) if isinstance(found, classmethod | staticmethod) else None
        original = found if kind is None else found.__func__

        @functools.wraps(original)
        def instead(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        importers = [m for key, m in sys.modules.items() if package and key.partition(".")[0] == package]
        for place in (owner, *(m for m in importers if getattr(m, name, None) is found)):
            setattr(place, name, instead if kind is None else kind(instead))
        return instead

    return put
