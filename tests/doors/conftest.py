"""The backend of scikit-learn's estimators, and lines and counts of results by group at the end of the run."""

from collections import Counter, defaultdict

import pytest

from fusemlp.sklearn import settings

# Properties of reports return from the workers of pytest-xdist too.
LINE, GROUP = "summary line", "summary group"


@pytest.fixture(autouse=True)
def numpy_by_default(monkeypatch):
    """Keep scikit-learn's estimators on NumPy on a machine with a card too: the tests compare bits and float64."""
    monkeypatch.setattr(settings, "working_backend", lambda: "numpy")


@pytest.fixture
def record_line(record_property):
    """Return a function that adds a line to the summary at the end of the run."""
    return lambda line: record_property(LINE, line)


@pytest.fixture
def count_under(record_property):
    """Return a function that counts the calling test under a heading in the summary: "heading: 3 passed"."""
    return lambda heading: record_property(GROUP, heading)


def pytest_terminal_summary(terminalreporter):
    lines = []
    groups = defaultdict(Counter)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == LINE:
                    lines.append(value)
                elif name == GROUP:
                    groups[value][outcome] += 1
    lines += [
        f"{heading}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}"
        for heading, outcomes in groups.items()
    ]
    if lines:
        terminalreporter.section("summary of the doors")
        for line in sorted(lines):
            terminalreporter.line(line)
