"""The measures of ``ci/house`` count what they say."""

from __future__ import annotations

import pytest
from house import calls_of, circles, feature_tests


@pytest.mark.parametrize(
    "source, count",
    [
        ("if self.privacy is None or net.members > 1: pass", 2),
        ("isinstance(attack, DPSGD | IBP)", 1),
        ("isinstance(rows, list) or rows is None or members > most or privacy == other", 0),
    ],
)
def test_feature_tests(source: str, count: int) -> None:
    assert feature_tests(source) == count


def test_circles() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g", "a"}, "g": {"f"}}
    assert sorted(circles(imports)) == [["a", "b", "c"], ["f", "g"]]


def test_calls_of_counts_functions_and_no_class_bodies() -> None:
    from fusemlp.describe import checks

    calls = calls_of(lambda: [checks.as_number("lr", 0.5), checks.as_number("lr", 1.0)])
    assert calls[checks.__file__] >= 2
