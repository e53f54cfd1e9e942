"""What is public: each name in the ``__all__`` of a module that has its page under ``docs/reference/api``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

_PAGES = Path(__file__).parents[2] / "docs" / "reference" / "api"

PAGES = sorted(path.stem for path in _PAGES.glob("*.md") if path.stem != "index")


def modules(page: str) -> list[ModuleType]:
    """The module that a page is about; of a package without names of its own, the modules in it."""
    module = importlib.import_module("refq4" if page == "refq4" else f"refq4.{page}")
    if hasattr(module, "__all__"):
        return [module]
    within = pkgutil.iter_modules(module.__path__, f"{module.__name__}.")
    return [importlib.import_module(found.name) for found in within]


def names() -> list[tuple[str, ModuleType, str]]:
    """Page, module, name."""
    return [(page, module, name) for page in PAGES for module in modules(page) for name in module.__all__]
