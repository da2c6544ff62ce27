"""Callbacks that write the logs elsewhere: ``CSVLogger``, ``TensorBoard``, and the trackers ``MLflow`` and ``WandB``.

A tracker works as a callback of ``fit``, or is driven by hand: ``open``, ``log``, ``summary``, ``upload``, ``close``.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusemlp.callbacks.forms import Watching, log
from fusemlp.describe.checks import as_path, check_flag, no_folder
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, FusemlpError, MissingLibraryError

FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"
# Seconds between two writes to MLflow, each of which takes some milliseconds.
WRITE = 1.0


def _check_library(user: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise MissingLibraryError(f'{user}: it needs the library {library}: pip install "fusemlp[{library}]"')


class CSVLogger(Watching):
    """Write a row of the logs after each epoch: the epoch, from 0 as in Keras, and the figures of the history.

    Each ``fit`` starts a new file, unless ``append`` continues one with the same columns. Numbers that other callbacks
    add to the logs get columns of their own; cells of epochs without them are empty.
    """

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        if not isinstance(separator, str) or len(separator) != 1 or separator in '"\r\n':
            raise ArgumentError(f"separator: expected one character such as ',', got {separator!r}")
        self.filename = as_path("filename", filename)
        self.separator = separator
        self.append = check_flag("append", append)
        self.columns: list[str] = []

    def check_logs(self, names: Sequence[str]) -> None:
        path = Path(self.filename)
        if path.exists() and not path.is_file():
            raise ArgumentError(f"filename: {self.filename!r} is no file; expected a file, there already or new")
        if not path.parent.is_dir():
            raise no_folder("filename", path.parent)
        self.columns = ["epoch", *names]
        if self._continues():
            with path.open(encoding="utf-8", newline="") as stream:
                header = next(csv.reader(stream, delimiter=self.separator))
            if header[: len(self.columns)] != self.columns:
                raise ArgumentError(
                    f"append: {self.filename!r} has the columns {', '.join(header)}, and this fit logs "
                    f"{', '.join(self.columns)}; give another filename"
                )
            self.columns = header

    def _continues(self) -> bool:
        path = Path(self.filename)
        return self.append and path.exists() and path.stat().st_size > 0

    def on_train_begin(self, logs: Any = None) -> None:
        if not self._continues():
            self._write([self.columns], "w")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        new = [name for name in logs if name not in self.columns]
        if new:
            with open(self.filename, encoding="utf-8", newline="") as stream:
                _, *rows = csv.reader(stream, delimiter=self.separator)
            self.columns = [*self.columns, *new]
            self._write([self.columns, *([*row, *[""] * len(new)] for row in rows)], "w")
        cells = (repr(float(logs[name])) if name in logs else "" for name in self.columns[1:])
        self._write([[epoch, *cells]], "a")

    def _write(self, rows: Sequence[Sequence[Any]], mode: str) -> None:
        with open(self.filename, mode, encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter=self.separator, lineterminator="\n").writerows(rows)


class TensorBoard(Watching):
    """Write the logs of each epoch for ``tensorboard --logdir LOG_DIR``; needs the extra ``tensorboard``.

    As in Keras, the run ``train`` has ``epoch_loss``, ``epoch_accuracy`` and ``epoch_learning_rate``, and the run
    ``validation`` the validation figures by the same names; the step is the epoch, from 0.
    """

    def __init__(self, log_dir: str | os.PathLike[str] = "logs") -> None:
        self.log_dir = as_path("log_dir", log_dir, "folder")
        self._writers: dict[str, Any] = {}

    def check_logs(self, names: Sequence[str]) -> None:
        _check_library("TensorBoard", "tensorboard")
        if Path(self.log_dir).exists() and not Path(self.log_dir).is_dir():
            raise ArgumentError(f"log_dir: {self.log_dir!r} is a file; expected a folder, there already or new")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        parts: dict[str, list[Any]] = {"train": [], "validation": []}
        for name, value in logs.items():
            part, tag = ("validation", name.removeprefix("val_")) if name.startswith("val_") else ("train", name)
            parts[part].append(Summary.Value(tag=f"epoch_{tag}", simple_value=value))
        for part, values in parts.items():
            if values and part not in self._writers:
                self._writers[part] = EventFileWriter(str(Path(self.log_dir, part)))
            if values:
                self._writers[part].add_event(Event(step=epoch, wall_time=time.time(), summary=Summary(value=values)))
                self._writers[part].flush()

    def on_exit(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class Tracker(Watching):
    """The base of the trackers.

    A training has one run: its parameters are the configuration and ``params``, its metrics the logs of each epoch, and
    the step is the epoch, from 1. ``log_model`` adds the final model as the artifact model.safetensors, which
    ``fusemlp.load`` reads. A run that is open already is used, and left open. Else a run is opened, by ``run_name``, or
    the one with ``run_id`` is continued, and closed as finished, interrupted (Ctrl-C) or failed; ``run_id`` is its id.

    A tracker that fails during a training gets one warning, and the training goes on without it.
    """

    # ``place`` is the argument that says where runs belong
    library: str
    title: str
    place: str
    # the calls of each library
    _active: Callable[[], Any]
    _start: Callable[[], Any]
    _id: Callable[[], str]
    _log_params: Callable[[Mapping[str, Any]], None]
    _log_metrics: Callable[[Mapping[str, float], int], None]
    _log_summary: Callable[[Mapping[str, Any]], None]
    _upload: Callable[[Path], None]
    _mark: Callable[[str, str], None]
    _end: Callable[[str], None]

    def __init__(
        self,
        where: str | None,
        run_name: str | None = None,
        run_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        log_model: bool = False,
    ) -> None:
        names = {self.place: where, "run_name": run_name, "run_id": run_id}
        for argument, name in names.items():
            if name is not None and (not isinstance(name, str) or not name.strip()):
                raise ArgumentTypeError(f"{argument}: expected a name, got {name!r}")
        if not isinstance(params, Mapping | None):
            raise ArgumentTypeError(f"params: expected a dictionary of names and values, got {params!r}")
        self._names = {argument: name for argument, name in names.items() if name is not None}
        self.run_id = run_id
        self.params = dict(params or {})
        self.log_model = check_flag("log_model", log_model)
        self._run: Any = None
        self._joined = self._ours = self._silent = False
        self._ended = ""
        self._epochs: int | None = None

    def set_params(self, params: dict[str, Any]) -> None:
        self._epochs = params["epochs"]

    def check_logs(self, names: Sequence[str]) -> None:
        _check_library(type(self).__name__, self.library)
        if self._run is None and self._names and self._active() is not None:
            argument = next(iter(self._names))
            raise ArgumentError(
                f"{argument}: a run of {self.title} is open already, and is used; end it first, or give no {argument}"
            )

    def on_train_begin(self, logs: Any = None) -> None:
        self._ours, self._ended = self._run is None, ""
        params = {**configured(self.model, self._epochs), **self.params}
        if self._ours:
            self.open(params)
        else:
            self._try(self._log_params, flat(params))

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.log({**logs, "epoch": epoch + 1})

    def on_train_end(self, logs: Any = None) -> None:
        stopped = "" if self.model.history is None else self.model.history.stopped
        self._ended = INTERRUPTED if stopped.startswith("interrupted") else FINISHED

    def on_exit(self) -> None:
        if self._run is None or not self._ours:
            return
        reason = "" if self.model.history is None else self.model.history.stopped
        if not self._ended:
            error = sys.exception()
            self._ended = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            reason = reason or str(error or "")
        if self.log_model and self._ended != FAILED:
            self._try(self._log_model)
        self.close(self._ended, reason)

    def open(self, params: Mapping[str, Any]) -> None:
        """Open the run, or join the open one, and log ``params``; FusemlpError if the tracker fails."""
        self._silent = False
        try:
            self._run = self._active()
            self._joined = self._run is not None
            if not self._joined:
                self._run = self._start()
            self.run_id = self._id()
            self._log_params(flat(params))
        except Exception as error:
            if self._run is not None and not self._joined:
                self._try(self._end, FAILED)
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FusemlpError(f"{type(self).__name__}: no run can be opened: {reason}") from error

    def log(self, row: Mapping[str, float]) -> None:
        """Log the metrics of an epoch, and under ``epoch`` its number from 1."""
        figures = {name: float(value) for name, value in row.items() if name != "epoch"}
        self._try(self._log_metrics, figures, int(row["epoch"]))

    def summary(self, figures: Mapping[str, float]) -> None:
        """Log figures of the whole training, such as test scores."""
        self._try(self._log_summary, figures)

    def upload(self, path: Path) -> None:
        """Store a file, or the content of a folder, as an artifact of the run."""
        self._try(self._upload, path)

    def close(self, status: str, reason: str = "") -> None:
        """Mark the run as finished, interrupted or failed, and end it unless it was open before."""
        self._try(self._mark, status, reason or status)
        if not self._joined:
            self._try(self._end, status)
        self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close the run as failed, or interrupted, if an error ends the block."""
        if error is not None:
            self.close(INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED, str(error))

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._run is None or self._silent:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._silent = action != self._end
            message = "%s: the training goes on unrecorded, since %s failed: %s"
            log.warning(message, type(self).__name__, self.title, error)

    def _log_model(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            self.model.save(path)
            self._upload(path)


class MLflow(Tracker):
    """Record a training with MLflow; needs the extra ``mlflow``.

    The run is in ``experiment``, which is made if it is new. The server is the one of MLflow's own settings:
    ``mlflow.set_tracking_uri`` or MLFLOW_TRACKING_URI. An interrupted run has the status KILLED, a failed one FAILED;
    the tags ``fusemlp.status`` and ``fusemlp.stopped`` say why.
    """

    library, title, place = "mlflow", "MLflow", "experiment"

    def __init__(self, experiment: str | None = None, run_name: str | None = None, **options: Any) -> None:
        super().__init__(experiment, run_name, **options)
        self._rows: list[tuple[str, float, int, int]] = []
        self._written = 0.0

    def _active(self) -> Any:
        return importlib.import_module("mlflow").active_run()

    @property
    def _client(self) -> Any:
        return importlib.import_module("mlflow").MlflowClient()

    def _start(self) -> Any:
        import mlflow

        self._rows.clear()
        if "run_id" in self._names:
            return mlflow.start_run(run_id=self._names["run_id"])
        place = None
        if "experiment" in self._names:
            known = mlflow.get_experiment_by_name(self._names["experiment"])
            place = mlflow.create_experiment(self._names["experiment"]) if known is None else known.experiment_id
        return mlflow.start_run(experiment_id=place, run_name=self._names.get("run_name"))

    def _id(self) -> str:
        return str(self._run.info.run_id)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        known = self._client.get_run(self.run_id).data.params
        texts = {name: str(value)[:MAX_PARAM_VAL_LENGTH] for name, value in params.items()}
        new = [Param(name, text) for name, text in texts.items() if name not in known]
        self._client.log_batch(self.run_id, params=new)
        changed = [name for name, text in texts.items() if known.get(name, text) != text]
        if changed:
            log.warning("MLflow keeps the first value of a parameter; this training changed %s", ", ".join(changed))

    def _log_metrics(self, figures: Mapping[str, float], epoch: int) -> None:
        now = time.time()
        self._rows += [(name, value, int(1000 * now), epoch) for name, value in figures.items()]
        if now - self._written >= WRITE or now < self._written:
            self._write()

    def _log_summary(self, figures: Mapping[str, float]) -> None:
        self._log_metrics(figures, 0)
        self._write()

    def _write(self) -> None:
        from mlflow.entities import Metric

        rows, self._rows = self._rows, []
        self._client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows])
        self._written = time.time()

    def _upload(self, path: Path) -> None:
        store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        store(self.run_id, str(path))

    def _mark(self, status: str, reason: str) -> None:
        self._write()
        self._client.set_tag(self.run_id, "fusemlp.status", status)
        self._client.set_tag(self.run_id, "fusemlp.stopped", reason)

    def _end(self, status: str) -> None:
        statuses = {FINISHED: "FINISHED", INTERRUPTED: "KILLED", FAILED: "FAILED"}
        importlib.import_module("mlflow").end_run(statuses[status])


