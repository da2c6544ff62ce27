"""Tuning refuses without a card, and writes the table with other tiles of the same sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch

from bench import tune
from bench.cases import Case
from bench.report import write
from fusemlp_kernels.triton import configs

ROOT = Path(__file__).resolve().parents[1]
TILES = [
    (family, product, kind, index)
    for family in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
    for product in tune.PRODUCTS
    for kind in tune.PRECISIONS
    for index in range(len(configs.TABLES[family][product][kind]))
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_a_sentence(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in tune.why_not()
    monkeypatch.delenv("TRITON_INTERPRET")
    before = configs.TABLE_FILE.read_bytes()
    done = subprocess.run([sys.executable, "-m", "bench", "tune"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bench tune: there is no card to measure on: ")
    assert done.stderr.count("\n") == 1
    assert configs.TABLE_FILE.read_bytes() == before


@pytest.mark.parametrize("place", TILES, ids=lambda place: "-".join(map(str, place)))
def test_candidates_are_of_the_size_of_the_present_tile(place):
    family, product, kind, index = place
    present = configs.tiles(family, product, kind)[index]
    assert tune.numbers(present) == configs.TABLES[family][product][kind][index]
    found = tune.candidates(present)
    assert found[0] == present and len(found) == len(set(found)) > 5
    assert {tile.rows * tile.columns for tile in found} == {present.rows * present.columns}
    for tile in found[1:]:
        assert tile.columns % tile.parts == 0 and tile.depth >= 16


@pytest.mark.parametrize("processors", [2, 132])
def test_results_take_tiles_of_the_size(processors):
    tile = configs.Tile(64, 64, 32, 4, 3)
    for rows, columns, _ in tune.result_shapes(tile, processors):
        assert tile.count(rows, columns) >= processors


def test_the_fastest_must_win_by_more_than_chance():
    assert tune.fastest({"a": [1.0, 4.0], "b": [1.0, 3.0]}, "a") == ("b", pytest.approx(0.75**0.5))
    assert tune.fastest({"a": [1.0, 4.0], "b": [0.99, 4.0]}, "a") == ("a", 1.0)


def test_the_table_is_rewritten_at_its_places_only(tmp_path):
    place = ("sm_90", "weight", "half", 1)
    present = configs.tiles("sm_90", "weight", "half")[1]
    tile = configs.Tile(present.columns, present.rows, 32, 4, 2, 4)
    made = tune.rewritten(configs.TABLES, {place: tile})
    old, new = tune.table_text(configs.TABLES).splitlines(), tune.table_text(made).splitlines()
    assert len(old) == len(new)
    changed = [line for before, line in zip(old, new, strict=True) if before != line]
    assert [line.strip(" ,") for line in changed] == [f"[{tile.rows}, {tile.columns}, 32, 4, 2, 4]"]
    with pytest.raises(ValueError, match="would lose its order"):
        tune.rewritten(configs.TABLES, {place: configs.Tile(16, 32, 32, 2, 2)})


def test_the_entries_that_the_benchmarks_networks_use_come_first(tmp_path, monkeypatch):
    arch = configs.Architecture("sm_90", 132)
    used = tune.uses(arch)
    options = tune.parser().parse_args(["--out", str(tmp_path / "tune.jsonl")])
    tuner = object.__new__(tune.Tuner)
    tuner.options, tuner.arch, tuner.card = options, arch, "a card"
    entries = tuner.entries()
    tables = configs.TABLES["sm_90"]
    assert len(entries) == sum(len(tables[product][kind]) for product in tune.PRODUCTS for kind in tune.PRECISIONS)
    assert [used[place] for place in entries] == sorted((used[place] for place in entries), reverse=True)
    assert set(used) <= set(entries) and used[entries[0]] > 1
    # an entry in the file is done, on the card that measured it
    write([{"card": "a card", "place": list(entries[0])}, {"card": "another", "place": list(entries[1])}], options.out)
    assert tuner.entries() == entries[1:]
    # the gradients of a long batch are cut into parts: 64 x 64 does not get the least tile
    monkeypatch.setattr(tune, "CASES", {"narrow": Case((32, 64, 64, 64, 64, 16), 1 << 18, steps=1)})
    ((place, _),) = [item for item in tune.uses(arch).items() if item[0][1] == "weight"]
    assert tables["weight"]["fp32"][place[3]][:2] == [64, 64]


def test_a_rehearsal_measures_and_leaves_the_table_alone(tmp_path):
    before = configs.TABLE_FILE.read_bytes()
    out = tmp_path / "tune.jsonl"
    small = ["--rehearse", "--precision", "fp32", "--entries", "1", "--candidates", "2", "--rounds", "1"]
    assert tune.main([*small, "--product", "weight", "--out", str(out)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["place"] == ["interpreter", "weight", "fp32", 0] and line["measured"] == 2
    assert len(line["seconds"]) == 2 and all(one > 0 for each in line["seconds"].values() for one in each)
    assert configs.TABLE_FILE.read_bytes() == before
    # every entry is in the file now, or the time is over
    assert tune.main([*small, "--product", "weight", "--out", str(out)]) == 0
    assert tune.main([*small, "--minutes", "0"]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_the_table_is_written_as_it_is_read():
    text = configs.TABLE_FILE.read_text()
    assert tune.table_text(json.loads(text)) == text
