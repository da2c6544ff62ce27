"""Tests that need a card, for every backend that runs on one: graphs, determinism, 64-bit addresses, the sanitizer.

``pytest -m gpu`` also runs the random cases and the step-by-step trainings on a card. ``ci/gpu --rehearse`` runs this
file, and ``test_gpu.py`` for the Triton backend alone, on a CPU, at tiny sizes and without graphs.
"""

import contextlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from calls import check_grad_weight, check_linear, counters_of, gathering
from devices import CUPY_GPU, GPU, REHEARSED, Variant, needs_a_card, places, usable, variants_of
from memory import Values, place, poisoned

from fusemlp import MLP, SGD, AdamW, Engine, OneCycle
from fusemlp_kernels import contract as c
from fusemlp_kernels.checks import refusal
from fusemlp_kernels.clock import hyper_at, rate_table
from make import assert_same

CARDS, VARIANTS = places(GPU, CUPY_GPU), variants_of(GPU, CUPY_GPU)
on_a_card = pytest.mark.parametrize("variant", VARIANTS)

NET = MLP([9, 8, 6, 4] if REHEARSED else [61, 96, 40, 10], activation=["gelu", "relu"], dropout=[0.2, 0.0])
M, K, N = (17, 11, 9) if REHEARSED else (517, 203, 130)
ROWS, REPEATS = (32, 2) if REHEARSED else (1600, 50)
PLANS = ["eager"] if REHEARSED else ["graph", "eager"]


def data(rows=ROWS):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, NET.sizes[0])).astype(np.float32), rng.integers(0, NET.sizes[-1], rows)


def everything(engine):
    """All that a training has left behind, on the host."""
    losses = {name: values for name, values in vars(engine.history).items() if "seconds" not in name}
    arrays = engine.memory.snapshot() | {name: np.asarray(values) for name, values in losses.items()}
    return {name: array for name, array in arrays.items() if getattr(array, "dtype", np.dtype(object)).kind in "fi"}


def trained(variant, optimizer=None, *, epochs, plan):
    optimizer = optimizer or AdamW(OneCycle(0.01, steps=500))
    engine = engine_of(variant, plan, optimizer=optimizer)
    engine.fit(*data(), epochs=epochs)
    assert engine.update_count == ROWS // 32 * epochs
    return everything(engine)


def engine_of(variant, plan, *, seed=3, **options):
    with usable(variant.device):
        return Engine(
            NET, batch_size=32, seed=seed, backend=variant.device.backend, precision=variant.precision, plan=plan,
            **options,
        )  # fmt: skip


OPTIMIZERS = {
    "fused": AdamW(OneCycle(0.01, steps=500)),
    "gradients stored": SGD(OneCycle(0.05, steps=500), momentum=0.9, clip_norm=0.5),
}


@needs_a_card
@on_a_card
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_graph_is_the_eager_plan_bitwise_while_the_rate_changes_every_step(variant, optimizer):
    graph, eager = (trained(variant, optimizer, epochs=10, plan=plan) for plan in ("graph", "eager"))
    assert_same(graph, eager)


@pytest.mark.parametrize("plan", PLANS)
@on_a_card
def test_two_hundred_steps_repeat_bitwise(variant, plan):
    epochs = 1 if REHEARSED else 4
    assert_same(trained(variant, epochs=epochs, plan=plan), trained(variant, epochs=epochs, plan=plan))


def own_stream(backend):
    """Return a context in which the calling thread works on a stream of its own."""
    if REHEARSED:
        return contextlib.nullcontext()
    if backend == "cupy":
        import cupy

        return cupy.cuda.Stream(non_blocking=True)
    import torch

    return torch.cuda.stream(torch.cuda.Stream())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("device", CARDS)
