"""The verifier passes every lowered program, and no broken one."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lowered import FROZEN, cases, inference_program, planned, training_program

from fusemlp import MLP, SGD, Adam
from fusemlp.program.passes import BatchAttack, Penalty
from fusemlp.program.program import Call, Ref, Value
from fusemlp.program.verifier import ProgramError, lifetimes, verify
from fusemlp_kernels.contract import Perturbation, Ridge, Segment, TensorRule

CASES = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# Equal widths give all values the same shape, so that only the order of calls is wrong.
SQUARE = MLP([4, 4, 4, 4], activation=["relu", "prelu"], dropout=[0.0, 0.5])
NET = MLP([6, 5, 4, 3], activation=["relu", "prelu"], dropout=[0.0, 0.5])
MOMENTUM = SGD(0.1, momentum=0.9)
CLIPPED = SGD(0.1, momentum=0.9, clip_norm=1.0)
PARTLY_FROZEN = SGD(0.1, per_parameter={"2.weight": FROZEN})
PROGRAMS = {
    "fused": (NET, training_program(NET, optimizer=MOMENTUM)),
    "clipped": (NET, training_program(NET, optimizer=CLIPPED)),
    "partly frozen": (NET, training_program(NET, optimizer=PARTLY_FROZEN)),
    "all frozen": (NET, training_program(NET, optimizer=SGD(0.1, per_parameter={"*": FROZEN}))),
    "adam": (NET, training_program(NET, optimizer=Adam())),
    "against an attack": (
        NET,
        training_program(NET, optimizer=MOMENTUM, passes=(BatchAttack(2, Perturbation(0.1, 0.1)),)),
    ),
    "forward": (NET, inference_program(NET)),
    "forward and loss": (NET, inference_program(NET, "cross_entropy")),
}


@CASES
@given(cases())
def test_every_lowered_program_passes_with_its_planned_memory(case):
    net, backend, program = case
    verify(program)
    verify(program, planned(program, net, backend))


@pytest.mark.parametrize("net, program", PROGRAMS.values(), ids=PROGRAMS.keys())
class TestEveryCallCounts:
    """No two calls can be swapped, and none can be omitted or repeated."""

    def test_swapped(self, net, program):
        places = planned(program, net)
        for i, j in itertools.combinations(range(len(program.calls)), 2):
            calls = list(program.calls)
            calls[i], calls[j] = calls[j], calls[i]
            if tuple(calls) == program.calls:
                # the steps of an attack have the same calls
                continue
            with pytest.raises(ProgramError):
                verify(replace(program, calls=tuple(calls)), places)

    def test_dropped_or_made_twice(self, net, program):
        places = planned(program, net)
        for i in range(len(program.calls)):
            for again in ((), 2 * program.calls[i : i + 1]):
                calls = (*program.calls[:i], *again, *program.calls[i + 1 :])
                with pytest.raises(ProgramError):
                    verify(replace(program, calls=calls), places)


@CASES
@given(cases(), st.data())
def test_a_random_program_with_two_calls_swapped_or_one_dropped_fails(case, data):
    net, backend, program = case
    places = planned(program, net, backend)
    calls = list(program.calls)
    i = data.draw(st.integers(0, len(calls) - 1))
    j = data.draw(st.integers(0, len(calls) - 1))
    if i == j:
        # a penalty of strength 0 changes nothing
        assume(calls[i].op != "penalty" or calls[i].operands["ridge"].strength)
        del calls[i]
    else:
        calls[i], calls[j] = calls[j], calls[i]
    with pytest.raises(ProgramError):
        verify(replace(program, calls=tuple(calls)), places)


def test_a_penalty_may_not_be_left_out():
    net = MLP([1, 2], output_activation="identity")
    program = training_program(
        net, "binary_cross_entropy", backend="triton", resident=True, passes=(Penalty(Ridge(0.1)),)
    )
    calls = [call for call in program.calls if call.op != "penalty"]
    assert len(calls) == len(program.calls) - 1
    with pytest.raises(ProgramError, match="no call adds the penalty"):
        verify(replace(program, calls=tuple(calls)), planned(program, net, "triton"))


def call_named(program, op, last=False):
    found = [index for index, call in enumerate(program.calls) if call.op == op]
    return found[-1 if last else 0]


def changed(program, op, *, last=False, **operands):
    """Return ``program`` with some operands of the first (or last) call of ``op`` replaced."""
    index = call_named(program, op, last)
    call = program.calls[index]
    call = replace(call, operands={**call.operands, **operands})
    return replace(program, calls=(*program.calls[:index], call, *program.calls[index + 1 :]))


def changed_layer(program, layer, op="grad_weight_update", **operands):
    """Return ``program`` with some operands of one layer of the grouped call replaced."""
    layers = list(program.calls[call_named(program, op)].operands["layers"])
    layers[layer] = {**layers[layer], **operands}
    return changed(program, op, layers=tuple(layers))


def valued(program, name, **changes):
    """Return ``program`` with a value's declaration changed."""
    return replace(program, values={**program.values, name: replace(program.values[name], **changes)})


