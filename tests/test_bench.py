"""The benchmark compares equal work and reports all circumstances. Nothing here asserts a speed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cases, measure, peers, report, worker
from bench.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
TINY = cases.Case((12, 8, 6, 4), batch_size=8, steps=6, epochs=2)
# The test extra has all of the bench extra but JAX.
INSTALLED = [name for name in peers.PEERS if not peers.missing_packages([name])]


def needs(name: str) -> object:
    package = peers.PEERS[name].package
    missing = importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def plain_epoch(case: cases.Case, data: cases.Data) -> list[tuple[cases.Array, cases.Array]]:
    """An epoch of the checked order in float64, as a textbook has it."""
    weights = [weight.astype(np.float64) for weight, _ in data.parameters]
    biases = [bias.astype(np.float64) for _, bias in data.parameters]
    for rows in data.order.reshape(case.steps, case.batch_size):
        outputs = [data.X[rows].astype(np.float64)]
        for weight, bias in zip(weights, biases, strict=True):
            z = outputs[-1] @ weight.T + bias
            outputs.append(np.maximum(z, 0) if len(outputs) < len(weights) else z)
        dz = np.exp(outputs[-1]) / np.exp(outputs[-1]).sum(axis=1, keepdims=True)
        dz[np.arange(case.batch_size), data.y[rows]] -= 1
        dz /= case.batch_size
        for layer in reversed(range(len(weights))):
            dx = dz @ weights[layer] * (outputs[layer] > 0)
            weights[layer] -= case.learning_rate * dz.T @ outputs[layer]
            biases[layer] -= case.learning_rate * dz.sum(axis=0)
            dz = dx
    return list(zip(weights, biases, strict=True))


@pytest.mark.parametrize("name", [needs(name) for name in peers.PEERS])
def test_a_peer_makes_the_updates_of_the_textbook(name: str) -> None:
    data = cases.make_data(TINY)
    trainer = peers.prepare(name, TINY, data)
    initial = [tuple(np.array(a) for a in pair) for pair in trainer.parameters()]
    trainer.train(2)
    trainer.reset()
    for pair, start, given in zip(trainer.parameters(), initial, data.parameters, strict=True):
        for array, first, wanted in zip(pair, start, given, strict=True):
            np.testing.assert_array_equal(array, first)
            np.testing.assert_array_equal(array, wanted)
    trainer.train_in_order(data.order)
    for pair, expected in zip(trainer.parameters(), plain_epoch(TINY, data), strict=True):
        for array, wanted in zip(pair, expected, strict=True):
            assert array.dtype == np.float32
            # Six updates: each rounds a parameter below 4 and adds 0.05 of a gradient below 4, which comes out of four
            # products in a row of length 12 at most, each multiplication and addition rounded at 2**-24.
            atol = 6 * (4 + 0.05 * 4 * 4 * 12) * 2.0**-24
            np.testing.assert_allclose(array, wanted, rtol=0, atol=atol)


def test_data_are_a_function_of_the_case_and_hold_every_class() -> None:
    first, second = cases.make_data(TINY), cases.make_data(TINY)
    np.testing.assert_array_equal(first.X, second.X)
    assert first.X.shape == (48, 12)
    assert set(first.y) == set(range(4))
    np.testing.assert_array_equal(np.sort(first.order), np.arange(48))


def test_flops_count_three_products_a_layer_but_for_the_first_input_gradient() -> None:
    assert cases.Case((3, 2), 5, 1, 1).flops == 2 * 2 * 5 * 3 * 2
    assert cases.Case((3, 2, 4), 5, 1, 1).flops == 2 * 5 * (2 * 3 * 2 + 3 * 2 * 4)


def test_ratios_are_taken_round_by_round() -> None:
    mine = measure.Result(TINY, "torch_eager", (2.0, 8.0, 4.0), 2.0, 1.0)
    reference = measure.Result(TINY, "engine", (1.0, 4.0, 1.0), 2.0, 1.0)
    assert mine.ratios(reference).p50 == 2.0


@pytest.mark.parametrize(("before", "after"), [(2.0, (1.0, 1.002)), (1.0, (1.5, 1.5)), (1.0, (float("nan"), 0.5))])
def test_unequal_work_is_refused(before: float, after: tuple[float, ...]) -> None:
    results = [
        measure.Result(TINY, name, (), before, loss)
        for name, loss in zip(("engine", "torch_eager"), after, strict=True)
    ]
    with pytest.raises(measure.DisagreementError, match=r"12-8-6-4@8.*engine.*torch_eager"):
        measure.check_agreement(results)


def test_a_measurement_ends_in_a_full_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name in ("engine", "sklearn_mlp", "jax_scan") if name in INSTALLED]
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    path = tmp_path / "new" / "figures.jsonl"
    peers_text = ",".join(reversed(names))
    assert main(["--cases", TINY.name, "--peers", peers_text, "--repeats", "2", "--out", str(path)]) == 0
    printed = capsys.readouterr()
    assert "OPENBLAS_CORETYPE: unset" in printed.err

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["peer"] for line in lines} == set(names)
    assert lines[0]["peer"] == "engine"
    for line in lines:
        assert line["rounds"] == len(line["every_round"]) == 2
        for spread in (line["microseconds"], line["ratio"]):
            assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
        assert line["loss_after"] < line["loss_before"]
        assert line["loss_difference"] <= measure.AGREEMENT
        assert line["machine"]["cpu"]
        assert line["machine"]["cores"] >= 1
        assert {"python", "numpy", "scipy", "fusemlp"} <= line["versions"].keys()
        assert line["openblas_variables_unset"] == {"OPENBLAS_CORETYPE": "Haswell"}
        assert line["date"].startswith("20")
    pools = lines[0]["thread_pools"]
    assert set(pools) == set(names)
    assert any(pool["user_api"] == "blas" and pool["num_threads"] >= 1 for pool in pools["engine"])

    assert printed.out.strip() == report.markdown(lines).strip()
    assert "| 12-8-6-4, 8 |" in printed.out
    assert main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out == printed.out


def test_a_worker_reports_what_was_raised_inside_it() -> None:
    with worker.Worker("engine") as one, pytest.raises(worker.WorkerError, match="engine failed to turn"):
        one.ask("turn", 1)


def test_the_breakdown_names_every_call_of_the_step() -> None:
    from bench.breakdown import breakdown_text, measure_calls

    found = measure_calls(TINY, cases.make_data(TINY), 12)
    assert [call.label.split()[0] for call in found.calls] == [
        "linear",
        "linear",
        "linear_loss_grad",
        "grad_input",
        "grad_input",
        "grad_weight_update",
    ]
    assert sum(2 * m * n * k for call in found.calls for m, n, k in call.shapes) == TINY.flops
    assert "a step inside fit" in breakdown_text(found)


def test_a_missing_package_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, "torch_eager", peers.Peer("PyTorch eager", "no_such_package"))
    assert main(["--peers", "engine,torch_eager"]) == 2
    assert "no_such_package" in (message := capsys.readouterr().err)
    assert "pip install 'fusemlp[bench]'" in message


def test_the_command_explains_itself_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for option in ("--cases", "--peers", "--repeats", "--out", "--markdown", "--breakdown"):
        assert option in shown.stdout
    refused = run("--peers", "engine,tensorflow")
    assert refused.returncode == 2
    assert "tensorflow" in refused.stderr
    assert "torch_eager" in refused.stderr
    assert run("--markdown", str(tmp_path / "none.jsonl")).returncode == 2
