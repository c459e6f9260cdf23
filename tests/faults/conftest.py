"""The fault matrix's figures, printed at the end: what docs/reliability.md quotes."""

import pytest

from tests.faults.forks import WarmParent

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


def pytest_terminal_summary(terminalreporter):
    """Print the figures of this session."""
    if _FIGURES:
        terminalreporter.section("fault matrix")
        for line in _FIGURES:
            terminalreporter.write_line(line)
