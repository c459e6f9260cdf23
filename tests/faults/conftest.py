"""The fault matrix's figures, printed at the end: what docs/reliability.md quotes."""

import pytest

from tests.faults.forks import FULL, WarmParent

_FIGURES: list[str] = []


@pytest.fixture
def figure():
    """Takes a sentence with a figure."""
    return _FIGURES.append


@pytest.fixture(scope="session")
def parent():
    """A warm parent that forks a child for each case."""
    with WarmParent() as parent:
        yield parent


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked `full`, unless the whole matrix is asked for."""
    left_out = [] if FULL else [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter):
    """Print the figures of this session."""
    if _FIGURES:
        terminalreporter.section("fault matrix")
        for line in _FIGURES:
            terminalreporter.write_line(line)
