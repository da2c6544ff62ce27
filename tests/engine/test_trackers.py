"""``MLflow`` and ``WandB`` against their own local stores: parameters, metrics, the model, and how a training ended."""

import copy
import importlib
import json
import logging
import pickle
import shutil
import signal
import struct
import sys
import time
import warnings

import numpy as np
import pytest

import fusemlp
from make import read, result_of, rows, run

RNG = np.random.default_rng(0)
X, XV = RNG.normal(size=(40, 5)), RNG.normal(size=(20, 5))
Y, YV = RNG.integers(0, 3, 40), RNG.integers(0, 3, 20)


def make(**options):
    return fusemlp.Engine(
        fusemlp.MLP([5, 8, 3], dropout=0.1),
        **{"optimizer": fusemlp.Adam(fusemlp.Cosine(0.02)), "batch_size": 16, **options},
    )


def fit(engine, *callbacks, epochs=3, **options):
    return engine.fit(X, Y, epochs=epochs, validation_data=(XV, YV), callbacks=callbacks, **options)


class Ends(fusemlp.Callback):
    """End a training in its second epoch, by an error or Ctrl-C."""

    def __init__(self, error=None):
        self.error = error

    def on_epoch_end(self, engine, epoch, logs):
        if epoch == 1 and self.error:
            raise self.error
        if epoch == 1:
            signal.raise_signal(signal.SIGINT)


# The libraries warn of what is theirs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """Return MLflow's database without a run; to make it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("mlflow", reason="mlflow is not installed")
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    # the first experiment keeps its files where the store was made
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir(path.parent)
        library.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(tmp_path, empty_store, monkeypatch):
    """MLflow with a store of its own."""
    library = importlib.import_module("mlflow")
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    library.set_tracking_uri(uri)
    yield library
    while library.active_run():
        library.end_run()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Weights & Biases without its server."""
    library = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.chdir(tmp_path)
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true"), ("DISABLE_CODE", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield library
    if library.run is not None:
        library.run.finish()
    # It reads its variables once.
    library.teardown()


def stored(mlflow, run_id):
    return mlflow.MlflowClient().get_run(run_id)


def history_of(mlflow, run_id, name):
    return [(one.step, one.value) for one in mlflow.MlflowClient().get_metric_history(run_id, name)]


def artifacts(mlflow, run_id):
    return {one.path for one in mlflow.MlflowClient().list_artifacts(run_id)}


def records(path):
    """Yield the records of an offline run of wandb: a log in the format of LevelDB after a header of seven bytes."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content = path.read_bytes()
    at, block, part = 7, 32768, b""
    while at < len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        if len(content) < at + 7:
            return
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if len(content) < at + 7 + length:
            return
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found = record()
            found.ParseFromString(part)
            yield found
            part = b""


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fusemlp.callbacks"]