def without(program, name):
    return replace(program, values={key: value for key, value in program.values.items() if key != name})


FUSED = training_program(NET, optimizer=MOMENTUM)
WHOLE = training_program(NET, optimizer=CLIPPED)
EQUAL = training_program(SQUARE, optimizer=SGD(0.1), batch_size=4, rows=4)
FORWARD = inference_program(NET, "cross_entropy")
ADVANCE = replace(PROGRAMS["all frozen"][1].calls[-1])


def early_update():
    """Update the last layer in its own call, before ``grad_input`` has read its weights."""
    grouped = FUSED.calls[-1]
    *first, last = grouped.operands["layers"]
    own = replace(grouped, operands={**grouped.operands, "layers": (last,), "slopes": ()})
    rest = replace(grouped, operands={**grouped.operands, "layers": tuple(first)})
    position = call_named(FUSED, "grad_input")
    return replace(FUSED, calls=(*FUSED.calls[:position], own, *FUSED.calls[position:-1], rest))


def early_slope_update():
    """Update the slope of a PReLU before ``grad_input`` has used it for its layer's dz."""
    grouped = FUSED.calls[-1]
    own = replace(grouped, operands={**grouped.operands, "layers": ()})
    rest = replace(grouped, operands={**grouped.operands, "slopes": ()})
    return replace(FUSED, calls=(FUSED.calls[0], own, *FUSED.calls[1:-1], rest))


def update_layer_twice():
    layers = FUSED.calls[-1].operands["layers"]
    return changed(FUSED, "grad_weight_update", layers=(*layers, layers[0]))


def segments_of(program):
    return program.calls[-1].operands["segments"]


