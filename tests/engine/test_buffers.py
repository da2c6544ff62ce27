"""Memory: tensors at aligned places in arenas, and a workspace that values share by liveness."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import BACKENDS, cases, inference_program, planned, training_program

from fusemlp import MLP, SGD, Engine
from fusemlp.program.layout import (
    ALIGNMENT_BYTES,
    Layout,
    Place,
    allocate,
    parameter_layout,
    plan_workspace,
    short_names,
)
from fusemlp.program.program import Value
from fusemlp_kernels.registry import TRAITS, backend

CASES = settings(max_examples=200, deadline=None, derandomize=True, database=None)
NET = MLP([6, 5, 4, 3], activation=["prelu", "relu"])
widths = st.integers(1, 70)


def test_parameters_have_short_names():
    names = {"w0": "0.weight", "b0": "0.bias", "s0": "1.weight", "w1": "2.weight", "b1": "2.bias"}
    assert short_names(NET) == {**names, "w2": "4.weight", "b2": "4.bias"}


@CASES
@given(st.lists(widths, min_size=2, max_size=5), st.sampled_from([1, 8]), st.sampled_from([4, 8]))
def test_tensors_lie_apart_and_aligned(sizes, row_multiple, item_bytes):
    layout = parameter_layout(MLP(sizes), row_multiple=row_multiple, item_bytes=item_bytes)
    end = 0
    for short, place in layout.places.items():
        assert place.offset * item_bytes % ALIGNMENT_BYTES == 0
        # No larger gap than alignment needs.
        assert end <= place.offset < end + ALIGNMENT_BYTES // item_bytes
        end = place.offset + place.size
        assert place.shape == MLP(sizes).parameter_shapes()[short_names(MLP(sizes))[short]]
    assert end <= layout.size < end + ALIGNMENT_BYTES // item_bytes


@pytest.mark.parametrize("width, pitch", [(1, 8), (7, 8), (8, 8), (9, 16), (784, 784)])
def test_the_pitch_of_a_matrix_is_its_width_rounded_up(width, pitch):
    layout = Layout.of({"w": (3, width), "b": (width,)}, row_multiple=8, item_bytes=4)
    assert layout.places["w"] == Place(0, (3, width), pitch) and layout.places["w"].size == 3 * pitch
    # a vector has no rows to align
    assert layout.places["b"].pitch == layout.places["b"].size == width


@pytest.mark.parametrize("row_multiple", [1, 8])
def test_views_are_windows_of_the_arena(row_multiple):
    device = backend("numpy", None, "fp32")
    layout = parameter_layout(NET, row_multiple=row_multiple, item_bytes=4)
    arena = device.allocate(layout.size, "real")
    views = layout.views(device, arena)
    for number, (short, view) in enumerate(views.items(), 1):
        assert view.shape == layout.places[short].shape
        assert np.shares_memory(view, arena)
        assert view.ctypes.data % ALIGNMENT_BYTES == 0
        view[...] = number
    # No view overlaps another, and padding is still zero.
    for number, view in enumerate(views.values(), 1):
        assert np.all(view == number)
    assert np.count_nonzero(arena) == NET.parameter_count


def test_gradients_and_states_have_the_layout_of_the_parameters():
    engine = Engine(NET, optimizer=SGD(0.1, momentum=0.9, clip_norm=1.0), backend="numpy")
    memory = engine.memory
    (state,) = memory.states
    for arena, named in ((memory.params, "{}"), (memory.grads, "d{}"), (state, "{}.state0")):
        assert arena.shape == (memory.layout.size,)
        for short, place in memory.layout.places.items():
            view = memory.arrays[named.format(short)]
            assert view.shape == place.shape
            assert view.ctypes.data - arena.ctypes.data == place.offset * arena.itemsize


@CASES
@given(cases())
def test_what_a_call_reads_is_still_what_was_written(case):
    """Run the program on memory that holds names: every element that is read must have the expected name."""
    net, name, program = case
    places = planned(program, net, name)
    memory = {arena: {} for arena, _, _ in places.values()}

    def stretch(value):
        arena, start, stop = places[value]
        return memory[arena], range(start, stop)

    def fill(value):
        cells, indices = stretch(value)
        cells.update(dict.fromkeys(indices, value))

    def holds(value):
        cells, indices = stretch(value)
        return all(cells.get(index) == value for index in indices)

    def placed(names):
        return [value for name in names for value in program.members(name) if value in places]

    for value in program.values.values():
        if value.kind in ("parameter", "state"):
            cells, indices = stretch(value.name)
            assert not any(index in cells for index in indices)
            fill(value.name)
    for call in program.calls:
        assert all(map(holds, placed(call.reads))), "a value was overwritten"
        for value in placed(call.writes):
            fill(value)
        assert all(map(holds, placed(call.writes))), "two outputs of a call overlap"


@CASES
@given(cases())
def test_workspace_values_are_aligned_and_pitched(case):
    _, name, program = case
    multiple = TRAITS[name].row_multiple
    placed = plan_workspace(program, row_multiple=multiple)
    ranges, (places, sizes) = placed.ranges, placed
    assert ranges.keys() == places.keys() == {v.name for v in program.values.values() if v.kind == "work"}
    for value, (dtype, place) in places.items():
        item_bytes = {"int64": 8, "bool": 1}.get(dtype, 4)
        assert dtype == program.values[value].dtype
        assert place.offset * item_bytes % ALIGNMENT_BYTES == 0
        assert place.shape == program.values[value].shape
        if len(place.shape) == 2:
            assert place.pitch % multiple == 0
            assert place.shape[1] <= place.pitch < place.shape[1] + multiple
        assert place.offset + place.size <= sizes[dtype]
        assert ranges[value] == (f"workspace {dtype}", place.offset, place.offset + place.size)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_forward_pass_needs_two_activations_whatever_its_depth(name):
    sizes = {}
    for hidden in (2, 3, 8):
        program = inference_program(MLP([16] * (hidden + 2)), batch_size=64, backend=name)
        sizes[hidden] = plan_workspace(program, row_multiple=TRAITS[name].row_multiple).sizes["real"]
    assert sizes == {2: 2 * 64 * 16, 3: 2 * 64 * 16, 8: 2 * 64 * 16}


def test_a_training_step_shares_the_workspace_of_what_has_been_used():
    # h1 and h2 are needed to the end, but neither z nor dz of the layers above is
    program = training_program(MLP([32] * 7, activation="gelu"), batch_size=32, backend="triton")
    sizes = plan_workspace(program, row_multiple=8).sizes
    each = 32 * 32
    values = [v for v in program.values.values() if v.kind == "work"]
    assert sum(v.size for v in values) == (5 + 5 + 6) * each
    # h1 to h5 and dz1 to dz6 are read by the last call; each z makes room for the dz of its layer but the first
    assert sizes == {"real": (5 + 6 + 1) * each}


@pytest.mark.parametrize("dtype, kind", [("real", np.float32), ("int64", np.int64), ("bool", np.bool_)])
def test_an_array_of_its_own_is_zeroed_and_aligned(dtype, kind):
    for shape in ((7,), (7, 3)):
        array = allocate(backend("numpy", None, "fp32"), Value("x", shape, dtype, "data"))
        assert (array.shape, array.dtype) == (shape, kind)
        assert array.ctypes.data % ALIGNMENT_BYTES == 0 and not array.any()