class WandB(Tracker):
    """Record a training with Weights & Biases; needs the extra ``wandb``.

    The run is in ``project``. Everything else is as the variables of wandb say: WANDB_ENTITY, WANDB_MODE=offline. An
    interrupted run has the exit code 130, a failed one 1; ``status`` and ``stopped`` of its summary say why.
    """

    library, title, place = "wandb", "Weights & Biases", "project"

    def __init__(self, project: str | None = None, run_name: str | None = None, **options: Any) -> None:
        super().__init__(project, run_name, **options)

    def _active(self) -> Any:
        return importlib.import_module("wandb").run

    def _start(self) -> Any:
        project, name, run_id = map(self._names.get, ("project", "run_name", "run_id"))
        again: dict[str, Any] = {} if run_id is None else {"id": run_id, "resume": "allow"}
        run = importlib.import_module("wandb").init(project=project, name=name, **again)
        run.define_metric("epoch", hidden=True)
        run.define_metric("*", step_metric="epoch")
        return run

    def _id(self) -> str:
        return str(self._run.id)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        self._run.config.update(dict(params), allow_val_change=True)

    def _log_metrics(self, figures: Mapping[str, float], epoch: int) -> None:
        # A step of its own would clash with the steps of what the user logs into the same run.
        self._run.log({**figures, "epoch": epoch})

    def _log_summary(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(figures))

    def _upload(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{'run' if path.is_dir() else 'model'}-{self.run_id}", type="model")
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(os.fspath(path))
        self._run.log_artifact(artifact)

    def _mark(self, status: str, reason: str) -> None:
        self._log_summary({"status": status, "stopped": reason})

    def _end(self, status: str) -> None:
        self._run.finish(exit_code={FINISHED: 0, INTERRUPTED: 130, FAILED: 1}[status])


TRACKERS: dict[str, type[MLflow] | type[WandB]] = {"mlflow": MLflow, "wandb": WandB}


def configured(engine: Any, epochs: int | None) -> dict[str, Any]:
    """Return the configuration of an engine that trains for ``epochs`` epochs."""
    descriptions = {name: getattr(engine, name).to_config() for name in ("network", "loss", "optimizer")}
    rest = ("batch_size", "seed", "backend", "device", "precision", "plan")
    count = {"parameters": engine.network.parameter_count}
    return {**descriptions, **{name: getattr(engine, name) for name in rest}, "epochs": epochs, **count}


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters with names such as ``optimizer.lr``, without those that are None."""
    entries: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            entries |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            entries[f"{prefix}{name}"] = value
    return entries
