"""Adds ``--backend`` to pytest where refq4's tests are what is run, and stays out of the way everywhere else.

pytest loads this small module in every project of the environment (entry point ``pytest11``), so it imports nothing
and defines no option until it has seen that the run is about refq4: ``pytest --pyargs refq4.testing``, or a run in
refq4's own checkout. Then the real plug-in is ``refq4.testing.plugin``.
"""

from __future__ import annotations

import pytest

_PLUGIN = "refq4.testing.plugin"


@pytest.hookimpl(trylast=True)  # after pytest-cov has started, which wants to see the imports
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Load the real plug-in if the run is about refq4."""
    own_checkout = (early_config.rootpath / "refq4" / "testing" / "plugin.py").exists()
    if own_checkout or any(argument.startswith("refq4.testing") for argument in args):
        early_config.pluginmanager.import_plugin(_PLUGIN)