BROKEN = {
    "unknown op": (replace(FUSED, calls=(Call("lineal", {}), *FUSED.calls)), r"call 0 \(lineal\): there is no such op"),
    "undeclared value": (without(FUSED, "h1"), r"call 0 \(linear\): value 'h1' is not declared"),
    "undeclared value in an arena": (without(WHOLE, "dw1"), "value 'dw1' is not declared"),
    "unknown kind": (valued(FUSED, "h1", kind="temporary"), "'h1': unknown kind 'temporary'"),
    "unknown element type": (valued(FUSED, "h1", dtype="float16"), "'h1': unknown element type 'float16'"),
    "read before written": (changed(EQUAL, "linear", last=True, x=Ref("dz1")), "reads 'dz1', which no call before"),
    "weight updated before its last reader": (early_update(), "reads 'w2' after call 3 has updated it"),
    "slope updated before its gradient is there": (early_slope_update(), "reads 'dslope1', which no call before"),
    "weight never updated": (changed_layer(FUSED, 1, w=None), "nothing updates w1"),
    "bias never updated": (changed_layer(FUSED, 2, b=None), "nothing updates b2"),
    "slope never updated": (changed(FUSED, "grad_weight_update", slopes=()), "nothing updates s1"),
    "nothing updated at all": (replace(WHOLE, calls=WHOLE.calls[:-1]), "nothing updates b0, b1, b2, s1, w0, w1, w2"),
    "gradient of a weight never made": (changed_layer(WHOLE, 0, "grad_weight", dw=None), "reads 'dw0', which no call"),
    "updated twice by one call": (update_layer_twice(), "writes 'w0' twice"),
    "updated twice by two calls": (
        replace(FUSED, calls=(*FUSED.calls, FUSED.calls[-1])),
        "after call 5 has updated it",
    ),
    "frozen weight updated": (replace(FUSED, trainable=FUSED.trainable - {"w1"}), "updates 'w1', which is frozen"),
    "frozen slope updated": (replace(FUSED, trainable=FUSED.trainable - {"s1"}), "updates 's1', which is frozen"),
    "writes the caller's features": (changed(EQUAL, "linear", y=Ref("x")), "writes 'x', which belongs to the caller"),
    "writes the caller's targets": (
        changed(training_program(SQUARE, "mse", SGD(0.1), 4, rows=4), "linear_loss_grad", dz=Ref("target")),
        "writes 'target', which belongs to the caller",
    ),
    "features never read": (
        replace(FORWARD, values={**FORWARD.values, "more": Value("more", (8, 2), "real", "data")}),
        "no call reads 'more'",
    ),
    "declared and never written": (
        replace(FORWARD, values={**FORWARD.values, "more": Value("more", (8, 2), "real", "work")}),
        "no call writes 'more'",
    ),
    "a weight as an output": (changed(EQUAL, "linear", y=Ref("w0")), "y 'w0' is of kind 'parameter', expected 'work'"),
    "dz overwrites h": (changed(EQUAL, "linear_loss_grad", dz=Ref("h1")), "writes 'h1', which call 0 has written"),
    "dz_prev overwrites h": (changed(EQUAL, "grad_input", dz_prev=Ref("h2")), "writes 'h2', which call 1 has written"),
    "clock advanced twice": (replace(WHOLE, calls=(*WHOLE.calls, ADVANCE)), r"advanced by calls \[6, 7\]"),
    "clock advanced before the end": (replace(FUSED, calls=(ADVANCE, *FUSED.calls)), r"advanced by calls \[0, 6\]"),
    "clock never advanced": (
        replace(PROGRAMS["all frozen"][1], calls=PROGRAMS["all frozen"][1].calls[:-1]),
        "no call advances the clock",
    ),
    "x too narrow": (valued(FUSED, "x", shape=(20, 5)), r"x 'x' has shape \(20, 5\), expected \(20, 6\)"),
    "weights transposed": (valued(FUSED, "w1", shape=(5, 4)), "call 1"),
    "a target too few": (valued(FUSED, "target", shape=(19,)), r"target 'target' has shape \(19,\), expected \(20,\)"),
    "dz of another layer": (changed_layer(FUSED, 0, dz=Ref("dz3")), r"w 'w0' has shape \(5, 6\), expected \(3, 6\)"),
    "slope of several elements": (
        valued(FUSED, "s1", shape=(2,)),
        r"slope_param 's1' has shape \(2,\), expected \(1,\)",
    ),
    "real where integers are needed": (valued(FUSED, "rows", dtype="real"), "rows 'rows' is real, expected int64"),
    "mask of reals": (valued(FUSED, "keep2", dtype="real"), "keep 'keep2' is real, expected bool"),
    "operand missing": (
        replace(FUSED, calls=(replace(FUSED.calls[0], operands={"x": Ref("x")}), *FUSED.calls[1:])),
        r"call 0 \(linear\): operand 'w' is missing",
    ),
}


