"""A step as a printed program: its columns, its figures, and the number of its calls."""

import itertools
import sys

import pytest
from lowered import BACKENDS, FROZEN, inference_program, training_program

from fusemlp import MLP, SGD, Adam, AdamW, ArgumentError, Engine
from fusemlp.program.passes import Penalty
from fusemlp.program.program import scaled
from fusemlp.program.verifier import verify
from fusemlp.runtime.plans import planned
from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, STATS, Ridge

TUTORIAL = MLP([784, 128, 10])
COLUMNS = ("#", "call", "reads", "writes", "M x N x K", "flops", "bytes")


def table(program):
    """Return the printed program as a dict of columns, with a list of cells each, and its last line."""
    header, *lines, last = str(program).splitlines()
    starts = [header.index("call"), *(header.index(name) for name in COLUMNS[2:5])]
    # the last two columns are flush right: they end where their names end
    ends = [header.index("flops") + len("flops"), len(header)]
    cuts = [0, *starts, max(header.index("flops"), ends[0] - 5), ends[0], ends[1]]
    cells = [[line[a:b].strip() for a, b in itertools.pairwise(cuts)] for line in lines]
    return {name: [row[i] for row in cells] for i, name in enumerate(COLUMNS)}, last


def test_a_step_of_two_layers_is_four_launches():
    shown, last = table(training_program(TUTORIAL, "cross_entropy", "sgd", 128, "triton", rows=60000))
    assert last == "4 launches"
    assert shown["#"] == ["0", "1", "2", "3"]
    calls = ["linear relu", "linear_loss_grad cross_entropy", "grad_input relu", "grad_weight_update sgd"]
    assert shown["call"] == calls
    assert shown["reads"] == ["x[rows] w0 b0", "h1 w1 b1 target[rows]", "dz2 w1 h1", "dz1 x[rows] w0 b0 dz2 h1 w1 b1"]
    assert shown["writes"] == ["h1", "loss dz2", "dz1", "w0 b0 w1 b1"]
    assert shown["M x N x K"] == ["128x128x784", "128x10x128", "128x128x10", "128x784x128 10x128x128"]
    # a multiplication and an addition for each element of each product
    assert shown["flops"] == ["25.7M", "328k", "328k", "26M"]


def test_bytes_are_those_of_what_is_read_and_written():
    program = training_program(TUTORIAL, "cross_entropy", "sgd", 128, "triton", rows=60000)
    real, integer = 4, 8
    x, h1, dz = 128 * 784 * real, 128 * 128 * real, 128 * 10 * real
    w0, w1 = (784 * 128 + 128) * real, (128 * 10 + 10) * real
    rows, counters, stats, hyper = (integer * count for count in (128, COUNTERS, STATS, HYPER))
    # The 128 rows that are read count, not all 60000.
    assert program.traffic(program.calls[0]) == x + w0 + rows + counters + h1
    assert program.traffic(program.calls[1]) == h1 + w1 + rows + 128 * integer + counters + 2 * stats + dz
    assert program.traffic(program.calls[2]) == dz + w1 - 10 * real + 2 * h1
    # of the table of rates two rows, whatever it holds
    rates = 2 * RATE_COLUMNS * 8
    update = x + h1 + dz + h1 + rows + rates + 2 * (w0 + w1 + counters + hyper)
    assert program.traffic(program.calls[3]) == update


def test_double_precision_doubles_the_bytes_of_reals():
    single, double = (training_program(TUTORIAL, real_bytes=size) for size in (4, 8))
    assert double.bytes_of("w0") == 2 * single.bytes_of("w0") == 2 * 4 * 784 * 128
    assert double.bytes_of("params") == 2 * single.bytes_of("params") == 8 * TUTORIAL.parameter_count
    assert double.bytes_of("target") == single.bytes_of("target") == 8 * 20


def test_flops_of_a_step_are_three_products_a_layer_but_one():
    program = training_program(MLP([7, 5, 4, 3]), batch_size=6)
    one_each = 2 * 6 * (7 * 5 + 5 * 4 + 4 * 3)
    assert sum(call.flops for call in program.calls) == 3 * one_each - 2 * 6 * 7 * 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[4, 3], [6, 5, 4], [6, 5, 4, 3], [3, 3, 3, 3, 3]], ids=str)
class TestLaunches:
    """A network of L layers trains in 2L calls; in one more where the whole gradient is needed first, as on CuPy."""

    def test_plain(self, sizes, backend):
        program = training_program(MLP(sizes), "cross_entropy", SGD(0.1), 8, backend)
        assert program.launches == 2 * (len(sizes) - 1) + (backend == "cupy")
        assert str(program).endswith(f"\n{program.launches} launches")

    @pytest.mark.parametrize("optimizer", [SGD(0.1, clip_norm=1.0), Adam(clip_norm=1.0), AdamW(accumulate=2)], ids=repr)
    def test_with_clipping_or_accumulation(self, sizes, backend, optimizer):
        program = training_program(MLP(sizes), "cross_entropy", optimizer, 8, backend)
        assert program.launches == 2 * (len(sizes) - 1) + 1
        assert [call.op for call in program.calls[-2:]] == ["grad_weight", "update"]

    def test_forward(self, sizes, backend):
        program = inference_program(MLP(sizes), backend=backend)
        assert program.launches == len(sizes) - 1
        assert str(program).endswith("\n1 launch") == (len(sizes) == 2)
        assert inference_program(MLP(sizes), "cross_entropy", backend=backend).launches == len(sizes) - 1


