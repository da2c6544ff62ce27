"""Training loops of each library for 784-128-10 on images to a target accuracy, for ``bench.time_to_result``.

All loops have the same initial parameters, batch size, plain SGD and float32 arrays, and compute the accuracy on the
test images after each epoch. Each function imports its library, because the import is part of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.cases import Array

BATCH_SIZE = 50
LEARNING_RATE = 0.3
HIDDEN = 128
CLASSES = 10


@dataclass(frozen=True)
class Task:
    """Images X (n, 784) and Xt, labels y (n,) int64 and yt; parameters as in ``cases.Data``; n fills whole batches."""

    X: Array
    y: Array
    Xt: Array
    yt: Array
    parameters: list[tuple[Array, Array]]
    seed: int


@dataclass
class Watch:
    """Records accuracy and time after each epoch; ends at the target or after too many epochs."""

    target: float
    most_epochs: int
    began: float = field(default_factory=time.perf_counter)
    imported: float = 0.0
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def ready(self) -> None:
        """Note that the library is imported."""
        self.imported = time.perf_counter() - self.began

    def epoch(self, accuracy: float) -> bool:
        """Record an epoch and return whether the training ends."""
        self.seconds.append(time.perf_counter() - self.began)
        self.accuracies.append(float(accuracy))
        return self.reached or len(self.seconds) == self.most_epochs

    @property
    def reached(self) -> bool:
        """True if the last accuracy has reached the target."""
        return bool(self.accuracies) and self.accuracies[-1] >= self.target


def fusemlp_fit(task: Task, watch: Watch, plan: str = "auto") -> None:
    """Run ``Engine.fit`` with validation data and a callback that ends it."""
    from fusemlp import MLP, SGD, Callback, Engine

    watch.ready()

    class Target(Callback):
        def on_epoch_end(self, engine: Any, epoch: int, logs: dict[str, float]) -> None:
            engine.stop_training = watch.epoch(logs["val_accuracy"])

    net = MLP([task.X.shape[1], HIDDEN, CLASSES])
    engine = Engine(net, optimizer=SGD(LEARNING_RATE), batch_size=BATCH_SIZE, seed=task.seed, plan=plan)
    pairs = enumerate(task.parameters)
    engine.load_state_dict(
        {f"{2 * i}.{kind}": a for i, pair in pairs for kind, a in zip(("weight", "bias"), pair, strict=True)}
    )
    engine.fit(task.X, task.y, epochs=watch.most_epochs, validation_data=(task.Xt, task.yt), callbacks=[Target()])


def fusemlp_eager(task: Task, watch: Watch) -> None:
    """Run the same fit without the compiled loop."""
    fusemlp_fit(task, watch, plan="eager")


def torch_loop(task: Task, watch: Watch, *, loader: bool = False) -> None:
    """Run an eager loop over slices of shuffled tensors, or over a ``DataLoader``."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    watch.ready()
    torch.manual_seed(task.seed)
    X, y, Xt, yt = (torch.from_numpy(array) for array in (task.X, task.y, task.Xt, task.yt))
    model = nn.Sequential(nn.Linear(X.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    with torch.no_grad():
        for layer, (weight, bias) in zip((model[0], model[2]), task.parameters, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loaded = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=BATCH_SIZE, shuffle=True)
    over = False
    while not over:
        order = torch.randperm(len(X))
        sliced = zip(X[order].split(BATCH_SIZE), y[order].split(BATCH_SIZE), strict=True)
        for x, labels in loaded if loader else sliced:
            loss = cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            over = watch.epoch((model(Xt).argmax(1) == yt).float().mean().item())


def torch_loader(task: Task, watch: Watch) -> None:
    """Run the loop of PyTorch's own tutorials."""
    torch_loop(task, watch, loader=True)


def jax_loop(task: Task, watch: Watch, *, scan: bool = False) -> None:
    """Run a compiled step in a Python loop, or a compiled epoch."""
    import jax
    import jax.numpy as jnp

    watch.ready()
    generator = np.random.default_rng(task.seed)
    X, y = jnp.asarray(task.X), jnp.asarray(task.y, dtype=jnp.int32)
    Xt, yt = jnp.asarray(task.Xt), jnp.asarray(task.yt, dtype=jnp.int32)
    parameters = [(jnp.array(weight), jnp.array(bias)) for weight, bias in task.parameters]

    def forward(parameters: Any, x: Any) -> Any:
        (w0, b0), (w1, b1) = parameters
        return jax.nn.relu(x @ w0.T + b0) @ w1.T + b1

    def loss(parameters: Any, x: Any, labels: Any) -> Any:
        logs = jax.nn.log_softmax(forward(parameters, x))
        return -jnp.take_along_axis(logs, labels[:, None], axis=1).mean()

    def step(parameters: Any, rows: Any) -> Any:
        gradients = jax.grad(loss)(parameters, X[rows], y[rows])
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, parameters, gradients), None

    one_step = jax.jit(lambda parameters, rows: step(parameters, rows)[0])
    one_epoch = jax.jit(lambda parameters, order: jax.lax.scan(step, parameters, order)[0])
    accuracy = jax.jit(lambda parameters: (forward(parameters, Xt).argmax(1) == yt).mean())
    over = False
    while not over:
        order = jnp.asarray(generator.permutation(len(X)).reshape(-1, BATCH_SIZE), dtype=jnp.int32)
        if scan:
            parameters = one_epoch(parameters, order)
        else:
            for rows in order:
                parameters = one_step(parameters, rows)
        over = watch.epoch(float(accuracy(parameters)))


def jax_scan(task: Task, watch: Watch) -> None:
    """Run each epoch as one compiled program."""
    jax_loop(task, watch, scan=True)


def sklearn_partial_fit(task: Task, watch: Watch) -> None:
    """Call ``MLPClassifier.partial_fit`` and ``score`` once an epoch."""
    from sklearn.neural_network import MLPClassifier

    watch.ready()
    model = MLPClassifier(
        HIDDEN, solver="sgd", alpha=0.0, batch_size=BATCH_SIZE, learning_rate_init=LEARNING_RATE, momentum=0.0,
        nesterovs_momentum=False, random_state=task.seed,
    )  # fmt: skip
    # Allocates the arrays for the initial parameters. Without momentum it leaves no other state.
    model.partial_fit(task.X[:BATCH_SIZE], task.y[:BATCH_SIZE], classes=np.arange(CLASSES))
    model.coefs_ = [np.ascontiguousarray(weight.T) for weight, _ in task.parameters]
    model.intercepts_ = [bias.copy() for _, bias in task.parameters]
    over = False
    while not over:
        model.partial_fit(task.X, task.y)
        over = watch.epoch(model.score(task.Xt, task.yt))


@dataclass(frozen=True)
class Contender:
    """Label, required packages and loop. ``first``: numba's cache on disk is empty."""

    label: str
    packages: tuple[str, ...]
    run: Callable[[Task, Watch], None]
    first: bool = False


CONTENDERS = {
    "fusemlp": Contender("fusemlp", ("fusemlp",), fusemlp_fit),
    "fusemlp_first": Contender("fusemlp, first fit on a machine", ("fusemlp", "numba"), fusemlp_fit, first=True),
    "fusemlp_eager": Contender("fusemlp, plan eager", ("fusemlp",), fusemlp_eager),
    "torch": Contender("PyTorch eager", ("torch",), torch_loop),
    "torch_loader": Contender("PyTorch eager, DataLoader", ("torch",), torch_loader),
    "jax_jit": Contender("JAX jit", ("jax",), jax_loop),
    "jax_scan": Contender("JAX lax.scan", ("jax",), jax_scan),
    "sklearn": Contender("scikit-learn", ("sklearn",), sklearn_partial_fit),
}
