"""Training allocates no array: everything was allocated when the program was bound.

``tracemalloc`` sees the memory of NumPy and Python. The smallest arrays of a step are vectors of a batch and of the
hidden layer, 5 KiB each in single precision; the matrices have 80 KiB to 6 MiB. So the limit of 4 KiB detects each of
them, and leaves room for Python's numbers and tuples. NumPy's buffer for type conversions, 8192 elements for arrays of
any size, is set small during the measurement. Each measurement is repeated and the minimum counts: a step's allocations
recur every time, those of other threads of the test runner do not.
"""

import gc
import tracemalloc

import numpy as np
import pytest

import fusemlp_kernels
from fusemlp import MLP, SGD, Adam, AdamW, Callback, Cosine, CrossEntropy, Engine, PReLU

BATCH = WIDTH = 1280
ROWS = 3000  # two whole batches and a short one
INPUTS, OUTPUTS = 16, 16
LIMIT = 4096
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
LABELS = RNG.integers(0, OUTPUTS, ROWS)
VALUES = RNG.uniform(0.0, 1.0, (ROWS, OUTPUTS)).astype(np.float32)
WEIGHT = RNG.uniform(0.1, 1.0, ROWS).astype(np.float32)

CASES = {
    "sgd": ({}, SGD(0.01), "cross_entropy", LABELS),
    "momentum": ({"activation": "tanh"}, SGD(0.01, momentum=0.9, weight_decay=0.01), "mse", VALUES),
    "nesterov": ({"activation": "sigmoid"}, SGD(0.01, momentum=0.9, nesterov=True), "huber", VALUES),
    "clipped": ({"activation": "leaky_relu"}, SGD(0.01, clip_norm=0.1, weight_decay=0.01), "mae", VALUES),
    "adam": ({"dropout": 0.5}, Adam(0.001, weight_decay=0.01), "cross_entropy", LABELS),
    "adamw": ({"activation": "gelu", "dropout": 0.5}, AdamW(Cosine(0.001, steps=100)), "poisson", VALUES),
    "accumulated": ({"activation": "silu"}, AdamW(0.001, accumulate=2), "binary_cross_entropy", VALUES.round()),
    "prelu": ({"activation": PReLU(0.1), "output_activation": "tanh"}, Adam(0.001), "quantile", VALUES),
    "options": ({}, SGD(0.01), CrossEntropy(label_smoothing=0.1, class_weight=[1.0] * OUTPUTS, ignore_index=3), LABELS),
    "soft": ({}, SGD(0.01), "cross_entropy", np.eye(OUTPUTS, dtype=np.float32)[LABELS]),
}


def make(options, optimizer, loss):
    net = MLP([INPUTS, WIDTH, OUTPUTS], **options)
    return Engine(net, loss=loss, optimizer=optimizer, batch_size=BATCH, seed=0, backend="numpy")


def a_batch(target, weighted):
    return X[:BATCH], target[:BATCH], WEIGHT[:BATCH] if weighted else None


class Peak:
    """The peak of allocated bytes inside the context, above the level before."""

    def __enter__(self):
        self.buffer = np.setbufsize(16)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        self.begin()
        return self

    def begin(self):
        tracemalloc.reset_peak()
        self.before = tracemalloc.get_traced_memory()[0]

    def grown(self):
        return tracemalloc.get_traced_memory()[1] - self.before

    def __exit__(self, *error):
        self.bytes = self.grown()
        tracemalloc.stop()
        gc.enable()
        np.setbufsize(self.buffer)


def test_a_vector_would_show():
    with Peak() as peak:
        np.empty(WIDTH, np.float32)
    assert peak.bytes > LIMIT


@pytest.mark.parametrize("options, optimizer, loss, target", CASES.values(), ids=CASES.keys())
def test_the_program_of_a_step_allocates_no_array(options, optimizer, loss, target):
    engine = make(options, optimizer, loss)
    engine.step(*a_batch(target, weighted=True))
    (bound,) = engine.programs.staged.values()
    grown = []
    with Peak() as peak:
        for _ in range(3):
            peak.begin()
            bound.run()
            grown.append(peak.grown())
    assert min(grown) <= LIMIT, f"{grown} bytes"


class Watch(Callback):
    """A callback that measures the bytes allocated from the end of an epoch's first batch to the end of its last."""

    def __init__(self, peak):
        self.peak, self.grown = peak, []

    def on_batch_end(self, engine, batch):
        if batch == 0:
            self.peak.begin()
        if batch == 2:
            self.grown.append(self.peak.grown())


@pytest.mark.parametrize("options, optimizer, loss, target", CASES.values(), ids=CASES.keys())
def test_the_batches_of_a_fit_allocate_no_array(options, optimizer, loss, target):
    engine = make(options, optimizer, loss)
    with Peak() as peak:
        watch = Watch(peak)
        engine.fit(X, target, epochs=3, sample_weight=WEIGHT, callbacks=[watch])
    assert len(watch.grown) == 3
    assert min(watch.grown) <= LIMIT, f"{watch.grown} bytes"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam", "momentum"])
def test_a_step_allocates_its_loss_and_no_other_array(kind, weighted):
    options, optimizer, loss, target = CASES[kind]
    engine, batch = make(options, optimizer, loss), a_batch(target, weighted)
    losses, grown = [None] * 8, [0] * 8
    engine.step(*batch)
    with Peak() as peak:
        for index in range(len(losses)):
            peak.begin()
            losses[index] = engine.step(*batch)
            grown[index] = peak.grown()
    assert min(grown) <= LIMIT, f"{grown} bytes"


def test_epochs_leave_nothing_behind_but_their_record():
    engine = make(*CASES["adam"][:3])
    kept = []

    class Kept(Callback):
        def on_epoch_end(self, engine, epoch, logs):
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])

    with Peak():
        engine.fit(X, LABELS, epochs=6, validation_data=(X, LABELS), callbacks=[Kept()])
    # the first epoch binds the forward pass; a record has half a dozen numbers
    assert min(kept[2:]) - kept[1] <= LIMIT
    assert engine.memory.params.nbytes > 100_000


def test_a_call_whose_operands_lie_otherwise_copies_into_arrays_that_it_has():
    x, w, y = (np.ones(shape[::-1], np.float32).T for shape in ((BATCH, INPUTS), (OUTPUTS, INPUTS), (BATCH, OUTPUTS)))
    bind = fusemlp_kernels.backend("numpy", None, "fp32").bind
    run = bind("linear", x=x, w=w, b=np.ones(OUTPUTS, np.float32), y=y, activation="gelu")
    run()
    with Peak() as peak:
        run()
    assert peak.bytes <= LIMIT
