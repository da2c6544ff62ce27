"""Programs of one structure are planned and verified once; those that differ in one field are not taken for another."""

import itertools
from dataclasses import replace

import pytest
from lowered import FROZEN, layout_of, training_program

from fusemlp import MLP, SGD, Adam, AdamW, CrossEntropy, LeakyReLU
from fusemlp.program.layout import REMEMBERED, placement, plan_workspace
from fusemlp.program.passes import Penalty
from fusemlp.program.program import Structure
from fusemlp.program.verifier import ProgramError
from fusemlp_kernels.contract import Ridge, Segment, TensorRule

NET = MLP([6, 5, 4, 3], activation=["relu", "tanh"], dropout=[0.0, 0.5])


def resident(net=NET, loss="cross_entropy", optimizer="adam", batch=8, **options):
    return training_program(net, loss, optimizer, batch, **{"resident": True, "seed": 0, **options})


# Each differs from the first in one thing that the verifier or the plan of the memory may look at.
RESIDENT = {
    "base": {},
    "width": {"net": MLP([6, 5, 5, 3], activation=["relu", "tanh"], dropout=[0.0, 0.5])},
    "layers": {"net": MLP([6, 5, 4, 4, 3], activation=["relu", "tanh", "tanh"], dropout=[0.0, 0.5, 0.0])},
    "activation": {"net": MLP([6, 5, 4, 3], activation=["tanh", "tanh"], dropout=[0.0, 0.5])},
    "slope": {"net": MLP([6, 5, 4, 3], activation=["prelu", "tanh"], dropout=[0.0, 0.5])},
    "without dropout": {"net": MLP([6, 5, 4, 3], activation=["relu", "tanh"])},
    "loss": {"loss": "mse"},
    "class weights": {"loss": CrossEntropy(class_weight=[1.0, 2.0, 1.0])},
    "soft": {"soft": True},
    "accuracy": {"accuracy": False},
    "reduction": {"loss": CrossEntropy(reduction="sum")},
    "ignored": {"loss": CrossEntropy(ignore_index=2)},
    "one state": {"optimizer": SGD(0.1, momentum=0.9)},
    "no state": {"optimizer": SGD(0.1)},
    "frozen weight": {"optimizer": Adam(per_parameter={"0.weight": FROZEN})},
    "frozen bias": {"optimizer": Adam(per_parameter={"0.bias": FROZEN})},
    "batch": {"batch": 7},
    "rows": {"rows": 21},
    "weighted": {"weighted": True},
    "precision": {"real_bytes": 8},
    "mixed": {"compute_bytes": 2},
    "penalised": {"passes": (Penalty(Ridge(0.5)),)},
}
# Each differs from the base in numbers alone.
NUMBERS = {
    "betas": {"optimizer": Adam(betas=(0.5, 0.6))},
    "weight decay": {"optimizer": AdamW(weight_decay=0.3)},
    "dropout": {"net": MLP([6, 5, 4, 3], activation=["relu", "tanh"], dropout=[0.0, 0.25])},
    "seed": {"seed": 4},
    "ridge": {"passes": (Penalty(Ridge(0.3, 2.0)),)},
    "smoothing": {"loss": CrossEntropy(label_smoothing=0.1)},
}
STEPS = {
    "base": {},
    "batch": {"batch_size": 7},
    "rows": {"rows": 21},
    "not indexed": {"indexed": False},
    "weighted": {"weighted": True},
    "soft": {"soft": True},
    "loss": {"loss": "mse"},
    "optimizer": {"optimizer": Adam()},
    "one state": {"optimizer": SGD(0.1, momentum=0.9)},
    "gradients": {"keep_gradients": True},
    "precision": {"real_bytes": 8},
}


def test_no_two_structures_that_differ_in_one_field_are_the_same():
    found = {f"resident, {name}": resident(**given) for name, given in RESIDENT.items()}
    for name, given in STEPS.items():
        found[f"step, {name}"] = training_program(NET, **given)
    for one, other in itertools.combinations(found, 2):
        assert found[one].structure != found[other].structure, f"{one} is taken for {other}"


def test_the_learning_rate_is_no_part_of_the_program():
    assert resident().calls == resident(optimizer=Adam(0.5)).calls


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_no_part_of_the_structure(name):
    base = resident(passes=(Penalty(Ridge(0.5)),)) if name == "ridge" else resident()
    other = resident(**NUMBERS[name])
    assert base.calls != other.calls
    assert Structure(base) == Structure(other)
    layout = layout_of(NET, "numpy")
    assert placement(base.structure, layout, row_multiple=1) is placement(other.structure, layout, row_multiple=1)


def test_a_fixed_slope_is_a_number():
    steep, flat = (resident(MLP([4, 3, 2], activation=LeakyReLU(slope))) for slope in (0.1, 0.2))
    assert steep.structure == flat.structure


def test_a_known_structure_has_the_places_that_are_planned_for_it():
    layout = layout_of(NET, "numpy")
    for _ in range(2):
        for given in STEPS.values():
            program = training_program(NET, **given)
            placed = placement(program.structure, layout_of(NET, "numpy", program.real_bytes), row_multiple=1)
            assert placed == plan_workspace(program, row_multiple=1)
    program = training_program(NET)
    wide = plan_workspace(program, row_multiple=8)
    assert placement(program.structure, layout, row_multiple=8) == wide != plan_workspace(program, row_multiple=1)


def broken_residents():
    """Programs that are wrong in one part of their structure, each with what the verifier says of it."""
    good = resident()
    *before, call = good.calls
    first, *others = call.operands["segments"]
    short = call.but(segments=(Segment(first.offset, first.size - 1, TensorRule()), *others))
    yield replace(good, calls=(*before, short)), "is no tensor's"
    yield replace(good, calls=(*before, replace(call, op="train"))), "there is no such op"
    yield replace(good, calls=(call, *before)), "reads 'd.0', which no call before it has written"
    yield replace(good, trainable=good.trainable - {"w0"}), "updates 'w0', which is frozen"
    kept = replace(good.values["stats"], kind="data")
    yield replace(good, values={**good.values, "stats": kept}), "writes 'stats', which belongs to the caller"


@pytest.mark.parametrize(("program", "said"), list(broken_residents()))
def test_what_is_wrong_is_refused_though_its_like_is_known(program, said):
    layout = layout_of(NET, "numpy")
    placement(resident().structure, layout, row_multiple=1)
    for _ in range(2):
        with pytest.raises(ProgramError, match=said):
            placement(program.structure, layout, row_multiple=1)


def test_parameters_that_lie_elsewhere_are_verified_again():
    layout = layout_of(NET, "numpy")
    placement(resident().structure, layout, row_multiple=1)
    moved = replace(layout, places={**layout.places, "b1": replace(layout.places["b1"], offset=0)})
    with pytest.raises(ProgramError, match="share memory"):
        placement(resident().structure, moved, row_multiple=1)


def test_only_so_many_structures_are_remembered():
    assert placement.cache_parameters()["maxsize"] == REMEMBERED
