"""Each pass by itself: what it adds to the plain program of a step, and that the step without it stays as it was."""

from __future__ import annotations

import pytest
from lowered import BACKENDS, training_program

from fusemlp import MLP, SGD, Adam
from fusemlp.program.passes import BatchAttack, ClipAndNoise, Penalty, SumOverRanks
from fusemlp.program.program import Sharding
from fusemlp.program.verifier import verify
from fusemlp_kernels.contract import Noise, Perturbation, Ridge

PLAIN = ["linear", "linear_loss_grad", "grad_input"]
ATTACK = ["perturb", *2 * [*PLAIN, "grad_input", "perturb"]]
PASSES = {
    "attack": (BatchAttack(2, Perturbation(0.1, 0.1)), [*ATTACK, *PLAIN]),
    "privacy": (ClipAndNoise(1.0, Noise(1.0, 8.0, 0)), [*PLAIN, "clip_examples", "grad_weight", "update"]),
    "penalty": (Penalty(Ridge(0.1)), [*PLAIN, "grad_weight", "penalty", "update"]),
    "ranks": (SumOverRanks(Sharding("ordered", 2)), [*PLAIN, "grad_weight", "all_reduce", "update"]),
}


def ops(program):
    return [call.op for call in program.calls]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_adds_its_calls_to_the_plain_program(name, backend):
    change, expected = PASSES[name]
    plain = training_program(MLP([6, 5, 4]), optimizer=SGD(0.1), backend=backend)
    program = training_program(MLP([6, 5, 4]), optimizer=SGD(0.1), backend=backend, passes=(change,))
    verify(program)
    assert ops(plain)[:3] == PLAIN
    assert ops(program) == expected + (ops(plain)[3:] if name == "attack" else [])


def test_passes_follow_one_another():
    """An attack moves the batch that a penalised step trains on, in either order."""
    attack, penalty = PASSES["attack"][0], PASSES["penalty"][0]
    first, second = (
        training_program(MLP([6, 5, 4]), optimizer=Adam(), passes=passes, resident=True)
        for passes in ((attack, penalty), (penalty, attack))
    )
    verify(first)
    assert ops(first) == [*ATTACK, *PLAIN, "grad_weight", "penalty", "update"]
    assert first.structure.program.calls == second.calls
    # the loss is counted once
    assert sum("stats" in call.operands for call in first.calls if "loss" in call.operands) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_an_attack_nothing_else_reads_the_batch(backend):
    program = training_program(MLP([6, 5, 4]), backend=backend, passes=(PASSES["attack"][0],))
    assert [call.op for call in program.calls if "x" in call.reads] == ["perturb"] * 3
    assert "gathered" not in program.values


def test_what_changes_the_gradients_keeps_the_update_apart():
    """Gradients that another call changes have another norm, and no stretches of the batch."""
    options = {"batch_size": 4096, "rows": 9000, "backend": "triton", "most_parts": 8}
    for optimizer in (SGD(0.1), SGD(0.1, clip_norm=1.0)):
        *_, gradients, between, update = training_program(
            MLP([6, 5, 4]), optimizer=optimizer, passes=(PASSES["ranks"][0],), **options
        ).calls
        assert between.op == "all_reduce"
        assert {"norm", "parts"}.isdisjoint({*gradients.operands, *update.operands})