@pytest.mark.parametrize("program, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_program_is_refused(program, message):
    with pytest.raises(ProgramError, match=message):
        verify(program)


def on_top(places, name, other):
    """Return a layout in which ``name`` begins at the place of ``other``."""
    arena, start, _ = places[other]
    return {**places, name: (arena, start, start + places[name][2] - places[name][1])}


def shorter(places, name):
    arena, start, stop = places[name]
    return {**places, name: (arena, start, stop - 1)}


PLACES = planned(FUSED, NET)
WHOLE_PLACES = planned(WHOLE, NET)
MISPLACED = {
    "two live values in one place": (FUSED, on_top(PLACES, "h2", "h1"), "'h[12]' .* share memory"),
    "overlapping by one element": (
        FUSED,
        {**PLACES, "h1": ("elsewhere", 0, 40), "h2": ("elsewhere", 39, 71)},
        "'h1' .* and 'h2' .* share memory of 'elsewhere' from element 39",
    ),
    "two weights in one place": (FUSED, on_top(PLACES, "w1", "w0"), "'w[01]' .* share memory of 'parameter'"),
    "two states in one place": (FUSED, on_top(PLACES, "w1.state0", "w0.state0"), "share memory of 'state0'"),
    "two gradients in one place": (WHOLE, on_top(WHOLE_PLACES, "dw1", "dw0"), "share memory of 'gradient'"),
    "a weight in the workspace": (FUSED, on_top(PLACES, "w1", "h1"), "share memory"),
    "no memory": (FUSED, {k: v for k, v in PLACES.items() if k != "h1"}, "'h1' has no memory"),
    "a weight without memory": (FUSED, {k: v for k, v in PLACES.items() if k != "w1"}, "'w1' has no memory"),
    "too little memory": (FUSED, shorter(PLACES, "h1"), "'h1' needs 40 elements, it has 39"),
    "too little memory for a weight": (FUSED, shorter(PLACES, "w0"), "'w0' needs 30 elements, it has 29"),
    "no room at all": (FUSED, {**PLACES, "h1": ("elsewhere", 5, 5)}, "'h1' needs 40 elements, it has 0"),
    "a segment left out": (
        changed(WHOLE, "update", segments=segments_of(WHOLE)[1:]),
        WHOLE_PLACES,
        "no segment updates w0",
    ),
    "a segment twice": (
        changed(WHOLE, "update", segments=(*segments_of(WHOLE), segments_of(WHOLE)[-1])),
        WHOLE_PLACES,
        "updates 'b2' twice",
    ),
    "a segment too short": (
        changed(WHOLE, "update", segments=(replace(segments_of(WHOLE)[0], size=29), *segments_of(WHOLE)[1:])),
        WHOLE_PLACES,
        "is no tensor's",
    ),
    "a segment of nothing": (
        changed(WHOLE, "update", segments=(*segments_of(WHOLE), Segment(10**6, 4, TensorRule()))),
        WHOLE_PLACES,
        "is no tensor's",
    ),
    "a segment that is frozen": (
        replace(WHOLE, trainable=WHOLE.trainable - {"w1"}),
        WHOLE_PLACES,
        "'w1', which is frozen",
    ),
}


@pytest.mark.parametrize("program, places, message", MISPLACED.values(), ids=MISPLACED.keys())
def test_a_misplaced_value_is_refused(program, places, message):
    with pytest.raises(ProgramError, match=message):
        verify(program, places)


def test_values_that_do_not_meet_may_share():
    program = inference_program(MLP([4, 4, 4, 4]))
    places = planned(program, MLP([4, 4, 4, 4]))
    # h1 is read by call 1, y is written by call 2
    assert lifetimes(program) == {"h1": (0, 1), "h2": (1, 2), "y": (2, 2)}
    verify(program, on_top(places, "y", "h1"))
