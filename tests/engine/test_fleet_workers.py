"""Fleets and sweeps whose models train in other processes, and go on where they were cut off."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from pickle import PicklingError

import joblib
import numpy as np
import pytest
from lost_worker import killed_at_2

from fusemlp import MLP, ArgumentError, ArgumentTypeError, Fleet, WorkerError
from fusemlp.cli import sweep, vary
from fusemlp.fleet import workers
from fusemlp.fleet.workers import trained_elsewhere
from fusemlp.sklearn import FleetSearchCV, MLPClassifier
from make import assert_same, read, refusal, rows, run

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(300, 6)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64)
FIT = {"epochs": 3, "validation_data": (X[:50], Y[:50]), "metrics": ["auc"], "early_stopping": 2}


def fleet(**options):
    return Fleet(MLP([6, 8, 2]), vary={"lr": [0.001, 0.01], "hidden": [4, 8], "seed": range(2)}, **options)


def assert_same_models(found, expected):
    assert [one.index for one in found.members] == list(range(len(expected.members)))
    for one, other in zip(found.members, expected.members, strict=True):
        for name in ("parameters", "scores", "status", "reason"):
            assert getattr(one, name) == getattr(other, name)
        assert_same(one.engine.state_dict(), other.engine.state_dict())


class TestFleets:
    def test_other_processes_train_the_same_models(self):
        expected, other, seen = fleet(normalise=True).fit(X, Y, **FIT), fleet(normalise=True), []
        found = other.fit(X, Y, **FIT, workers="loky", jobs=2, callback=lambda one: seen.append(one.index))
        assert_same_models(found, expected)
        assert sorted(seen) == list(range(8))
        assert other.predict(X).mean.shape == (300, 2)
        with pytest.raises(ArgumentError, match=r"^fit: the models were trained in parts"):
            other.fit(X, Y, epochs=1)

    def test_each_model_has_its_rows_and_its_start(self):
        own = [np.arange(start, 300, 2) for start in (0, 1)] * 4
        fit = {"epochs": 2, "rows": own, "validation_rows": own[::-1]}
        start = [{"0.bias": np.full(width, 0.1)} for width in (4, 4, 8, 8, 4, 4, 8, 8)]
        expected = fleet(initial=start).fit(X, Y, **fit)
        assert_same_models(fleet(initial=start).fit(X, Y, **fit, workers="loky", jobs=2), expected)

    @pytest.mark.parametrize("workers", ["threading", "loky"])
    def test_an_error_of_a_callback_ends_the_training(self, workers):
        def fails(one):
            raise RuntimeError("mine")

        whole = fleet()
        with pytest.raises(RuntimeError, match=r"^mine$"):
            whole.fit(X, Y, epochs=1, workers=workers, jobs=2, callback=fails)
        assert whole.results is None

    def test_a_fleet_of_a_part_has_its_models(self):
        whole, part = fleet().fit(X, Y, epochs=1), fleet().part([6, 1]).fit(X, Y, epochs=1)
        for one, number in zip(part.members, (6, 1), strict=True):
            assert_same(one.engine.predict_proba(X), whole.engine(number).predict_proba(X))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"workers": "lokey"}, ArgumentError, "workers: unknown name 'lokey'; did you mean 'loky'"),
            ({"workers": 4}, ArgumentTypeError, "workers: expected the name of a backend of joblib"),
            ({"workers": "multiprocessing"}, ArgumentError, "workers: 'multiprocessing' waits for ever .*'loky'"),
            ({"workers": "loky", "time_limit": 3}, ArgumentError, "time_limit: workers do not share one"),
            ({"workers": "dask"}, ImportError, "workers: 'dask' needs the library distributed; install it with"),
        ],
    )
    def test_wrong_workers_are_refused(self, options, error, message, monkeypatch):
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(error, match=f"^{message}"):
            fleet().fit(X, Y, epochs=1, **options)


class TestLostWorkers:
    def numbers(self, once, workers):
        task = partial(killed_at_2, once=once)
        return [one.index for one in trained_elsewhere(5, task, [], workers=workers, jobs=2)]

    def test_the_models_of_a_killed_process_are_trained_again(self, tmp_path):
        assert sorted(self.numbers(tmp_path / "killed", "loky")) == list(range(5))
        assert (tmp_path / "killed").exists()

    def test_a_task_that_cannot_be_sent_says_so_at_once(self, caplog):
        with pytest.raises((TypeError, PicklingError), match="pickle"):
            self.numbers((number for number in range(3)), "loky")
        assert not caplog.text

    def test_a_model_that_always_kills_ends_the_training(self, monkeypatch):
        monkeypatch.setattr(workers, "LOST", 1)
        with pytest.raises(WorkerError, match=r"^workers: workers of 'loky' were lost 2 times, with \d models left"):
            self.numbers(None, "loky")

    @pytest.mark.filterwarnings("ignore")
    def test_dask(self, tmp_path):
        distributed = pytest.importorskip("distributed")
        with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
            assert sorted(self.numbers(tmp_path / "killed", "dask")) == list(range(5))
            assert_same_models(fleet().fit(X, Y, **FIT, workers="dask"), fleet().fit(X, Y, **FIT))
            grid = {"alpha": [1e-4, 1e-2], "hidden_layer_sizes": [(4,), (8,)]}
            search = FleetSearchCV(MLPClassifier(max_iter=5, random_state=0), grid, cv=2)
            expected = search.fit(X, Y).cv_results_["mean_test_score"]
            with joblib.parallel_config(backend="dask"):
                np.testing.assert_array_equal(search.fit(X, Y).cv_results_["mean_test_score"], expected)

    def test_ray(self):
        pytest.importorskip("ray")
        code = (
            "import ray, test_fleet_workers as t\n"
            "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
            "t.assert_same_models(t.fleet().fit(t.X, t.Y, **t.FIT, workers='ray'), t.fleet().fit(t.X, t.Y, **t.FIT))\n"
        )
        paths = [str(Path(__file__).parent), *sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)

    def test_the_libraries_are_those_of_joblib(self):
        assert set(workers.LIBRARIES) == {"dask", "ray"}


def interrupted(*_, **__):
    raise KeyboardInterrupt


def keep_journals(patch):
    """Leave the journal of a sweep that ends, as one that is killed would."""
    unlink = Path.unlink
    patch.setattr(
        Path, "unlink", lambda path, **options: None if path.name == sweep.JOURNAL else unlink(path, **options)
    )


class TestSweeps:
    SWEEP = ("sweep", "iris", "--vary", "lr=0.001:0.1:log:3", "--vary", "hidden=4,8", "--epochs", "3", "--quiet")

    def cut_off(self, folder, after):
        """Start the sweep in a folder, and cut it off when this number of models has ended."""
        add, left = vary.add_to_journal, [after]

        def adds(*arguments):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            add(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vary, "add_to_journal", adds)
            assert run(*self.SWEEP, "--out", folder, "--jobs", "1") == 0

    def test_a_sweep_goes_on_where_it_was_cut_off(self, tmp_path, capsys):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert run(*self.SWEEP, "--out", whole, "--workers", "loky") == 0
        # all but one have ended, the best among them
        self.cut_off(cut, 5)
        assert f"to train the others: fusemlp sweep --resume {cut}" in capsys.readouterr().out
        assert len(rows(cut / "results.csv")) == 5
        with (cut / sweep.JOURNAL).open("a") as stream:
            # a line that was cut off
            stream.write('{"index": 5, "sta')
        with pytest.MonkeyPatch.context() as patch:
            # cut off again, before a model has ended
            patch.setattr(vary, "add_to_journal", interrupted)
            assert run("sweep", "--resume", cut, "--quiet") == 0
        assert len((cut / sweep.JOURNAL).read_text().splitlines()) == 6
        assert run("sweep", "--resume", cut, "--quiet") == 0
        for name in ("results.csv", "metrics.csv"):
            tables = [[{**row, "seconds": ""} for row in rows(folder / name)] for folder in (cut, whole)]
            assert tables[0] == tables[1]
        for name in ("checkpoints/last.safetensors", "checkpoints/best.safetensors"):
            assert (cut / name).exists() == (whole / name).exists()
        reports = [read(folder / "report.json") for folder in (cut, whole)]
        assert reports[0]["test"] == reports[1]["test"] and reports[0]["epochs"] == reports[1]["epochs"]
        assert "holds a sweep that has ended" in refusal(capsys, "sweep", "--resume", cut, code=1)

    def test_ctrl_c_while_the_best_is_scored(self, tmp_path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep, "finish", interrupted)
            assert run(*self.SWEEP, "--out", tmp_path / "cut") == 130
        assert not (tmp_path / "cut" / "report.json").exists()
        assert run("sweep", "--resume", tmp_path / "cut", "--quiet") == 0
        assert run(*self.SWEEP, "--out", tmp_path / "whole") == 0
        tests = [read(tmp_path / name / "report.json")["test"] for name in ("cut", "whole")]
        assert tests[0] == tests[1]
        assert not (tmp_path / "cut" / sweep.JOURNAL).exists()

    def test_what_cannot_go_on_is_refused(self, tmp_path, capsys):
        data = tmp_path / "data.csv"
        data.write_text("a,y\n" + "".join(f"{n},{n % 2}\n" for n in range(60)))
        words = ("sweep", data, "--target", "y", "--vary", "lr=0.01,0.1", "--epochs", "1", "--out", tmp_path / "cut")
        with pytest.MonkeyPatch.context() as patch:
            keep_journals(patch)
            assert run(*words, "--quiet") == 0
        data.write_text(data.read_text() + "1,1\n")
        (tmp_path / "none").mkdir()
        for options, code, message in (
            (("--resume", tmp_path / "cut"), 1, "resume: the data"),
            (("--resume", tmp_path / "cut", "--epochs", "3"), 2, "epochs: a resumed sweep keeps its own"),
            (("--resume", tmp_path / "none"), 1, "is no folder of a sweep"),
            (("iris", "--vary", "lr=0.1", "--address", "host:1"), 2, "address: only dask and ray have one"),
            (("iris", "--vary", "lr=0.1", "--workers", "spark"), 2, "workers: unknown name 'spark'"),
        ):
            assert run("sweep", *options) == code
            assert message in capsys.readouterr().err

    def test_an_address_where_no_scheduler_is(self, tmp_path, capsys):
        pytest.importorskip("distributed")
        import dask

        with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
            address = ("--workers", "dask", "--address", "tcp://127.0.0.1:1", "--out", tmp_path / "run")
            assert run("sweep", "iris", "--vary", "lr=0.1", "--epochs", "1", *address) == 2
        assert "address: no scheduler of dask answers at 'tcp://127.0.0.1:1'" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_cards_of_earlier_releases(self, tmp_path, capsys):
        with pytest.raises(ArgumentTypeError, match=r"^devices: it is gone: start a process a card"):
            fleet(devices=["cuda:0"])
        assert "--devices: it is gone: start a sweep" in refusal(capsys, *self.SWEEP, "--devices", "cuda:0,cuda:1")
        # a journal that has them goes on
        self.cut_off(tmp_path / "cut", 5)
        journal = tmp_path / "cut" / sweep.JOURNAL
        first, *others = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join([first.replace('"jobs": ', '"devices": "cuda:0", "jobs": ', 1), *others]))
        assert '"devices"' in journal.read_text() and run("sweep", "--resume", tmp_path / "cut", "--quiet") == 0
