"""The fault matrix's figures, printed at the end: what docs/reliability.md quotes."""

import pytest

from tests.faults.forks import FULL, WarmParent


@pytest.fixture
def figure(record_property):
    """Takes a sentence with a figure."""
    return lambda sentence: record_property("figure", sentence)  # which a worker's report brings along


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
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [
        each for report in reports if getattr(report, "when", "") == "call" for each in report.user_properties
    ]
    if figures := [sentence for name, sentence in properties if name == "figure"]:
        terminalreporter.section("fault matrix")
        for line in figures:
            terminalreporter.write_line(line)
