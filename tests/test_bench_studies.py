"""The studies of the benchmark: their accounts add up, and their conclusions from given figures are right."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from bench import kernels, memory, overhead, roofline, study, tables, timing, trials
from bench.vendor import Vendor
from fusemlp import MLP, Adam, Engine
from fusemlp.runtime.plans import open_backend

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ("roofline", "kernels", "overhead", "host", "ppo", "tables", "trees")
CEILINGS = timing.Ceilings(flops=2e9, bytes=1e9, near_bytes=4e9, near_size=1 << 12)
TINY = study.network("12-8-4@8")


def vendor(backend="numpy", precision="fp32"):
    return Vendor(open_backend(backend, None, precision), precision)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_explains_itself(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        import_module(f"bench.{name}").main(["--help"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in (f"python -m bench {name}", "--out", "--json", "--help"))


def test_ppo_names_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr("bench.ppo.importlib.util.find_spec", lambda module: None if "base" in module else module)
    assert import_module("bench.ppo").main(["--seeds", "1"]) == 1
    assert "not installed: pip install stable-baselines3" in capsys.readouterr().err


def test_a_study_runs_as_a_module():
    command = [sys.executable, "-m", "bench.roofline", "784-128@nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "widths@batch such as 784-128-10@64, got '784-128@nothing'" in done.stderr


@pytest.mark.parametrize("text", ["", "10@8", "8-0-2@8", "8-4-2", "8-4-2@0", "8--2@4", "8-x-2@4"])
def test_what_is_no_network_is_refused(text):
    with pytest.raises(Exception, match="expected widths@batch"):
        study.network(text)


def test_the_floor_is_the_longer_of_products_and_bytes_over_the_faster_copy():
    by_flops, by_bytes = CEILINGS.floor(flops=4e9, traffic=6e9)
    assert (by_flops, by_bytes) == (2.0, 1.5)
    assert timing.Ceilings(1.0, 3.0, 2.0, 1).fastest_bytes == 3.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_roofline_has_every_call_and_its_sums_add_up(optimizer):
    options = {"optimizer": optimizer, "backend": "numpy"}
    lines = roofline.study(TINY, options, 4, CEILINGS)
    program = Engine(MLP(TINY.sizes), batch_size=TINY.batch_size, plan="eager", **options).program
    own = [line for line in lines if line["row"] == "call"]
    assert [line["label"].split()[0] for line in own] == [call.op for call in program.calls]
    assert [line["flops"] for line in own] == [call.flops for call in program.calls]
    assert [line["bytes"] for line in own] == [program.traffic(call) for call in program.calls]
    assert sum(line["flops"] for line in own) == TINY.flops
    for line in own:
        assert line["floor"] == max(line["flops"] / 2e9, line["bytes"] / 4e9)
    whole = [line for line in lines if line["row"] != "call"]
    assert {line["row"] for line in whole} == {"sum", "step", "fit"}
    for line in whole:
        assert line["floor"] == pytest.approx(sum(one["floor"] for one in own), rel=1e-12)
        assert line["share"] == pytest.approx(line["floor"] / line["seconds"]["p50"], rel=1e-12)
        assert line["flops"] == TINY.flops
    shown = roofline.text(lines)
    assert all(line["label"] in shown for line in lines)
    assert "2 GFLOP/s by a large product" in shown


def test_the_ceilings_are_those_of_this_run():
    found = timing.measure_ceilings(vendor(), 1 << 14, rounds=1, side=64, size=1 << 16)
    assert min(found.flops, found.bytes, found.near_bytes) > 0
    assert found.near_size == 1 << 14


@pytest.mark.parametrize("backend, precision", [("numpy", "fp32"), ("numpy", "fp64"), ("triton", "fp32")])
def test_the_unfused_sequences_compute_what_the_kernels_compute(backend, precision):
    if backend == "triton":
        pytest.importorskip("triton")
    one = vendor(backend, precision)
    host, m, k, n = one.backend.to_host, 8, 16, 8
    x, w, b = one.matrix(m, k), one.matrix(n, k), one.vector(n)
    ours, theirs = one.matrix(m, n, seed=4), one.matrix(m, n, seed=5)
    one.backend.bind("linear", x=x, w=w, b=b, y=ours, activation="relu")()
    one.linear(x, w, b, theirs)()
    # sums of 16 products of normal numbers, none of which passes 25
    atol = 16 * 25 * (2.0**-53 if precision == "fp64" else 2.0**-24)
    np.testing.assert_allclose(host(ours), host(theirs), rtol=0, atol=atol)
    dz, below = one.matrix(m, n, seed=1), one.matrix(m, k, seed=2)
    # After relu nothing is negative.
    one.xp.clip(below, 0, None, out=below)
    mine, other = one.matrix(m, k, seed=6), one.matrix(m, k, seed=7)
    one.backend.bind("grad_input", dz=dz, w=w, y=below, dz_prev=mine, activation="relu")()
    one.grad_input(dz, w, below, other)()
    np.testing.assert_allclose(host(mine), host(other), rtol=0, atol=atol)
    labels = np.arange(m) % n
    z, out = one.matrix(m, n, seed=3), one.matrix(m, n)
    loss = float(one.loss_grad(z, out, one.integers(labels))())
    exact = host(z).astype(np.float64)
    logs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    wanted = (np.exp(logs) - np.eye(n)[labels]) / m
    np.testing.assert_allclose(host(out), wanted, rtol=0, atol=16 * 2.0**-24)
    assert loss == pytest.approx(-logs[np.arange(m), labels].mean(), rel=1e-5)


def test_every_kernel_has_its_line_and_its_rates(monkeypatch):
    monkeypatch.setitem(timing.FLUSHED_BYTES, "cpu", 1 << 16)
    lines = kernels.study(vendor(), [(8, 16, 8)], 2, CEILINGS)
    ops = [trial.op for trial in trials.trials(vendor(), 8, 16, 8)]
    assert list(dict.fromkeys(line["op"] for line in lines)) == ops
    assert {op.split(",")[0] for op in ops} == {
        *("linear", "linear_loss_grad", "loss_grad", "grad_input", "grad_weight", "grad_weight_update", "update")
    }
    for line in lines:
        assert line["flops_per_second"] == pytest.approx(line["flops"] / line["seconds"]["p50"])
        assert line["share_of_bytes"] == pytest.approx(line["bytes"] / line["seconds"]["p50"] / CEILINGS.bytes)
        if line["contestant"] == "kernel":
            assert line["ratio"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    assert {line["cache"] for line in lines} == {"warm", "cold"}
    assert "GPU kernels: not yet measured on a GPU" in kernels.text(lines)


def test_costs_of_a_fit_are_found_in_times_made_of_them():
    made = {(e, s): 3e-4 + 4e-5 * e + 2e-6 * e * s for e in (1, 4, 16) for s in (1, 8, 64)}
    found = overhead.fit_costs(made)
    assert found == pytest.approx({"call": 3e-4, "epoch": 4e-5, "step": 2e-6})


@pytest.mark.parametrize("optimizer, states", [("sgd", 0), (Adam(), 2)])
def test_the_account_of_memory_is_that_of_the_arenas(optimizer, states):
    engine = Engine(MLP((12, 8, 4)), optimizer=optimizer, batch_size=8, plan="eager")
    store = engine.memory
    found = memory.account(engine)
    assert found["parameters"] == store.params.nbytes
    assert found["gradients"] == store.grads.nbytes
    assert found["state"] == sum(arena.nbytes for arena in store.states) == states * store.params.nbytes
    least = memory.least(engine, data_bytes=5)
    count = 12 * 8 + 8 + 8 * 4 + 4
    assert least["parameters"] == 4 * count
    assert least["state"] == 4 * count * states
    assert least["data"] == 5
    # gathered, h1 and dz are alive when the loss is computed
    assert least["values of a step"] >= 4 * 8 * (12 + 8 + 4)


def test_what_an_engine_holds_is_counted():
    line = memory.memory(study.network("256-512-4@8"), "eager", {"optimizer": "adam", "backend": "numpy"})
    arenas = sum(line["account"].values())
    # besides the arenas there are views, descriptions and counters, some tens of kilobytes
    assert arenas <= line["built"] <= arenas + 200_000
    assert line["peak"] >= line["built"]
    assert sum(line["least"].values()) <= line["peak"]


def test_a_study_ends_in_lines_and_a_picture_with_its_finding(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines = roofline.study(TINY, {"backend": "numpy"}, 2, CEILINGS)
    assert "of the fastest step" in roofline.draw(lines).axes[0].get_title(loc="left")
    path = tmp_path / "result.jsonl"
    options = study.parse(study.parser("x", "y"), ["--json", "--out", str(path)])
    study.finish("roofline", options, lines, "the table", roofline.draw)
    assert capsys.readouterr().out == path.read_text()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == len(lines) and written[0]["study"] == "roofline"
    assert {"commit", "machine", "card", "versions", "variables", "date"} <= written[0].keys()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def scored(name, model, task, **figures):
    about = {"table": name, "task": task, "half": "final", "seed": 0, "rows": 1000, "columns": 4, "seconds": 0.5}
    return {**about, "model": model, **figures}


def test_ranks_of_tables_are_means_over_seeds_and_ties_share_theirs():
    scores = [("a", "fusemlp", 0.9), ("a", "linear", 0.8), ("b", "fusemlp", 0.3), ("b", "linear", 0.3)]
    lines = [scored(name, model, "regression", r2=r2) for name, model, r2 in scores]
    lines.append({**scored("a", "fusemlp", "regression", r2=0.5), "seed": 1})
    # 0.7 against 0.8, then a tie
    assert tables.ranks(tables.means(lines), "r2") == {"fusemlp": 1.75, "linear": 1.25}
    shown = tables.text(lines)
    assert "| a | 1,000 | 0.700 (0.50) | **0.800** (0.50) |" in shown
    assert "| mean rank by r2 |  | 1.75 | 1.25 |" in shown


def test_each_half_has_both_tasks_and_no_table_of_the_independent_check():
    kept = {"modeldata", "ISLR", "DAAG", "ggplot2", "stevedata", "nycflights13"}
    assert not kept & {one.package for one in tables.TABLES}
    for half in tables.HALVES:
        tasks = [one.task for one in tables.TABLES if one.half == half]
        assert min(tasks.count("classification"), tasks.count("regression")) >= (3 if half.endswith("-large") else 5)
    assert len({one.name for one in tables.TABLES}) == len(tables.TABLES) >= 20
