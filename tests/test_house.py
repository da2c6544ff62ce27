"""The measures of ``ci/house`` count what they say."""

import pytest
from house import PRODUCT, ROOT, calls_of, circles, feature_tests, imports_of, lines, tracked

# The most lines of each room, in the format of ruff. A change that needs more raises its row in the same commit, and
# says what it buys; one that needs fewer lowers it.
BUDGETS = {
    "engine/docs/gallery": 330,
    "engine/examples": 370,
    "engine/fusemlp": 850,
    "engine/fusemlp/callbacks": 1_290,
    "engine/fusemlp/cli": 3_680,
    "engine/fusemlp/datasets": 3_320,
    "engine/fusemlp/describe": 3_120,
    "engine/fusemlp/fleet": 1_720,
    "engine/fusemlp/inputs": 1_430,
    "engine/fusemlp/program": 1_740,
    "engine/fusemlp/report": 3_000,
    "engine/fusemlp/runtime": 3_920,
    "engine/fusemlp/sklearn": 2_910,
    "engine/fusemlp/tables": 2_070,
    "engine/fusemlp/torch": 2_720,
    "engine/fusemlp/training": 2_070,
    "engine/tutorial": 160,
    "kernels/fusemlp_kernels": 2_870,
    "kernels/fusemlp_kernels/cupy": 2_170,
    "kernels/fusemlp_kernels/numpy": 6_110,
    "kernels/fusemlp_kernels/triton": 6_280,
}


@pytest.mark.parametrize(
    "source, count",
    [
        ("if self.privacy is None or net.members > 1: pass", 2),
        ("isinstance(attack, DPSGD | IBP)", 1),
        ("isinstance(rows, list) or rows is None or members > most or privacy == other", 0),
    ],
)
def test_feature_tests(source, count):
    assert feature_tests(source) == count


def test_circles():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g", "a"}, "g": {"f"}}
    assert sorted(circles(imports)) == [["a", "b", "c"], ["f", "g"]]


def test_calls_of_counts_functions_and_no_class_bodies():
    from fusemlp.describe import checks

    calls = calls_of(lambda: [checks.as_number("lr", 0.5), checks.as_number("lr", 1.0)])
    assert calls[checks.__file__] >= 2


def test_no_files_of_the_engine_import_one_another_in_a_circle():
    assert circles(imports_of(ROOT / "engine")) == []


def test_every_room_keeps_its_budget():
    rooms = dict.fromkeys(BUDGETS, 0)
    for file in tracked("engine", "kernels"):
        if file.suffix in PRODUCT:
            parent = file.parent.relative_to(ROOT)
            room = next(str(part) for part in (parent, *parent.parents) if str(part) in BUDGETS)
            rooms[room] += lines([file])
    over = {room: (count, BUDGETS[room]) for room, count in rooms.items() if count > BUDGETS[room]}
    assert not over, "rooms over their budget of lines: shorten them, or raise the row and say what it buys"
    # a budget that is far above its room holds nothing
    assert {room for room, count in rooms.items() if count < 0.97 * BUDGETS[room]} == set()
