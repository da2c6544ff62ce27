"""Fleets and sweeps whose models train in other processes, and go on where they were cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import PicklingError
from typing import Any

import joblib
import numpy as np
import pytest

from fusemlp import MLP, ArgumentError, ArgumentTypeError, Fleet, FleetResults, WorkerError
from fusemlp.cli import sweep
from fusemlp.fleet import workers as elsewhere
from fusemlp.fleet.results import Member
from fusemlp.fleet.workers import trained_elsewhere
from fusemlp.sklearn import FleetSearchCV, MLPClassifier
from make import read, rows, run

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(300, 6)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64)
FIT: dict[str, Any] = {"epochs": 3, "validation_data": (X[:50], Y[:50]), "metrics": ["auc"], "early_stopping": 2}


def fleet(**options: Any) -> Fleet:
    return Fleet(MLP([6, 8, 2]), vary={"lr": [0.001, 0.01], "hidden": [4, 8], "seed": range(2)}, **options)


def assert_same(found: FleetResults, expected: FleetResults) -> None:
    assert [one.index for one in found.members] == list(range(len(expected.members)))
    for one, other in zip(found.members, expected.members, strict=True):
        assert (one.parameters, one.scores, one.status, one.reason) == (
            other.parameters,
            other.scores,
            other.status,
            other.reason,
        )
        state = other.engine.state_dict()
        for name, value in one.engine.state_dict().items():
            np.testing.assert_array_equal(value, state[name])


@contextmanager
def dask_here() -> Iterator[None]:
    distributed = pytest.importorskip("distributed")
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
        yield


def trained(numbers: Sequence[int], once: Path | None) -> list[Member]:
    """Stand in for a training; the one of model 2 kills its process, with ``once`` only where that file is missing."""
    if 2 in numbers and (once is None or not once.exists()):
        if once is not None:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [Member(number, {}, None, None, "trained", "", {}) for number in numbers]  # type: ignore[arg-type]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


class TestFleets:
    @pytest.mark.parametrize("options", [{}, {"normalise": True}], ids=str)
    def test_other_processes_train_the_same_models(self, options: dict[str, Any]) -> None:
        expected, seen = fleet(**options).fit(X, Y, **FIT), list[int]()
        other = fleet(**options)
        found = other.fit(X, Y, **FIT, workers="loky", jobs=2, callback=lambda one: seen.append(one.index))
        assert_same(found, expected)
        assert sorted(seen) == list(range(8))
        assert other.predict(X).mean.shape == (300, 2)
        with pytest.raises(ArgumentError, match=r"^fit: the models were trained in parts"):
            other.fit(X, Y, epochs=1)

    def test_each_model_has_its_rows_and_its_start(self) -> None:
        own = [np.arange(start, 300, 2) for start in (0, 1)] * 4
        given = {"epochs": 2, "rows": own, "validation_rows": own[::-1]}
        start = [{"0.bias": np.full(width, 0.1)} for width in (4, 4, 8, 8, 4, 4, 8, 8)]
        expected = fleet(initial=start).fit(X, Y, **given)
        assert_same(fleet(initial=start).fit(X, Y, **given, workers="loky", jobs=2), expected)

    @pytest.mark.parametrize("workers", ["threading", "loky"])
    def test_an_error_of_a_callback_ends_the_training(self, workers: str) -> None:
        def fails(one: Member) -> None:
            raise RuntimeError("mine")

        given = fleet()
        with pytest.raises(RuntimeError, match=r"^mine$"):
            given.fit(X, Y, epochs=1, workers=workers, jobs=2, callback=fails)
        assert given.results is None

    def test_a_fleet_of_a_part_has_its_models(self) -> None:
        whole, part = fleet().fit(X, Y, epochs=1), fleet().part([6, 1]).fit(X, Y, epochs=1)
        for one, number in zip(part.members, (6, 1), strict=True):
            np.testing.assert_array_equal(one.engine.predict_proba(X), whole.engine(number).predict_proba(X))

    def test_wrong_workers_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(
            ArgumentError, match=r"^workers: unknown name 'lokey'; did you mean 'loky'\? Expected one of: dask, loky"
        ):
            fleet().fit(X, Y, epochs=1, workers="lokey")
        with pytest.raises(ArgumentTypeError, match=r"^workers: expected the name of a backend of joblib"):
            fleet().fit(X, Y, epochs=1, workers=4)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"^workers: 'multiprocessing' waits for ever .*'loky'"):
            fleet().fit(X, Y, epochs=1, workers="multiprocessing")
        with pytest.raises(ArgumentError, match=r"^time_limit: workers do not share one"):
            fleet().fit(X, Y, epochs=1, workers="loky", time_limit=3)
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(ImportError, match=r"^workers: 'dask' needs the library distributed; install it with"):
            fleet().fit(X, Y, epochs=1, workers="dask")


class TestLostWorkers:
    def numbers(self, once: Path | None, workers: str) -> list[int]:
        task = partial(trained, once=once)
        return [one.index for one in trained_elsewhere(5, task, [], workers=workers, jobs=2)]

    def test_the_models_of_a_killed_process_are_trained_again(self, tmp_path: Path) -> None:
        assert sorted(self.numbers(tmp_path / "killed", "loky")) == list(range(5))
        assert (tmp_path / "killed").exists()

    def test_a_task_that_cannot_be_sent_says_so_at_once(self, caplog: pytest.LogCaptureFixture) -> None:
        task = partial(trained, once=open)
        task.keywords["once"] = (number for number in range(3))
        with pytest.raises((TypeError, PicklingError), match="pickle"):
            list(trained_elsewhere(5, task, [], workers="loky", jobs=2))
        assert not caplog.text

    def test_a_model_that_always_kills_ends_the_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(elsewhere, "LOST", 1)
        with pytest.raises(WorkerError, match=r"^workers: workers of 'loky' were lost 2 times, with \d models left"):
            self.numbers(None, "loky")

    @pytest.mark.filterwarnings("ignore")
    def test_dask(self, tmp_path: Path) -> None:
        with dask_here():
            assert sorted(self.numbers(tmp_path / "killed", "dask")) == list(range(5))
            assert_same(fleet().fit(X, Y, **FIT, workers="dask"), fleet().fit(X, Y, **FIT))
            grid = {"alpha": [1e-4, 1e-2], "hidden_layer_sizes": [(4,), (8,)]}
            search = FleetSearchCV(MLPClassifier(max_iter=5, random_state=0), grid, cv=2)
            expected = search.fit(X, Y).cv_results_["mean_test_score"]
            with joblib.parallel_config(backend="dask"):
                np.testing.assert_array_equal(search.fit(X, Y).cv_results_["mean_test_score"], expected)

    def test_ray(self, tmp_path: Path) -> None:
        pytest.importorskip("ray")
        code = (
            "import ray, test_elsewhere as t; from pathlib import Path\n"
            "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
            "t.assert_same(t.fleet().fit(t.X, t.Y, **t.FIT, workers='ray'), t.fleet().fit(t.X, t.Y, **t.FIT))\n"
        )
        paths = [str(Path(__file__).parent), *sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)


class TestSweeps:
    SWEEP = ("sweep", "iris", "--vary", "lr=0.001:0.1:log:3", "--vary", "hidden=4,8", "--epochs", "3", "--quiet")

    def cut_off(self, folder: Path, after: int) -> None:
        """Start the sweep in a folder, and cut it off when this number of models has ended."""
        add, left = sweep.add_to_journal, [after]

        def adds(*given: Any) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            add(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep, "add_to_journal", adds)
            assert run(*self.SWEEP, "--out", folder, "--jobs", "1") == 0

    def test_a_sweep_goes_on_where_it_was_cut_off(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(*self.SWEEP, "--out", tmp_path / "whole", "--workers", "loky") == 0
        # all but one have ended, the best among them
        self.cut_off(tmp_path / "cut", 5)
        assert f"to train the others: fusemlp sweep --resume {tmp_path / 'cut'}" in capsys.readouterr().out
        assert len(rows(tmp_path / "cut" / "results.csv")) == 5
        with (tmp_path / "cut" / sweep.JOURNAL).open("a") as stream:
            # a line that was cut off
            stream.write('{"index": 5, "sta')
        with pytest.MonkeyPatch.context() as patch:
            # cut off again, before a model has ended
            patch.setattr(sweep, "add_to_journal", interrupted)
            assert run("sweep", "--resume", tmp_path / "cut", "--quiet") == 0
        assert len((tmp_path / "cut" / sweep.JOURNAL).read_text().splitlines()) == 6
        assert run("sweep", "--resume", tmp_path / "cut", "--quiet") == 0

        def told(name: str) -> list[dict[str, str]]:
            return [{**row, "seconds": ""} for row in rows(tmp_path / name / "results.csv")]

        assert told("cut") == told("whole")
        files = "checkpoints/last.safetensors", "checkpoints/best.safetensors"
        for file in files:
            paths = tmp_path / "cut" / file, tmp_path / "whole" / file
            assert [path.exists() for path in paths] in ([True] * 2, [False] * 2)
        reports = [read(tmp_path / name / "report.json") for name in ("cut", "whole")]
        assert reports[0]["test"] == reports[1]["test"] and reports[0]["epochs"] == reports[1]["epochs"]
        metrics = [
            [{**row, "seconds": ""} for row in rows(tmp_path / name / "metrics.csv")] for name in ("cut", "whole")
        ]
        assert metrics[0] == metrics[1]
        assert run("sweep", "--resume", tmp_path / "cut") == 1
        assert "holds a sweep that has ended" in capsys.readouterr().err

    def test_ctrl_c_while_the_best_is_scored(self, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep, "finish", interrupted)
            assert run(*self.SWEEP, "--out", tmp_path / "cut") == 130
        assert not (tmp_path / "cut" / "report.json").exists()
        assert run("sweep", "--resume", tmp_path / "cut", "--quiet") == 0
        assert run(*self.SWEEP, "--out", tmp_path / "whole") == 0
        tests = [read(tmp_path / name / "report.json")["test"] for name in ("cut", "whole")]
        assert tests[0] == tests[1]
        assert not (tmp_path / "cut" / sweep.JOURNAL).exists()

    def test_what_cannot_go_on_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = tmp_path / "data.csv"
        data.write_text("a,y\n" + "".join(f"{n},{n % 2}\n" for n in range(60)))
        words = ("sweep", data, "--target", "y", "--vary", "lr=0.01,0.1", "--epochs", "1", "--out", tmp_path / "cut")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep, "close_journal", lambda run: None)
            assert run(*words, "--quiet") == 0
        data.write_text(data.read_text() + "1,1\n")
        (tmp_path / "none").mkdir()
        wrong: list[tuple[Sequence[Any], int, str]] = [
            (("--resume", tmp_path / "cut"), 1, "resume: the data"),
            (("--resume", tmp_path / "cut", "--epochs", "3"), 2, "epochs: a resumed sweep keeps its own"),
            (("--resume", tmp_path / "none"), 1, "is no folder of a sweep"),
            (("iris", "--vary", "lr=0.1", "--address", "host:1"), 2, "address: only dask and ray have one"),
            (("iris", "--vary", "lr=0.1", "--workers", "spark"), 2, "workers: unknown name 'spark'"),
        ]
        for given, code, message in wrong:
            assert run("sweep", *given) == code
            assert message in capsys.readouterr().err

    def test_an_address_where_no_scheduler_is(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        distributed = pytest.importorskip("distributed")
        import dask

        with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
            given = ("--workers", "dask", "--address", "tcp://127.0.0.1:1", "--out", tmp_path / "run")
            assert run("sweep", "iris", "--vary", "lr=0.1", "--epochs", "1", *given) == 2
        assert "address: no scheduler of dask answers at 'tcp://127.0.0.1:1'" in capsys.readouterr().err
        assert not (tmp_path / "run").exists() and distributed.__name__ == "distributed"


def test_the_libraries_are_those_of_joblib() -> None:
    assert set(elsewhere.LIBRARIES) == {"dask", "ray"}