@pytest.mark.parametrize("backend, launches", [("triton", 4), ("cupy", 5), ("numpy", 5)])
def test_adam_is_fused_where_that_is_quickest(backend, launches):
    assert training_program(MLP([6, 5, 4]), optimizer="adam", backend=backend).launches == launches


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", SGD(0.1, clip_norm=1.0)], ids=str)
def test_kept_gradients_stand_before_the_update(optimizer, backend):
    program = training_program(MLP([5, 4, 3]), optimizer=optimizer, backend=backend, keep_gradients=True)
    verify(program)
    assert [call.op for call in program.calls[-2:]] == ["grad_weight", "update"]
    # the update takes their norm, so that changes between the calls have an effect
    assert not [call.op for call in program.calls if "norm" in call.operands]


@pytest.mark.parametrize("backend, launches", [("triton", 5), ("cupy", 5), ("numpy", 4)])
def test_an_output_wider_than_a_tile_takes_a_call_of_its_own(backend, launches):
    program = training_program(MLP([6, 5, 1000]), backend=backend)
    assert program.launches == launches
    assert ("loss_grad" in [call.op for call in program.calls]) == (backend == "triton")


def test_below_the_first_trained_layer_no_gradient_is_computed():
    net = MLP([6, 5, 4, 3], activation="gelu", dropout=0.2)
    optimizer = SGD(0.1, per_parameter={"0.*": FROZEN, "2.*": FROZEN})
    program = training_program(net, optimizer=optimizer)
    assert [call.op for call in program.calls] == ["linear", "linear", "linear_loss_grad", "grad_weight_update"]
    assert "z1" not in program.values
    assert program.trainable == {"w2", "b2"}


def test_with_nothing_to_train_only_the_clock_goes_on():
    program = training_program(MLP([6, 5, 3]), optimizer=SGD(0.1, per_parameter={"*": FROZEN}))
    assert [call.op for call in program.calls] == ["linear", "linear_loss_grad", "advance"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_needs_no_backend(backend, monkeypatch):
    for library in ("triton", "torch", "cupy"):
        # an import of a module that is None in sys.modules raises
        monkeypatch.setitem(sys.modules, library, None)
    text = str(planned(TUTORIAL, loss="cross_entropy", optimizer="sgd", batch_size=128, backend=backend)[0])
    resident = backend == "numpy"
    ends = {"numpy": "4 calls, run as one loop over the steps: 1 launch", "triton": "4 launches", "cupy": "5 launches"}
    assert text.endswith(f"\n{ends[backend]}")
    expected = training_program(TUTORIAL, "cross_entropy", "sgd", 128, backend, rows=128, resident=resident)
    assert text == str(expected)


def test_the_engine_prints_the_program_of_its_backend():
    options = {"optimizer": SGD(0.1), "batch_size": 8, "backend": "numpy"}
    engine, eager = (Engine(MLP([6, 5, 4]), **options, plan=plan) for plan in ("auto", "eager"))
    assert str(engine.program) == str(planned(MLP([6, 5, 4]), **options)[0])
    assert engine.program.resident and len(engine.program.calls) == 4
    assert not eager.program.resident and eager.program.launches == 4
    with pytest.raises(ArgumentError, match="did you mean 'triton'"):
        planned(TUTORIAL, backend="tritn")


def test_a_penalty_is_a_call_between_the_gradients_and_the_update():
    given = {"optimizer": SGD(0.1), "resident": True}
    program = training_program(MLP([6, 5, 4]), passes=(Penalty(Ridge(0.1)),), **given)
    verify(program)
    assert [call.op for call in program.calls[-3:]] == ["grad_weight", "penalty", "update"]
    assert "penalty ridge" in str(program)
    assert program.calls[-2].writes == ("dw0", "dw1", "stats")
    # a divisor alone changes the loss
    program = training_program(MLP([6, 5, 4]), passes=(Penalty(Ridge(0.0, 2.0)),), **given)
    assert [call.op for call in program.calls[-2:]] == ["grad_input", "grad_weight_update"]
    assert program.calls[1].operands["ridge"] == Ridge(0.0, 2.0)
    # models that may share a launch have the same calls, whatever their numbers
    shared = [
        training_program(MLP([6, 5, 4]), backend="triton", passes=(Penalty(Ridge(number)),), **given)
        for number in (0.0, 0.1)
    ]
    assert shared[0].structure == shared[1].structure


def test_numbers_have_three_digits_and_a_prefix():
    numbers = (0, 7, 999, 1000, 25_690_112, 999_499, 999_500, 3.2e9, 5e15)
    assert [*map(scaled, numbers)] == ["0", "7", "999", "1k", "25.7M", "999k", "1M", "3.2G", "5e+03T"]
