"""Facts of the CuPy backend that the contract does not ask for: how much it launches, how it takes foreign arrays, the
sums of long batches, its 16-bit numbers."""

import numpy as np
import pytest
from calls import Clock, check_grad_input, check_grad_weight, check_linear, counters_of, run_loss
from devices import CUPY_GPU, STAND_IN, Variant, places, usable, variants_of
from memory import Values, exact, place, poisoned
from tolerance import assert_within, bound, loss_grad_bound

from fusemlp import MLP, SGD, Adam, Engine
from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError, DTypeError, ShapeError
from make import assert_same

PLACES, VARIANTS = places(STAND_IN, CUPY_GPU), variants_of(STAND_IN, CUPY_GPU)
ON_THE_HOST = pytest.mark.parametrize("device", PLACES[:1])


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels and products that have been started."""

    def watch(variant):
        variant.backend()
        from fusemlp_kernels.cupy import device

        names = []
        bind, multiply = device.Device.launch, device.cublas.gemmEx

        def launch(*arguments, **fields):
            run = bind(*arguments, **fields)
            return run if run is device.nothing else lambda: (names.append("kernel"), run())

        def gemm(*arguments):
            names.append("product")
            multiply(*arguments)

        monkeypatch.setattr(device.Device, "launch", launch)
        monkeypatch.setattr(device.cublas, "gemmEx", gemm)
        return names

    return watch


@pytest.mark.parametrize(
    ("optimizer", "kernels"),
    [(SGD(0.1), 5), (Adam(0.1), 5), (SGD(0.1, clip_norm=1.0), 6)],
    ids=["sgd", "adam", "clipped"],
)
@pytest.mark.parametrize("device", PLACES)
def test_a_step_of_two_layers_is_five_products_and_little_more(device, optimizer, kernels, started):
    """A kernel behind each of three products: bias and activation, loss, derivative. Then a product for each weight,
    the sums of the biases, and what the optimizer needs of its own."""
    names = started(Variant(device, "fp32"))
    with usable(device):
        engine = Engine(MLP([6, 5, 3]), optimizer=optimizer, batch_size=8, backend="cupy", plan="eager")
    x, y = np.ones((8, 6), np.float32), np.arange(8) % 3
    engine.step(x, y)
    del names[:]
    engine.step(x, y)
    assert names.count("product") == 5 and names.count("kernel") == kernels


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sums_of_a_long_batch_are_added_up_from_parts(variant):
    """Twice, so that the tickets of the parts are ready again, and in an accumulation."""
    values, m, n, k = Values(4, variant), 700, 37, 5
    dz, x = place(values.factors(m, n), "owned"), place(values.factors(m, k), "owned")
    layer = {"dz": dz, "x": x, "dw": poisoned((n, k), variant.real), "db": poisoned(n, variant.real)}
    counters = counters_of()
    rule = c.UpdateRule("sgd", accumulate=2)
    run = variant.bind("grad_weight", layers=[layer], rule=rule, counters=counters)
    for index in range(4):
        counters[c.BATCH_INDEX] = index
        run()
        check_grad_weight(variant, dz, x, layer["dw"], layer["db"], batches=index % 2 + 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("device", PLACES)
def test_a_gradient_that_nothing_follows_is_written_by_the_product(device, precision, started):
    """In 16 bits too: its float32 sums are rounded once."""
    variant = Variant(device, precision)
    values, names = Values(8, variant), started(variant)
    dz, w, y = (place(values.factors(*shape), "owned") for shape in ((33, 70), (70, 21), (33, 21)))
    dz_prev = poisoned((33, 21), variant.compute, "owned")
    variant.bind("grad_input", dz=dz, w=w, y=y, dz_prev=dz_prev, activation="identity")()
    assert names == ["product"]
    check_grad_input(variant, dz_prev, dz, w, exact(y), "identity")


@pytest.mark.parametrize("device", PLACES)
def test_tf32_is_asked_of_the_products_and_fp32_is_not_tf32(device):
    """Random signs, so that the errors do not add up."""
    values = Values(7, Variant(device, "fp32"))
    x, w, b = values.normal(32, 784), values.normal(24, 784), np.zeros(24, np.float32)
    z = exact(x) @ exact(w).T
    for precision in ("fp32", "tf32"):
        y = poisoned((32, 24), np.float32, "owned")
        Variant(device, precision).bind("linear", x=x, w=w, b=b, y=y, activation="identity")()
        limit = bound(785, np.abs(x) @ np.abs(w).T, output=z)
        if precision == "fp32":
            assert_within(y, z, limit)
        else:
            with pytest.raises(AssertionError, match="out of bound"):
                assert_within(y, z, limit)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_normaliser_of_a_long_batch_is_a_launch_of_its_own(variant, weighted):
    values, m, n = Values(5, variant), 1100, 6
    spec = c.LossSpec("cross_entropy", ignore_index=2)
    z, target = variant.rounded(values.normal(m, n)), values.integers(n, m)
    weight = values.uniform(0.5, 2.0, m) if weighted else None
    loss, dz, _ = run_loss(variant, spec, z, target, weight=weight)
    wanted, expected = reference.loss_grad(spec, exact(z), target, exact(weight))
    limits = loss_grad_bound(spec, exact(z), target, exact(weight), u=variant.unit)
    assert_within(loss, wanted, limits[0])
    variant.check(dz, expected, limits[1])


@ON_THE_HOST
def test_numbers_become_float16_as_numpy_has_it(device):
    """On the host the conversion is written by hand: ties, subnormal numbers, what is too large, infinities, NaN."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    near = halves[np.isfinite(halves)].astype(np.float32)
    between = (near[:-1].astype(np.float64) + near[1:]) / 2
    steps = np.concatenate([np.nextafter(between.astype(np.float32), np.float32(s) * np.inf) for s in (-1, 1)])
    random = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([halves.astype(np.float32), between.astype(np.float32), steps, random])
    variant = Variant(device, "fp16")
    rule = c.UpdateRule("sgd")
    shadow, params = np.zeros(numbers.size, np.float16), numbers.copy()
    operands = {"params": params, "grads": np.zeros_like(params), "states": (), "shadow": shadow}
    operands["segments"] = (c.Segment(0, params.size, c.TensorRule()),)
    with np.errstate(all="ignore"):
        variant.bind("update", **operands, **Clock(rule, rates=[0.0]).operands)()
        np.testing.assert_array_equal(shadow, numbers.astype(np.float16))
    # and back: every number of 16 bits goes through a layer that does nothing
    x, y = halves.reshape(-1, 1), np.zeros((2**16, 1), np.float16)
    w, b = np.ones((1, 1), np.float16), np.zeros(1, np.float32)
    finite = np.isfinite(halves)
    variant.bind("linear", x=x, w=w, b=b, y=y, activation="identity")()
    np.testing.assert_array_equal(y[finite, 0], halves[finite])


