"""The engine, what users call: it trains, predicts, saves; and the way back from its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.adversarial import IBP, Attack, as_attack
from fusemlp.describe.checks import as_count, bytes_text, knows_names, names_absent
from fusemlp.describe.losses import LossLike
from fusemlp.describe.metrics import MetricLike
from fusemlp.describe.network import MLP, as_network, layer_lines
from fusemlp.describe.optimizers import Optimizer, as_optimizer
from fusemlp.inputs.arrays import Array
from fusemlp.program.passes import passes_against
from fusemlp.program.program import ORDERED, Program
from fusemlp.report.diagnosis import Finding
from fusemlp.report.onnx import to_onnx
from fusemlp.report.runs import open_run, weights_path
from fusemlp.runtime import attacks, files
from fusemlp.runtime.attacks import attack
from fusemlp.runtime.plans import LOOPED, availability
from fusemlp.runtime.ranks import TIMEOUT
from fusemlp.runtime.scaling import MEAN, InputScale
from fusemlp.runtime.session import ELSEWHERE, Session
from fusemlp.runtime.steps import program_of_fit, step
from fusemlp.training import checkpoint, transfer
from fusemlp.training.checkpoint import save, save_checkpoint
from fusemlp.training.fit import ELSEWHERE as OF_FIT
from fusemlp.training.fit import fit
from fusemlp.training.lr_finder import LearningRateSweep, lr_find
from fusemlp.training.trainer import FitPlan, History, Trainer
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, CheckpointError

__all__ = ["Engine", "availability", "load", "load_checkpoint"]


# Methods and attributes of Keras's models, and their names here.
KERAS = {
    "compile": "loss and optimizer are given when it is made: Engine(net, loss='mse', optimizer=Adam(lr=0.001)); "
    "metrics go to fit",
    "fit_generator": "fit takes generators: engine.fit(batches, steps_per_epoch=100, epochs=20)",
    "train_on_batch": "it is called step here: loss = engine.step(x, y)",
    "test_on_batch": "use evaluate",
    "predict_on_batch": "use predict",
    "predict_classes": "predict returns classes, predict_proba probabilities",
    "save_weights": "use engine.save(path), or state_dict()",
    "load_weights": "use fusemlp.load(path), or load_state_dict",
    "get_weights": "it is called state_dict here: a mapping from names such as '0.weight' to arrays",
    "set_weights": "it is called load_state_dict here",
    "layers": "engine.network has sizes, activations and dropouts; summary() prints the layers",
    "lr": "it is called learning_rate here; callbacks change it by engine.set_learning_rate(0.001)",
    **dict.fromkeys(("trainable", "freeze"), "give Adam(per_parameter={'0.*': ParameterOptions(trainable=False)})"),
    "count_params": "it is engine.network.parameter_count",
    "metrics_names": "evaluate and history.history have the names as keys",
    **dict.fromkeys(("to", "cuda", "cpu"), "the device is chosen when it is made: Engine(net, device='cuda:0')"),
    **dict.fromkeys(("train", "eval"), "fit and step train, predict and evaluate do not; call these"),
    "parameters": "state_dict() has them by name; the optimizer is given when it is made",
    "to_json": "engine.network.to_config() is JSON-able; save writes the whole model",
}

# Arguments of Keras's methods. Rows go through in blocks whose size is chosen by itself, and nothing is printed.
knows_names_of_predict = partial(
    knows_names,
    {
        "x": "it is called X here",
        "callbacks": "callbacks are for fit; leave it out",
        "return_dict": "evaluate returns a mapping; leave it out",
    },
    unused=("batch_size", "verbose"),
)

# Arguments that from_pretrained hands on to the engine.
_HANDED_ON = (
    *("batch_size", "seed", "backend", "device", "precision", "plan", "normalise"),
    *("distributed", "reduce", "timeout"),
)


class Engine(Trainer):
    """Trains ``net`` and predicts with it; owns the parameters, on the device.

    ``loss`` and ``optimizer`` are names or objects (``fusemlp.losses``, ``fusemlp.optimizers``). On the NumPy backend
    ``loss`` may be a function of your own too: ``f(outputs, targets) -> (loss, gradient)``, or with a parameter
    ``weights``; ``fusemlp.losses.OwnLoss`` says what it gets and returns. An error in it leaves the engine as it was
    before the step. ``batch_size`` is the number of rows of an update. ``seed`` decides the initial parameters, the
    order of the rows and the dropout masks: with the same seed, machine and versions a run repeats bit for bit.
    ``backend`` is "auto" (the first of triton, cupy, numpy that works) or a name; ``device`` the backend's device;
    ``precision`` "fp32"; "fp64" on NumPy; "bf16" on a GPU and on processors with AMX; "tf32" or "fp16" (with dynamic
    loss scaling) on a GPU; ``plan`` "auto", "eager", "graph", "narrow", "card", "chip" or "resident". The attributes
    ``backend``, ``plan`` and ``plan_reason`` hold the choice; with the last three ``fit`` runs many steps in one call,
    and ``step`` is eager.
    ``print(engine.program)`` shows the kernel calls of a step.

    ``normalise=True`` subtracts from each column of the inputs its mean in the first ``fit``, and divides by its
    standard deviation there, in training and prediction alike; ``normalise=X`` measures the rows X (n, K) at once. The
    numbers stay when the engine is fitted again, and are part of its ``state_dict`` and files. None, the default,
    scales nothing, and training warns (InputScaleWarning) of inputs far from unit scale; False does not warn.

    ``privacy``, a ``DPSGD``, trains with differential privacy; ``privacy_spent()`` returns its epsilon.

    ``distributed=True``, in processes that torchrun has started: they train one model together, on CPUs with the NumPy
    backend, or with Triton, each on the card of its ``LOCAL_RANK``. All are given all rows, or the same batches;
    ``batch_size`` is that of all together. With ``reduce="ordered"`` 1, 2, 4 and 8 processes give the same bits;
    "fast" adds in any order, on any number. Rank 0 alone writes files. A process that ends or is silent for ``timeout``
    seconds ends the others (DistributedError). A copy of such an engine trains alone.

    Raises ArgumentError or ArgumentTypeError for impossible values, BackendUnavailableError for what this machine
    does not have.
    """

    @property
    def input_scale(self) -> InputScale | None:
        """Mean and scale of the columns of the inputs; None if they are not measured, or not wanted."""
        return self.scaling.scale

    @knows_names(OF_FIT, call="fit(X, y, epochs=20)")
    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        epochs: int,
        batch_size: int | None = None,
        sample_weight: Any = None,
        class_weight: Any = None,
        validation_data: Any = None,
        validation_split: float = 0.0,
        validation_steps: int | None = None,
        steps_per_epoch: int | None = None,
        metrics: Iterable[MetricLike] | None = (),
        early_stopping: int | str | None = None,
        monitor: str | None = None,
        callbacks: Iterable[Any] | None = (),
        verbose: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        row_order: Callable[[int], Any] | None = None,
        resume: bool = False,
        time_limit: float | None = None,
        adversarial: Attack | IBP | None = None,
        loss: LossLike | None = None,
    ) -> History:
        """Train on X (n, K) and y for ``epochs`` passes, or on batches.

        y: (n,) class indices or (n, N) probabilities for cross_entropy, (n, N) from 0 to 1 for binary_cross_entropy,
        (n, ...) for a function of your own, (n, N) values for the others; (n,) stands for (n, 1). sample_weight: (n,),
        at least 0. Arrays may be in host memory or on the engine's device (torch tensors, CuPy arrays, all with
        ``__dlpack__`` or ``__cuda_array_interface__``). The kernels read device arrays in place, or copy them once if
        their type or strides do not suit. An engine with ``normalise=True`` measures the X of its first fit, and trains
        on a scaled copy. On a GPU the engine keeps program, graphs and data there for another fit on arrays of the same
        shapes; ``engine.release()`` gives them back.

        Without y, X yields batches (x, y) or (x, y, sample_weight): a generator, a list, a torch DataLoader, any
        iterable, or ``fusemlp.Blocks`` of files larger than memory.
        An epoch is ``steps_per_epoch`` batches, by default len(X); an iterable that ends begins again. One update takes
        one batch, of any size; ``engine.batch_size`` does not matter.

        batch_size: the rows of an update, from now on (``engine.batch_size`` changes); None: as before.
        class_weight: a mapping from classes to weights (1 for others), one weight for each class, or "balanced". It
        multiplies the weights of the training rows; validation is without it.

        validation_data: (Xv, yv) or (Xv, yv, weights), or batches, of which ``validation_steps`` are collected once;
        evaluated after each epoch, also by ``metrics``: of classes "auc", "f1", "balanced_accuracy", "log_loss", of
        numbers "mae", "rmse", "r2", "pinball"; the history has them as "val_auc". Accuracy is always logged for
        classes. A metric may be a function of your own too, f(targets, outputs) -> number, of the rows of y as the loss
        takes them and the outputs (n, N); it rises with the quality if its name ends in accuracy or score.
        validation_split: the share of the rows, the last ones, to validate on in place of validation_data.
        early_stopping: after this many epochs without a better ``monitor`` (val_loss), stop and restore the best
        weights; "auto": two thirds of the epochs up to the best one, but at least 8 and at most 20.
        monitor: the quantity of the history that early stopping, best epoch and ReduceOnPlateau follow, such as
        "val_auc".
        callbacks: objects like ``Callback``, or like Keras's (``fusemlp.callbacks``); metrics that they or ``monitor``
        name need not be in ``metrics``. verbose: 1 shows a bar on stderr, 2 a line an epoch, 0 nothing.

        The order of the rows is a function of seed and epoch. ``shuffle=False`` keeps the rows as they are;
        ``row_order`` is a function from the epoch to a permutation of range(n). A last short batch is trained on unless
        ``drop_last``. A private engine draws the rows of each step, and logs epsilon; ``fusemlp.DPSGD`` says how.
        ``resume=True`` goes on with the call that a checkpoint was written in, given the same data; ``epochs`` counts
        from the beginning of that call. ``time_limit``: end training, as early stopping does, when this call has taken
        this many seconds; the launch that runs, the first at least, is finished.

        ``adversarial``, ``PGD(eps)`` or ``FGSM(eps)``: train on each batch as this attack changes it, at the parameters
        of the step and without dropout. ``loss`` and ``accuracy`` of the history are of that; validation is of rows
        unchanged. ``IBP(eps)``: train for certified accuracy; the history is of the rows as they are.

        ``loss``: the engine's loss from now on (``engine.loss`` changes); None: as before.

        Ctrl-C ends training after the batch and raises KeyboardInterrupt; the parameters and the history are kept.
        Raises ShapeError, DTypeError, DataError, ArgumentError before anything has changed, and DivergenceError when
        the loss, or val_loss, is no longer finite, with the engine back at the last good epoch. Later batches of an
        iterable are checked when they come. Warns (InputScaleWarning) of X far from unit scale.
        """
        return fit(self, FitPlan.of(locals()), X, y, sample_weight, validation_data)

    @property
    def program(self) -> Program:
        """The kernel calls of a training step in ``fit``, as data; printing it shows a table."""
        return program_of_fit(self, resident=self.plan in LOOPED)

    def program_against(self, adversarial: Any) -> Program:
        """Return ``program`` for ``fit(adversarial=...)``: the calls of the attack come first."""
        resident = self.plan == "resident" and self.memory.backend.traits.on_host
        return program_of_fit(self, passes_against(as_attack("adversarial", adversarial)), resident=resident)

    def step(self, x: Any, y: Any, sample_weight: Any = None, *, loss: LossLike | None = None) -> Any:
        """One update from 1 to ``batch_size`` rows: x (m, K), y as in ``fit``, sample_weight (m,).

        ``loss``: the engine's loss from now on, as in ``fit``.

        Arrays on the device are read in place; checking their labels waits for it (``fit`` checks them once).

        Returns the loss before the update as a 0-d array of its own (on a GPU a torch tensor); reading it is what
        waits for the device.
        Raises ShapeError, DTypeError or DataError, before anything has changed; ArgumentError if the inputs shall be
        normalised and have not been measured.
        """
        if loss is None:
            return step(self, x, y, sample_weight)
        with self.taking(loss):
            return step(self, x, y, sample_weight)

    def probe(
        self,
        X: Any,
        y: Any,
        *,
        epochs: int,
        layers: int | None = None,
        validation_data: Any = None,
        **options: Any,
    ) -> History:
        """Train the layers after the first ``layers`` (None: the output layer) alone for ``epochs`` passes.

        The first layers do not change, and their outputs for X (n, K), as in predictions, without dropout, are computed
        once. A fit that follows then starts from a head that suits the features, and distorts them less (LP-FT: Kumar
        et al., Fine-tuning can distort pretrained features and underperform out-of-distribution, 2022). The probe has
        an optimizer of its own, like the engine's, which stays as it is, as do the engine's history and its count of
        epochs.

        ``validation_data`` and ``options`` are those of ``fit``, for arrays; callbacks see an engine of the trained
        layers. Returns the history. Ctrl-C and a divergence leave the engine with the parameters reached, as in
        ``fit``. Raises the errors of ``fit``, and ArgumentError for impossible layers.
        """
        probing = transfer.probing(self, X, y, layers, validation_data, options.get("adversarial"))
        with probing as (tail, features, held):
            return tail.fit(features, y, epochs=epochs, validation_data=held, **options)

    def lr_find(
        self,
        X: Any,
        y: Any,
        *,
        sample_weight: Any = None,
        start: float = 1e-6,
        end: float = 10.0,
        steps: int = 200,
    ) -> LearningRateSweep:
        """Raise the learning rate from ``start`` to ``end`` over ``steps`` updates and watch the loss.

        As ``fusemlp.lr_find``: the sweep trains a copy, and the engine does not change.
        """
        return lr_find(self, X, y, sample_weight=sample_weight, start=start, end=end, steps=steps)

    @overload
    def predict(self, X: Any) -> Array: ...
    @overload
    def predict(self, X: Any, *, return_std: Literal[True]) -> tuple[Array, Array]: ...
    @knows_names_of_predict(call="predict(X)")
    def predict(self, X: Any, *, return_std: bool = False) -> Any:
        """Predict the targets of X (n, K).

        cross_entropy: class indices (n,) int64. binary_cross_entropy: 0 or 1, (n,) for one output, else (n, N).
        quantiles: (n, Q). Other losses: values (n, N), or (n,) for one target; for poisson the expected counts; for
        gaussian the means, and with ``return_std`` the pair of means and standard deviations.
        """
        return self.inference.predict_std(X, self.merged_biases) if return_std else self.inference.predict(X)

    @knows_names_of_predict(call="predict_proba(X)")
    def predict_proba(self, X: Any) -> Array:
        """Return probabilities (n, N) for X (n, K): of the classes, or of each label; one logit gives (n, 2).

        Raises ArgumentError if the loss is no cross-entropy.
        """
        return self.inference.predict_proba(X)

    def outputs(self, X: Any) -> Array:
        """Return the last layer's outputs (n, N) for X (n, K): logits, if the loss is a cross-entropy.

        Those of a network with members are of the mean prediction: logits of the mean probability.
        """
        return self.inference.outputs(X)

    def member_outputs(self, X: Any) -> Array:
        """Return the last layer's outputs (n, members, N) for X (n, K)."""
        return self.inference.member_outputs(X)

    @knows_names_of_predict(call="input_gradient(X, y)")
    def input_gradient(self, X: Any, y: Any = None, *, output: Any = None) -> Array:
        """Return gradients by the inputs, (n, K) of the engine's type, for X (n, K); nothing is dropped.

        With y (as in ``fit``): row i is the gradient of the loss of that row alone, ``evaluate(X[i : i + 1], y[i : i +
        1])["loss"]``, so the number of rows and other rows do not matter; rows of an ignored class have zeros.

        Without y: of one output of each row, before the loss's softmax or sigmoid. ``output`` is the index of a class
        or target, or (n,) one a row; None stands for the predicted class, or for the only target. One logit has the
        classes 0 and 1. With normalised inputs the gradients are by the raw ones.

        Raises ArgumentError, ShapeError, DTypeError or DataError, before anything has been computed.
        """
        return self.inference.input_gradient(X, y, output=output)

    @knows_names_of_predict(call="evaluate(X, y)")
    def evaluate(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        metrics: Iterable[MetricLike] = (),
        steps: int | None = None,
    ) -> dict[str, float]:
        """Return the loss of X (n, K) and y, without dropout, for classes the accuracy, and ``metrics`` by name.

        Without y, X yields batches as in ``fit``; they are collected, ``steps`` of them (by default len(X)).

        Returns {"loss": ...} or {"loss": ..., "accuracy": ...}. Hits are not weighted. One-hot targets of mse, mae
        and huber count as classes. metrics: of ``fusemlp.describe.metrics.METRICS``, such as ["auc", "f1"], which weigh
        rows by ``sample_weight``, and functions as in ``fit``.
        """
        return self.inference.evaluate(X, y, sample_weight, metrics, steps)

    def dead_units(self, X: Any) -> dict[str, float]:
        """Return for each hidden relu layer ("layer 1", ...) the share of units that are zero for every row of X.

        Units that weight decay has emptied do not count: those whose weights sum up to less than a twentieth of the
        largest unit's. Of a network with members none is looked at.
        """
        return self.inference.dead_units(X, decays=self.optimizer.weight_decay > 0.0)

    def attack(self, X: Any, y: Any, how: Attack) -> Array:
        """Return rows (n, K) near X (n, K), of the engine's type, whose loss with the labels y is larger.

        ``how``: ``PGD(eps)`` or ``FGSM(eps)``; eps and bounds are in the units of X. y as in ``fit``. Nothing is
        dropped, and the parameters stay. Robust accuracy: ``engine.evaluate(engine.attack(X, y, how), y)["accuracy"]``.

        Raises ArgumentTypeError for what is no attack, ShapeError, DTypeError or DataError for rows and labels, also
        for rows outside the bounds, before anything has been computed.
        """
        return attack(self, X, y, how)

    def bounds(self, X: Any, eps: Any, *, bounds: Any = None) -> tuple[Array, Array]:
        """Return the least and the greatest outputs, two arrays (n, N) float64, for inputs within ``eps`` of X (n, K).

        Every input x with |x - X| <= eps in each column has ``engine.outputs(x)`` between the two, and so has the
        network in exact arithmetic. The bounds are valid, not the tightest. ``eps`` is a number, or (K,) with one for
        each column: 0 for a column that does not move. It counts in the units of X, also with normalised inputs.
        ``bounds``: (low, high) of the inputs that are possible, numbers or (K,) each, such as (0, 1) for pixels.

        Raises ArgumentError, ArgumentTypeError, ShapeError, DTypeError or DataError, before anything has been computed.
        """
        return attacks.Propagation(self).outputs(*attacks.ball(self, X, eps, bounds))

    def certified(self, X: Any, y: Any, eps: Any, *, bounds: Any = None) -> Array:
        """Return whether ``predict`` gives y for every input within ``eps`` of X (n, K): bool (n,), of labels (n, N).

        False says that this is not shown. The mean is the certified accuracy. y, ``eps`` and ``bounds`` as in
        ``evaluate`` and ``bounds``; rows of an ignored class are False.

        Raises ArgumentError for targets that are no classes, and the errors of ``bounds``.
        """
        return attacks.certified(self, X, y, eps, bounds=bounds)

    def save_checkpoint(self, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
        """Write the engine's state to ``path`` atomically.

        ``extra`` is a JSON-able mapping; ``read_extra`` returns it. Inside a callback of ``fit`` the position in the
        epoch is saved too: ``load_checkpoint(path).fit(..., resume=True)`` continues from there. A symbolic link stays,
        and its target is replaced. Of several processes that train together, rank 0 writes.

        Raises ArgumentError or ArgumentTypeError for an impossible path or extra, DivergenceError if parameters are no
        longer finite, OSError from the disk; an older checkpoint at ``path`` then stays intact.
        """
        save_checkpoint(self, path, extra=extra)

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write parameters and description to ``path`` atomically; of several processes that train together, rank 0
        does.

        ``metadata`` are entries of your own, from str to str, for ``safetensors.safe_open(path).metadata()``.

        Raises ArgumentError or ArgumentTypeError for an impossible path or metadata, DivergenceError where parameters
        are no longer finite, OSError from the disk; an older file at ``path`` then stays intact.
        """
        save(self, path, metadata=metadata)

    def to_onnx(
        self,
        path: str | Path,
        *,
        preprocessor: Preprocessor | None = None,
        classes: Sequence[Any] | Array | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the graph of ``engine`` to ``path`` atomically.

        ``classes`` are the labels in ``prediction`` in place of the indices of the classes; a preprocessor has its own.
        ``metadata`` are entries of your own beside those of the file.

        Raises ArgumentError or ArgumentTypeError for an impossible path, for a network of more than 2 GiB and for an
        engine that shall normalise its inputs and has not measured any,
        DivergenceError where parameters are no longer finite, MissingLibraryError without the library
        onnx, OSError from the disk.
        """
        to_onnx(self, path, preprocessor=preprocessor, classes=classes, metadata=metadata)

    def summary(self, print_fn: Callable[[str], object] = print) -> None:
        """Print the network, its training and the memory that it takes; ``print_fn`` gets the text instead."""
        net, memory = self.network, self.memory
        options = self.optimizer.options_for
        frozen = sum(math.prod(shape) for name, shape in net.parameter_shapes().items() if not options(name)[0])
        size = memory.layout.size * memory.real_bytes
        held = {
            "parameters": size,
            "optimizer state": sum(len(state) for state in memory.states) * memory.real_bytes,
            "gradients": size * memory.gradient_parts,
            "copy of the average": size * memory.averages,
            "16-bit copy": memory.layout.size * (memory.compute_bytes or 0),
        }
        lines = layer_lines(net)
        lines[-1] += f", {frozen:,} of them frozen" if frozen else ""
        lines += [
            f"loss {getattr(self.loss, 'name', self.loss.kind)}, optimizer {self.optimizer.kind} with lr "
            f"{self.optimizer.lr!r}, batch_size {self.batch_size}, seed {self.seed}",
            f"{self.precision} on {self.backend} ({self.device}), plan {self.plan}: {self.plan_reason}; "
            f"{len(self.program.calls)} kernel calls a step",
            f"memory with padding: {', '.join(f'{name} {bytes_text(count)}' for name, count in held.items() if count)} "
            f"({bytes_text(sum(held.values()))}); {self.epochs_trained} epochs, {self.update_count} updates trained",
        ]
        print_fn("\n".join(lines))

    def privacy_spent(self) -> dict[str, Any]:
        """The privacy that training has spent: "epsilon", "delta", "steps", and "noise" and "clip" of ``DPSGD``.

        epsilon is an upper bound for all fits together, of the same rows. Raises ArgumentError if the engine has not
        trained privately, MissingLibraryError without dp-accounting.
        """
        return self.ledger.spent(self.update_count)

    def diagnose(self, X: Any = None) -> list[Finding]:
        """Return what is wrong with the last ``fit``, and with X (n, K), its training rows, the dead relu units.

        Findings: divergence, exploding loss, slow or unfinished training, no learning, overfitting, dead units. Print
        one for its evidence and remedies. An empty list means that none of these was found.

        Raises ArgumentError without a training and without X.
        """
        if self.history is None and X is None:
            raise ArgumentError(
                "diagnose: this engine has no training yet; call fit first, or give X to look at its units"
            )
        history = History() if self.history is None else self.history
        return history.diagnose(None if X is None else self.dead_units(X))

    @classmethod
    @knows_names(ELSEWHERE, also=_HANDED_ON)
    def from_pretrained(
        cls,
        source: Any,
        net: MLP | None = None,
        *,
        layers: int | None = None,
        head: Any = None,
        loss: LossLike | None = None,
        optimizer: str | Optimizer = "adam",
        freeze: int = 0,
        layer_decay: float = 1.0,
        **options: Any,
    ) -> Engine:
        """Return an engine that starts from the first layers of another network, for a new task.

        ``source``: an engine, a file of ``save`` or ``save_checkpoint``, a run folder, or the parameters of an
        ``nn.Sequential`` in torch, a ``state_dict`` or a safetensors file; of parameters alone ``net`` is the network.
        The first ``layers`` layers are kept, and those after them start from the values that the engine's seed draws.
        ``head`` replaces these by a new output layer of this width, or by layers of several widths. Layers kept unless
        given: all but the source's last if there is a head or ``net`` ends otherwise, else all.

        ``freeze``: this many of the kept layers, from the first on, are not trained. ``layer_decay``: the factor from
        each layer's learning rate to that of the layer before it. ``loss`` and ``precision`` are the source's unless
        given, and the scale of its inputs (``normalise``) goes along; ``options`` are the other arguments of an engine.

        Raises ArgumentError or ArgumentTypeError for arguments that do not go together, ShapeError if a kept parameter
        has another shape in ``net``, CheckpointError for a file that cannot be read.
        """
        known = _read_source(source, options)
        state = known.state_dict() if isinstance(known, Session) else transfer.in_sequence(known)
        chosen, kept = transfer.network_from(getattr(known, "network", None), net, layers, head)
        start, count = transfer.taken_over(chosen, state, kept)
        if as_count("freeze", freeze, minimum=0) > count:
            raise ArgumentError(f"freeze: expected 0 to {count}, the number of layers that are kept, got {freeze}")
        if isinstance(known, Session):
            options = {"precision": known.precision, "normalise": known.normalise, **options}
            loss = known.loss if loss is None else loss
        if MEAN in start and options.setdefault("normalise", True) is not True:
            raise ArgumentError("normalise: the source scales its inputs, and its scale goes along; leave it out")
        made = transfer.by_layers(as_optimizer(optimizer), chosen, freeze=freeze, layer_decay=layer_decay)
        engine = cls(chosen, "cross_entropy" if loss is None else loss, made, **options)
        engine.load_state_dict({**engine.state_dict(), **start})
        return engine

    def __getstate__(self) -> dict[str, Any]:
        return {**checkpoint.engine_content(self), "loss": self.loss}

    def __setstate__(self, content: dict[str, Any]) -> None:
        checkpoint.restore_engine(self, content, backend="auto", device=None)
        # older pickles do not have it
        self.take_loss(content.get("loss", self.loss))


names_absent(Engine, KERAS)


@knows_names(ELSEWHERE)
def load_checkpoint(
    path: str | Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    network: MLP | None = None,
    distributed: bool = False,
    reduce: str = ORDERED,
    timeout: float = TIMEOUT,
    loss: Callable[..., Any] | None = None,
) -> Engine:
    """The engine that was saved, on any backend. With ``network`` the checkpoint must be of such a network.

    ``loss``: the function of that name with which it was trained. Without it the engine predicts, and asks for the
    function when it is to train or evaluate. ``distributed``, ``reduce`` and ``timeout``: see ``Engine``. The number of
    processes may be other than before.

    Raises CheckpointError if the file is missing, corrupted or of another network, BackendUnavailableError.
    """
    content = checkpoint.read_content(path)
    engine = _restored(content, backend, device)
    if network is not None and as_network("network", network) != engine.network:
        raise CheckpointError(
            f"path: {str(path)!r} is of another network: expected {network!r}, it holds {engine.network!r}"
        )
    engine.join(distributed, reduce, timeout)
    engine.take_named(loss)
    return engine


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    precision: str | None = None,
    loss: Callable[..., Any] | None = None,
) -> Engine:
    """The engine of a file that ``engine.save`` wrote, on any backend: ready to predict, and to be trained on.

    Its optimizer begins anew. A checkpoint is loaded too, with the state of its training: as ``load_checkpoint`` does.
    ``precision`` takes the place of the one that was saved, for a machine that does not have that one; ``loss`` is as
    in ``load_checkpoint``.

    Raises CheckpointError if the file is missing, corrupted or another's, BackendUnavailableError.
    """
    metadata, tensors = files.read_file(path, files.MODEL)
    for kind in (files.MODEL, files.CHECKPOINT):
        if kind.entry in metadata:
            engine = _restored(files.checked_content(path, metadata, tensors, kind), backend, device, precision)
            engine.take_named(loss)
            return engine
    raise CheckpointError(
        f"path: {str(path)!r} is a safetensors file that does not say which network it is of; make the engine, "
        "Engine(MLP([...])), and then engine.load_state_dict(safetensors.numpy.load_file(path))"
    )