class Offline:
    """An offline run of wandb after ``parts`` trainings, as it would be sent to the server."""

    def __init__(self, folder, run_id, parts=1):
        self.config, self.history, self.summary, self.artifacts, self.exit = {}, [], {}, {}, None
        deadline, found = time.monotonic() + 60, []
        # Another process writes the files, and may be at it still.
        while sum(one.WhichOneof("record_type") == "exit" for part in found for one in part) < parts:
            assert time.monotonic() < deadline, f"the run {run_id} has no end"
            time.sleep(0.05)
            paths = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
            found = [list(records(path)) for path in paths]
        for part in found:
            for record in part:
                self._take(record)

    def _take(self, record):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.name, self.project = record.run.display_name, record.run.project
        elif kind == "config":
            self.config |= {one.key: json.loads(one.value_json) for one in record.config.update}
        elif kind == "history":
            self.history.append(
                {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
            )
        elif kind == "summary":
            self.summary |= {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.summary.update}
        elif kind == "artifact":
            self.artifacts[record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
        elif kind == "exit":
            self.exit = record.exit.exit_code


class TestMLflow:
    def test_a_whole_training(self, mlflow, tmp_path):
        tracker = fusemlp.MLflow("tests", "first", params={"note": "mine", "data": {"rows": 40}}, log_model=True)
        engine = make()
        history = fit(engine, tracker)
        assert mlflow.active_run() is None
        found = stored(mlflow, tracker.run_id)
        assert found.info.run_name == "first"
        assert found.info.status == "FINISHED"
        assert found.data.tags["fusemlp.status"] == "finished"
        assert mlflow.get_experiment(found.info.experiment_id).name == "tests"
        expected = {"batch_size": "16", "seed": "0", "epochs": "3", "optimizer.kind": "adam", "optimizer.lr.lr": "0.02"}
        expected |= {"network.sizes": "[5, 8, 3]", "loss.kind": "cross_entropy", "note": "mine", "data.rows": "40"}
        assert expected.items() <= found.data.params.items()
        for name, values in history.history.items():
            assert history_of(mlflow, tracker.run_id, name) == list(zip((1, 2, 3), values, strict=True))
        assert artifacts(mlflow, tracker.run_id) == {"model.safetensors"}
        copied = mlflow.MlflowClient().download_artifacts(tracker.run_id, "model.safetensors", str(tmp_path))
        assert np.array_equal(fusemlp.load(copied).predict_proba(X), engine.predict_proba(X))

    def test_an_open_run_is_used_and_left_open(self, mlflow):
        with mlflow.start_run() as opened:
            mlflow.log_param("batch_size", "16")
            tracker = fusemlp.MLflow()
            fit(make(), tracker)
            assert mlflow.active_run().info.run_id == opened.info.run_id == tracker.run_id
            found = stored(mlflow, tracker.run_id)
            assert found.info.status == "RUNNING"
            assert len(history_of(mlflow, tracker.run_id, "loss")) == 3
            with pytest.raises(fusemlp.ArgumentError, match="experiment: a run of MLflow is open already"):
                fit(make(), fusemlp.MLflow("another"))
        assert stored(mlflow, tracker.run_id).info.status == "FINISHED"

    def test_the_first_value_of_a_parameter_is_kept(self, mlflow, caplog):
        with mlflow.start_run(), caplog.at_level(logging.WARNING, logger="fusemlp.callbacks"):
            tracker = fusemlp.MLflow()
            fit(make(), tracker)
            assert told(caplog) == []
            fit(make(seed=5), tracker)
        assert told(caplog) == ["MLflow keeps the first value of a parameter; this training changed seed"]
        assert stored(mlflow, tracker.run_id).data.params["seed"] == "0"

    def test_each_fit_has_its_run_and_an_id_continues_one(self, mlflow):
        tracker, engine = fusemlp.MLflow(), make()
        fit(engine, tracker)
        first = tracker.run_id
        fit(make(), tracker)
        assert tracker.run_id != first
        again = fusemlp.MLflow(run_id=first)
        fit(engine, again, epochs=5, resume=True)
        assert again.run_id == first
        assert [step for step, _ in history_of(mlflow, first, "loss")] == [1, 2, 3, 4, 5]

    def test_ctrl_c_kills_the_run(self, mlflow):
        tracker = fusemlp.MLflow(log_model=True)
        with pytest.raises(KeyboardInterrupt):
            fit(make(), tracker, Ends())
        found = stored(mlflow, tracker.run_id)
        assert found.info.status == "KILLED"
        assert found.data.tags["fusemlp.status"] == "interrupted"
        assert found.data.tags["fusemlp.stopped"].startswith("interrupted")
        assert artifacts(mlflow, tracker.run_id) == {"model.safetensors"}

    def test_an_error_fails_the_run(self, mlflow):
        tracker = fusemlp.MLflow(log_model=True)
        with pytest.raises(fusemlp.DivergenceError):
            fit(make(optimizer=fusemlp.SGD(1e30)), tracker)
        assert stored(mlflow, tracker.run_id).info.status == "FAILED"
        assert "NaN or infinite" in stored(mlflow, tracker.run_id).data.tags["fusemlp.stopped"]
        assert artifacts(mlflow, tracker.run_id) == set()
        with pytest.raises(ZeroDivisionError):
            fit(make(), tracker, Ends(ZeroDivisionError("mine")))
        found = stored(mlflow, tracker.run_id)
        assert found.info.status == "FAILED"
        assert found.data.tags["fusemlp.stopped"] == "mine"
        assert len(history_of(mlflow, tracker.run_id, "loss")) == 2
        assert mlflow.active_run() is None

    def test_the_model_has_the_weights_that_early_stopping_restored(self, mlflow, tmp_path):
        tracker, engine = fusemlp.MLflow(log_model=True), make(optimizer=fusemlp.Adam(0.2))
        history = fit(engine, tracker, fusemlp.EarlyStopping(patience=2, restore_best_weights=True), epochs=50)
        assert history.stopped
        assert stored(mlflow, tracker.run_id).info.status == "FINISHED"
        copied = mlflow.MlflowClient().download_artifacts(tracker.run_id, "model.safetensors", str(tmp_path))
        assert np.array_equal(fusemlp.load(copied).predict_proba(X), engine.predict_proba(X))

    def test_a_store_that_fails_warns_once_and_the_training_goes_on(self, mlflow, monkeypatch, caplog):
        def fail(*_, **__):
            raise OSError("the server\nis down")

        engine, tracker = make(), fusemlp.MLflow()
        with monkeypatch.context() as broken:
            broken.setattr(mlflow, "start_run", fail)
            with pytest.raises(fusemlp.FusemlpError, match="MLflow: no run can be opened: the server is down"):
                fit(engine, tracker)
        assert engine.epochs_trained == 0
        monkeypatch.setattr("fusemlp.callbacks.loggers.MLflow._write", fail)
        with caplog.at_level(logging.WARNING, logger="fusemlp.callbacks"):
            fit(engine, tracker)
        assert [one for one in told(caplog) if "goes on unrecorded" in one] == told(caplog)[:1]
        assert engine.epochs_trained == 3

    def test_the_command_line(self, mlflow, tmp_path, capsys):
        folder = tmp_path / "one"
        options = ["--epochs", "2", "--lr", "0.01", "--track", "mlflow", "--track-model"]
        end = result_of(capsys, "train", "iris", *options, "--out", folder)
        run_id = read(folder / "tracking.json")["mlflow"]
        assert end["tracked"] == {"tracker": "mlflow", "run_id": run_id}
        found = stored(mlflow, run_id)
        assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
        assert mlflow.get_experiment(found.info.experiment_id).name == "fusemlp"
        expected = {"data": "iris", "lr": "0.01", "scale": "robust", "epochs": "2", "backend": "numpy"}
        assert expected.items() <= found.data.params.items()
        assert not {"out", "track", "quiet", "as_json"} & found.data.params.keys()
        assert found.data.metrics["test_accuracy"] == end["test"]["accuracy"]
        losses = [float(row["loss"]) for row in rows(folder / "metrics.csv")]
        assert [value for _, value in history_of(mlflow, run_id, "loss")] == losses
        assert {"config.json", "report.html", "checkpoints"} <= artifacts(mlflow, run_id)
        # A resumed run goes on in the same place.
        assert run("train", "--resume", folder, "--epochs", "3", "--quiet") == 0
        assert [step for step, _ in history_of(mlflow, run_id, "loss")] == [1, 2, 3]
        assert stored(mlflow, run_id).info.status == "FINISHED"

    def test_an_ensemble_has_the_mean_curves(self, mlflow, tmp_path):
        folder = tmp_path / "run"
        options = ["--epochs", "3", "--models", "2", "--quiet", "--track", "mlflow"]
        assert run("train", "iris", *options, "--out", folder) == 0
        run_id = read(folder / "tracking.json")["mlflow"]
        losses = [float(row["loss"]) for row in rows(folder / "metrics.csv")]
        assert history_of(mlflow, run_id, "loss") == list(enumerate(losses, 1))

    def test_each_model_of_a_sweep_is_a_run(self, mlflow, tmp_path):
        options = ["--vary", "lr=0.01,0.1", "--epochs", "2", "--quiet", "--track", "mlflow"]
        assert run("sweep", "iris", *options, "--out", tmp_path / "best") == 0
        runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
        found = {one.info.run_name: one for one in runs}
        assert found.keys() == {"best-0", "best-1"}
        assert {one.data.params["lr"] for one in found.values()} == {"0.01", "0.1"}
        assert {one.data.params["sweep"] for one in found.values()} == {"best"}
        assert all(len(history_of(mlflow, one.info.run_id, "val_loss")) == 2 for one in found.values())


class TestWandB:
    def test_a_whole_training(self, wandb, tmp_path):
        tracker = fusemlp.WandB("tests", "first", params={"note": "mine"}, log_model=True)
        history = fit(make(), tracker)
        assert wandb.run is None
        found = Offline(tmp_path, tracker.run_id)
        assert (found.project, found.name, found.exit) == ("tests", "first", 0)
        expected = {"batch_size": 16, "optimizer.lr.lr": 0.02, "network.sizes": [5, 8, 3], "note": "mine"}
        assert expected.items() <= found.config.items()
        for name, values in history.history.items():
            assert [row[name] for row in found.history] == pytest.approx(values, rel=1e-12)
        assert [row["epoch"] for row in found.history] == [1, 2, 3]
        assert found.artifacts == {f"model-{tracker.run_id}": ["model.safetensors"]}
        assert found.summary["status"] == "finished"

    def test_an_open_run_is_used_and_left_open(self, wandb, tmp_path):
        opened = wandb.init(project="mine")
        opened.log({"own": 1.0}, step=100)
        tracker = fusemlp.WandB()
        fit(make(), tracker)
        assert wandb.run is opened
        assert tracker.run_id == opened.id
        with pytest.raises(fusemlp.ArgumentError, match="project: a run of Weights & Biases is open already"):
            fit(make(), fusemlp.WandB("another"))
        opened.finish()
        found = Offline(tmp_path, tracker.run_id)
        # Steps of the user's that ran ahead lose no epoch.
        assert [row["epoch"] for row in found.history if "epoch" in row] == [1, 2, 3]
        assert found.exit == 0

    def test_how_a_training_ended(self, wandb, tmp_path):
        tracker = fusemlp.WandB()
        with pytest.raises(KeyboardInterrupt):
            fit(make(), tracker, Ends())
        found = Offline(tmp_path, tracker.run_id)
        assert (found.exit, found.summary.get("status")) == (130, "interrupted")
        with pytest.raises(fusemlp.DivergenceError):
            fit(make(optimizer=fusemlp.SGD(1e30)), tracker)
        found = Offline(tmp_path, tracker.run_id)
        assert (found.exit, found.summary["status"]) == (1, "failed")
        assert "NaN or infinite" in found.summary["stopped"]

    def test_the_command_line(self, wandb, tmp_path, capsys):
        folder = tmp_path / "one"
        assert run("train", "iris", "--epochs", "2", "--track", "wandb", "--json", "--out", folder) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["event"] for line in lines] == ["start", "epoch", "epoch", "end"]
        run_id = read(folder / "tracking.json")["wandb"]
        found = Offline(tmp_path, run_id)
        assert (found.project, found.name, found.exit) == ("fusemlp", "one", 0)
        assert found.config["data"] == "iris"
        assert found.summary["test_accuracy"] == pytest.approx(lines[-1]["test"]["accuracy"])
        # The second is part of the name of an offline folder.
        time.sleep(1.1)
        assert run("train", "--resume", folder, "--epochs", "3", "--quiet") == 0
        again = Offline(tmp_path, run_id, parts=2)
        assert [row["epoch"] for row in again.history] == [1, 2, 3]
        assert again.exit == 0


@pytest.mark.parametrize("tracker", [fusemlp.MLflow, fusemlp.WandB])
def test_without_the_library_nothing_has_begun(tracker, monkeypatch, tmp_path):
    library = tracker.library
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    engine = make()
    said = rf"the library {library}: pip install \"fusemlp\[{library}\]\""
    with pytest.raises(fusemlp.MissingLibraryError, match=said):
        fit(engine, tracker())
    assert engine.update_count == 0
    assert run("train", "iris", "--track", library, "--out", tmp_path / "run") == 1
    assert run("sweep", "iris", "--vary", "seed=0:2", "--track", library, "--out", tmp_path / "run") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tracker", [fusemlp.MLflow, fusemlp.WandB])
def test_copies_work_as_scikit_learn_makes_them(tracker):
    made = tracker("place", "name", params={"a": 1}, log_model=True)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert vars(copied) == vars(made)


@pytest.mark.parametrize("kind", [fusemlp.callbacks.MLflow, fusemlp.callbacks.WandB])
def test_pickles_of_earlier_releases_find_their_tracker(kind):
    """They name its module of then; the protocol 0 holds the name as a line."""
    before = pickle.dumps(kind(), 0).replace(b"fusemlp.callbacks.loggers", b"fusemlp.callbacks.trackers")
    assert b"trackers" in before and type(pickle.loads(before)) is kind