@pytest.mark.parametrize("device", PLACES)
def test_what_is_too_large_for_float16_becomes_infinite_in_silence(device):
    backend = Variant(device, "fp16").backend()
    there = backend.from_host(np.array([[1e6, -1e6, np.nan, 1.5]]), "compute")
    np.testing.assert_array_equal(backend.to_host(there), np.array([[np.inf, -np.inf, np.nan, 1.5]], np.float32))


class Foreign:
    """An array of another library on the card, as far as its interface shows it."""

    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self.array = array


class Shared:
    """An array of another library that speaks DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("layout", ["plain", "transposed", "stepped"])
@pytest.mark.parametrize("device", PLACES)
def test_foreign_arrays_go_in_without_a_copy_and_as_they_lie(device, layout):
    values, variant = Values(6, Variant(device, "fp32")), Variant(device, "fp32")
    backend = variant.backend()
    x, w, b = values.normal(7, 6), values.normal(4, 6), values.normal(4)

    def there(array):
        rows, columns = array.shape
        flat = backend.allocate(4 * array.size, "real")
        strides = {"plain": (columns, 1), "transposed": (1, rows), "stepped": (4 * columns, 2)}[layout]
        view = backend.strided(flat, 0, array.shape, strides)
        backend.copy_into(view, array)
        return view

    y = there(np.zeros((7, 4), np.float32))
    operands = {"x": Foreign(there(x)), "w": Foreign(there(w)), "b": backend.from_host(b), "y": Foreign(y)}
    backend.bind("linear", **operands, activation="identity")()
    check_linear(variant, backend.to_host(y), x, w, b)


@ON_THE_HOST
def test_dlpack_goes_in_without_a_copy(device):
    """Here the memory of the card is the host's, so that NumPy can be the other library."""
    backend = Variant(device, "fp32").backend()
    x, w = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2], np.ones((1, 2), np.float32)
    y = np.zeros((3, 1), np.float32)
    operands = {"x": Shared(x), "w": Shared(w), "y": Shared(y), "b": Shared(np.zeros(1, np.float32))}
    backend.bind("linear", **operands, activation="identity")()
    np.testing.assert_array_equal(y[:, 0], x.sum(axis=1))