def test_engines_side_by_side_train_as_they_do_alone(device, plan):
    """By turns on one stream; and on a card in threads, each on a stream of its own."""
    variant, seeds = Variant(device, "fp32"), (1, 2)

    def by_turns(*chosen):
        engines = [engine_of(variant, plan, seed=seed, optimizer=AdamW(0.01)) for seed in chosen]
        for _ in range(2):
            for engine in engines:
                engine.fit(*data(), epochs=1)
        return [everything(engine) for engine in engines]

    def in_a_thread(seed):
        with own_stream(device.backend):
            return by_turns(seed)[0]

    alone = [by_turns(seed)[0] for seed in seeds]
    found = [by_turns(*seeds)]
    if not REHEARSED:
        with ThreadPoolExecutor(2) as pool:
            found.append(list(pool.map(in_a_thread, seeds)))
    for together in found:
        for first, second in zip(together, alone, strict=True):
            assert_same(first, second)


def bound_ops(variant):
    """Each op bound to arrays of some size: (name, run, all its arrays)."""
    values, layout = Values(1, variant), "owned"
    x, w, b = place(values.factors(M, K), layout), place(values.factors(N, K, scale=0.05), layout), values.normal(N)
    dz, y = place(values.factors(M, N), layout), poisoned((M, N), variant.compute, layout)
    counters, stats = counters_of(M - 3), np.zeros(c.STATS)
    target, slope = values.integers(N, M), np.full(1, 0.25, variant.real)
    loss = {"target": target, "counters": counters, "stats": stats, "loss": c.LossSpec("cross_entropy", accuracy=True)}
    dslope, out = poisoned(1, variant.real), poisoned((M, K), variant.compute, layout)
    rule = c.UpdateRule("adam")
    rates = rate_table(rule, [0.1 * 0.9**updates for updates in range(60)])
    clock = {"rule": rule, "hyper": hyper_at(rule, 0.1), "rates": rates, "counters": counters}
    p, s = place(values.normal(N, K), layout), [place(np.abs(values.normal(N, K)), layout) for _ in range(2)]
    pb, sb = values.normal(N), [np.abs(values.normal(N)) for _ in range(2)]
    layer = {"dz": dz, "x": x, "w": p, "b": pb, "w_state": tuple(s), "b_state": tuple(sb)}
    layer |= {"w_rule": c.TensorRule(), "b_rule": c.TensorRule()}
    dw, db = poisoned((N, K), variant.real, layout), poisoned(N, variant.real)
    size = 50_000
    arenas = [values.normal(size) for _ in range(3)] + [np.abs(values.normal(size))]
    flat = {"params": arenas[0], "grads": arenas[1], "states": tuple(arenas[2:])}
    clipped = c.UpdateRule(**{**vars(rule), "clip_norm": 0.1})
    dropped = {"dropout": c.Dropout(0.5, 1, 7), "counters": counters}
    plain = c.UpdateRule("sgd")
    calls = {
        "linear": {"x": x, "w": w, "b": b, "y": y, "activation": "gelu", **dropped},
        "linear_loss_grad": {"x": x, "w": w, "b": b, "dz": y, **loss},
        "loss_grad": {"z": dz, "dz": y, **loss},
        "grad_input": {
            "dz": dz, "w": w, "y": x, "z": x, "dz_prev": out, "activation": "prelu", "slope_param": slope,
            "dslope": dslope,
        },
        "grad_weight": {"layers": [{"dz": dz, "x": x, "dw": dw, "db": db}], "rule": plain, "counters": counters},
        "grad_weight_update": {"layers": [layer], **clock},
        "update": {**flat, "segments": (c.Segment(0, size, c.TensorRule()),), **clock, "rule": clipped},
    }  # fmt: skip
    for op, operands in calls.items():
        if refusal(variant.device.backend, op) is None:
            yield op, variant.bind(op, **operands), _arrays(operands)


def _arrays(value):
    if isinstance(value, np.ndarray):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [array for item in items for array in _arrays(item)]