def _read_source(source: Any, options: Mapping[str, Any]) -> Any:
    """Return the engine of a source, or the parameters by name of one that holds nothing else."""
    if isinstance(source, Session | Mapping):
        return source
    if not isinstance(source, str | Path):
        hint = "; for a module give fusemlp.torch.from_torch(module)" if hasattr(source, "state_dict") else ""
        raise ArgumentTypeError(
            f"source: expected an Engine, a path, or a mapping of names to arrays, got {type(source).__name__}{hint}"
        )
    path = Path(source)
    if path.is_dir():
        path = weights_path(open_run(path)[0], "model")
    try:
        metadata, tensors = files.read_file(path, files.MODEL)
    except CheckpointError as error:
        raise CheckpointError(f"source: {str(error).removeprefix('path: ')}") from error
    if not {files.MODEL.entry, files.CHECKPOINT.entry} & metadata.keys():
        return tensors
    machine = {name: options[name] for name in ("device", "precision") if name in options}
    return load(path, backend=options.get("backend", "auto"), **machine)


def _restored(content: Mapping[str, Any], backend: str, device: str | None, precision: str | None = None) -> Engine:
    engine = Engine.__new__(Engine)
    checkpoint.restore_engine(engine, content, backend=backend, device=device, precision=precision)
    return engine