@pytest.mark.parametrize("device", PLACES)
def test_what_cannot_be_bound_is_refused_with_the_operands_name(device):
    backend = Variant(device, "fp32").backend()
    x, w, b = (backend.from_host(np.zeros(shape, np.float32)) for shape in ((3, 4), (2, 4), 2))
    y = backend.from_host(np.zeros((3, 2), np.float32))
    good = {"x": x, "w": w, "b": b, "y": y, "activation": "relu"}
    for changed, error, said in (
        ({"x": np.zeros((3, 4), np.float32)}, DTypeError, "x: expected an array on the card, of CuPy or with __cuda"),
        ({"x": backend.from_host(np.zeros((3, 5), np.float32))}, ShapeError, r"x: expected shape \(3, 4\), got \(3, 5"),
        ({"b": backend.allocate(2, "float64")}, DTypeError, "b: expected float32, got float64; use b.astype"),
        ({"y": backend.strided(b, 0, (3, 2), (0, 1))}, ArgumentError, r"y: is broadcast \(stride 0\)"),
        ({"activation": "rleu"}, ArgumentError, "did you mean 'relu'"),
        ({"activation": "prelu"}, ArgumentError, "slope_param: prelu needs its slope"),
        ({"rows": backend.allocate(3, "int64")}, ArgumentError, "counters: rows needs them"),
    ):
        with pytest.raises(error, match=said):
            backend.bind("linear", **(good | changed))
    with usable(device):
        for name, precision, said in (
            ("cuda:99", "fp32", "expected 'cuda' or 'cuda:0' to 'cuda:"),
            ("cpu", "fp32", "expected a name such as 'cuda' or 'cuda:0', got 'cpu'"),
            (None, "bf16", "offers fp32, tf32, fp16, got 'bf16'"),
        ):
            with pytest.raises(BackendUnavailableError, match=said):
                Engine(MLP([2, 2]), backend="cupy", device=name, precision=precision)


@ON_THE_HOST
def test_another_card_than_the_current_is_refused(device, monkeypatch):
    Variant(device, "fp32").backend()
    from fusemlp_kernels.cupy import device as module

    monkeypatch.setattr(module.cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    with pytest.raises(BackendUnavailableError, match=r"current card is cuda:0, got 'cuda:1': call cupy.cuda.Device"):
        module.Device("cuda:1", "fp32")
    assert module.Device("cuda:0", "fp32").device == "cuda:0"


@pytest.mark.parametrize("precision", STAND_IN.precisions)
@pytest.mark.parametrize("device", PLACES)
def test_a_graph_is_the_eager_plan_bitwise(device, precision):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((70, 6)).astype(np.float32), rng.integers(0, 3, 70)
    snapshots = []
    for plan in ("graph", "eager"):
        with usable(device):
            engine = Engine(
                MLP([6, 9, 3], activation="gelu", dropout=0.2), optimizer=Adam(0.05), batch_size=16, seed=3,
                backend="cupy", precision=precision, plan=plan,
            )  # fmt: skip
        engine.fit(x, y, epochs=3)
        assert engine.update_count == 15
        snapshots.append(engine.memory.snapshot())
    assert_same(*snapshots)


@ON_THE_HOST
@pytest.mark.parametrize("refused", [False, True])
def test_an_error_in_a_capture_is_the_one_that_is_raised(device, refused):
    """And not that of the capture which it ends; another capture can follow."""
    backend = Variant(device, "fp32").backend()
    array = backend.allocate(4, "real")

    def fails():
        array.fill(1)
        if refused:
            backend.synchronize()
        raise ValueError("in the middle of a step")

    with pytest.raises(RuntimeError if refused else ValueError, match="waiting while" if refused else "the middle"):
        backend.capture(fails, 1)
    assert not backend.to_host(array).any()
    backend.capture(lambda: array.fill(2), 1)()
    assert (backend.to_host(array) == 2).all()


@ON_THE_HOST
def test_an_engine_on_another_stream_waits_for_the_one_that_filled_it(device):
    with usable(device):
        engine = Engine(MLP([6, 3]), batch_size=8, backend="cupy", plan="eager")
    from cupy_standin import streams

    other, before = streams.Stream(non_blocking=True), streams.get_current_stream()
    x, y = np.ones((8, 6), np.float32), np.arange(8) % 3
    del streams.WAITS[:]
    with other:
        engine.predict(x)
        assert [(other, before)] == streams.WAITS
        engine.step(x, y)
        # work that a graph of the caller's holds waits where the graph is launched
        other.begin_capture()
        assert engine.memory is not None
        other.end_capture()
        assert len(streams.WAITS) == 1
    assert engine.update_count == 1 and [(before, other)] == streams.WAITS[1:]


@pytest.mark.parametrize("device", PLACES)
def test_a_step_allocates_nothing(device, monkeypatch):
    with usable(device):
        engine = Engine(MLP([6, 9, 3], dropout=0.2), optimizer=Adam(0.05), batch_size=16, backend="cupy", plan="eager")
    engine.step(np.ones((16, 6), np.float32), np.arange(16) % 3)
    step = next(iter(engine.programs.staged.values()))
    from fusemlp_kernels.cupy import device as module

    def refused(*arguments, **options):
        raise AssertionError("an array was allocated")

    for name in ("zeros", "asarray"):
        monkeypatch.setattr(module.cupy, name, refused)
    step.run()
    engine.memory.backend.synchronize()