@on_a_card
def test_every_op_gives_the_same_bits_fifty_times(variant):
    for op, run, arrays in bound_ops(variant):
        start, first = [np.array(a) for a in arrays], None
        for _ in range(REPEATS):
            for array, values in zip(arrays, start, strict=True):
                array[...] = values
            run()
            found = [np.array(a).tobytes() for a in arrays]
            first = first or found
            assert found == first, op


@needs_a_card
@pytest.mark.parametrize("device", CARDS)
def test_addresses_past_two_to_the_31_elements(device):
    """x has more elements than an int32 counts, and in a second call so has y; its last rows come out right."""
    variant = Variant(device, "fp32")
    values, backend = Values(2, variant), variant.backend()
    rows, k, n, m = 2**22 + 64, 520, 24, 48
    w, b = values.normal(n, k, scale=0.05), values.normal(n)
    x = backend.view(backend.allocate(rows * k, "real"), 0, (rows, k), k)
    last = values.normal(m, k)
    backend.copy_into(x[-m:], last)
    index = backend.from_host(np.arange(rows - m, rows))
    gathered = backend.view(backend.allocate(m * k, "compute"), 0, (m, k), k)
    by_row = gathering(variant, index, gathered=gathered)
    counters = backend.allocate(c.COUNTERS, "int64")
    y = backend.view(backend.allocate(m * n, "compute"), 0, (m, n), n)
    on_device = {"w": backend.from_host(w), "b": backend.from_host(b)}
    backend.bind("linear", x=x, **by_row, y=y, counters=counters, activation="identity", **on_device)()
    check_linear(variant, backend.to_host(y), last, w, b)

    dz = values.normal(m, n)
    dw = backend.view(backend.allocate(n * k, "real"), 0, (n, k), k)
    db = backend.allocate(n, "real")
    layer = {"dz": backend.from_host(dz), "x": x, **by_row, "dw": dw, "db": db}
    rule = c.UpdateRule("sgd")
    backend.bind("grad_weight", layers=[layer], rule=rule, counters=counters)()
    check_grad_weight(variant, dz, last, backend.to_host(dw))

    small = backend.view(backend.allocate(rows * 8, "compute"), 0, (rows, 8), 8)
    backend.copy_into(small[-m:], last[:, :8])
    wide = backend.from_host(values.normal(k, 8))
    bias = backend.allocate(k, "real")
    del y
    backend.bind("linear", x=small, w=wide, b=bias, y=x, activation="identity")()
    check_linear(variant, backend.to_host(x[-m:]), last[:, :8], backend.to_host(wide), np.zeros(k))


SANITIZED = """
import sys
import numpy as np
from fusemlp import MLP, SGD, Adam, Engine
rng = np.random.default_rng(0)
rows = int(sys.argv[2])
X, y = rng.standard_normal((rows, 19)).astype(np.float32), rng.integers(0, 5, rows)
for precision in sys.argv[3:]:
    for optimizer in (Adam(0.01), SGD(0.1, momentum=0.9, clip_norm=0.5)):
        for plan in ("eager",) if precision == "fp16" or sys.argv[1] == "cupy" else ("eager", "resident"):
            engine = Engine(MLP([19, 33, 17, 5], activation=["prelu", "gelu"], dropout=0.2), optimizer=optimizer,
                            batch_size=32, backend=sys.argv[1], precision=precision, plan=plan)
            engine.fit(X, y, epochs=2)
"""


@pytest.mark.parametrize("tool", ["memcheck"] if REHEARSED else ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("device", CARDS)
def test_compute_sanitizer_finds_nothing(device, tool):
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    if REHEARSED:
        sanitizer = []
        if device is CUPY_GPU:
            pytest.skip("a rehearsal: another process does not have the stand-in for CuPy")
    elif shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    command = [*sanitizer, sys.executable, "-c", SANITIZED, device.backend, "20" if REHEARSED else "70"]
    command += device.precisions
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
