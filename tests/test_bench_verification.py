"""Every installed contender trains as the oracle does, and any other training is refused."""

import functools
from dataclasses import replace

import numpy as np
import pytest

import fusemlp
from bench import cases, measure, oracle, peers, verification, worker
from bench.peers.engine import state_of

# One small case of each kind in ``cases.QUICK``, and one with dropout.
SMALL = {
    "sgd": cases.Case((12, 8, 6, 4), 8, steps=6),
    "adam": cases.Case((12, 8, 4), 16, steps=20, optimizer="adam", activation="tanh", learning_rate=1e-3),
    "dropout": cases.Case((12, 16, 16, 4), 64, steps=6, optimizer="adam", dropout=0.2, learning_rate=1e-3),
    "mse": cases.Case((12, 8, 6, 3), 8, steps=6, loss="mse"),
    "mse of one output, adam": cases.Case((12, 8, 1), 16, steps=20, loss="mse", optimizer="adam", learning_rate=1e-3),
    "fleet": cases.Case((12, 8, 4), 8, steps=6, optimizer="adam", models=3),
}


def installed(device):
    """Yield each installed contender of ``--quick`` with each case that it can run."""
    return [
        (name, kind)
        for name, peer in peers.PEERS.items()
        for kind, case in SMALL.items()
        if not peer.compiles_long and peers.unsuited(name, case) is None and peers.absent(name, device) is None
    ]


@functools.cache
def judge_of(kind):
    return verification.Judge(SMALL[kind])


def verify(name, kind, **changed):
    """Let a contender train the case, or one that differs from it, and judge it by the case."""
    judge = judge_of(kind)
    return judge.verdict(name, *verification.trajectories(name, replace(SMALL[kind], **changed), judge.data))


@pytest.mark.parametrize(("name", "kind"), installed("cpu"))
def test_a_contender_agrees_with_the_oracle_and_with_another_learning_rate_does_not(name, kind):
    verdict = verify(name, kind)
    assert verdict.agrees, verdict.reason
    assert 0 < verdict.worst <= 1
    found = verify(name, kind, learning_rate=1.02 * SMALL[kind].learning_rate, dropout=0.0)
    assert not found.agrees
    # The first loss is that of the initial parameters, before any update.
    assert found.step == 2
    assert "step 2: a loss" in found.reason


def test_a_contender_that_compiles_for_long_agrees_with_the_oracle_too(monkeypatch):
    """Its graphs are traced and run without machine code; each measurement checks that of the compiler."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    verdict = verify("torch_compile", "sgd")
    assert verdict.agrees, verdict.reason


@pytest.mark.gpu
def test_on_a_card_too_a_contender_agrees_with_the_oracle():
    names = installed("gpu")
    assert {"engine", "torch_eager"} <= {name for name, _ in names}
    for name, kind in names:
        verdict = verify(name, kind, device="gpu")
        assert verdict.agrees, f"{name}, {kind}: {verdict.reason}"


class Altered:
    """A trainer that is disturbed after each step."""

    def __init__(self, trainer, spoil):
        self.trainer, self.spoil = trainer, spoil

    def losses(self, order):
        batches = order.reshape(oracle.STEPS, -1)
        found = []
        for rows in batches:
            found.append(self.trainer.losses(rows))
            self.spoil(self.trainer)
        return np.concatenate(found)

    def __getattr__(self, name):
        return getattr(self.trainer, name)


PLANTED = {
    "no bias": lambda trainer: trainer.linears[0].bias.data.zero_(),
    "one weight": lambda trainer: trainer.linears[1].weight.data[0, 0].add_(1e-3),
}


@pytest.mark.parametrize("spoil", PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_caught_at_its_step(spoil):
    pytest.importorskip("torch")
    data, expected = judge_of("sgd").data, judge_of("sgd").expected("torch_eager")
    trainer = peers.prepare("torch_eager", SMALL["sgd"], data)
    assert verification.judge(verification.trajectory(trainer, SMALL["sgd"], data), expected).agrees
    found = verification.judge(verification.trajectory(Altered(trainer, spoil), SMALL["sgd"], data), expected)
    assert found.step == 2
    assert found.worst > 10


def test_an_engine_that_leaves_biases_alone_is_caught():
    case = SMALL["sgd"]
    data, expected = judge_of("sgd").data, judge_of("sgd").expected("engine")
    trainer = peers.prepare("engine", case, data)
    frozen = fusemlp.SGD(case.learning_rate, per_parameter={"*.bias": fusemlp.ParameterOptions(trainable=False)})
    net = fusemlp.MLP(case.sizes)
    trainer.engine = fusemlp.Engine(net, optimizer=frozen, batch_size=case.batch_size, backend="numpy")
    trainer.engine.load_state_dict(state_of(data.parameters))
    trainer.initial = trainer.engine.memory.snapshot()
    assert verification.judge(verification.trajectory(trainer, case, data), expected).step == 2


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_another_dropout_rate_is_caught(rate):
    case = SMALL["dropout"]
    data, masked = judge_of("dropout").data, judge_of("dropout").masked("engine")
    losses = verification.trajectory(peers.prepare("engine", replace(case, dropout=rate), data), case, data)
    assert not verification.judge_dropout(losses, masked).agrees


def test_a_fleet_with_one_wrong_model_is_caught():
    expected = judge_of("fleet").expected("fleet")
    losses = expected.losses.copy()
    assert verification.judge(losses, expected).agrees
    losses[7, 2] += 1e-4
    found = verification.judge(losses, expected)
    assert found.step == 8
    assert "of model 2" in found.reason
    losses[3, 0] = np.nan
    assert verification.judge(losses, expected).step == 4
    assert not verification.judge(losses[:, :2], expected).agrees


def test_what_lies_outside_is_looked_at_again_by_its_own_tolerance():
    expected = judge_of("fleet").expected("fleet")
    losses = expected.losses.copy()
    losses[9, 1] += 1e-4
    asked = []

    def wider(model):
        asked.append(model)
        return np.full(oracle.STEPS + 1, 2e-4)

    assert verification.judge(losses, expected, wider).worst == pytest.approx(0.5, rel=0.01)
    assert asked == [1]
    assert not judge_of("fleet").verdict("fleet", [losses], None).agrees


def test_single_precision_is_within_the_tolerance_and_half_is_not():
    """The oracle's own training, its operands rounded: to 24 bits it agrees, to 11 bits it does not."""
    case = SMALL["sgd"]
    data, expected = judge_of("sgd").data, judge_of("sgd").expected("engine")

    def rounding(dtype):
        return lambda array, size: array.astype(dtype).astype(np.float64)

    single = oracle.train(case, data, data.parameters, oracle.Rules(), change=rounding(np.float32))
    half = oracle.train(case, data, data.parameters, oracle.Rules(), change=rounding(np.float16))
    assert verification.judge(single, expected).agrees
    assert not verification.judge(half, expected).agrees
    allowed = oracle.expected(replace(case, precision="bf16"), data, oracle.Rules())
    assert verification.judge(half, allowed).agrees


def test_a_large_step_is_checked_on_small_batches_and_once_as_it_is(monkeypatch):
    assert all(len(oracle.checks(case)) == 1 for case in SMALL.values())
    large = cases.Case((8, 64, 4), batch_size=1024, steps=2)
    monkeypatch.setattr(oracle, "MOST_FLOPS", 1e6)
    (small, steps), (whole, once) = oracle.checks(large)
    assert (small.batch_size, small.rows, steps) == (oracle.FEW_ROWS, large.rows, oracle.STEPS)
    assert (whole, once) == (large, 1)
    judge = verification.Judge(large)
    assert judge.verdict("engine", *verification.trajectories("engine", large, judge.data)).agrees
    wrong = replace(large, learning_rate=1.02 * large.learning_rate)
    found = verification.trajectories("engine", wrong, judge.data)[0]
    right = verification.trajectories("engine", large, judge.data)[0]
    for losses in ([found[0], right[1]], [right[0], found[1]]):
        assert judge.verdict("engine", losses, None).step == 2


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(cases.Case((6, 5, 40), batch_size=16, steps=4), id="batches without a class"),
        pytest.param(cases.Case((40, 60, 5), batch_size=16, steps=4, learning_rate=8.0), id="improbable labels"),
    ],
)
def test_scikit_learn_is_checked(case):
    judge = verification.Judge(case)
    verdict = judge.verdict("sklearn_mlp", *verification.trajectories("sklearn_mlp", case, judge.data))
    assert verdict.agrees, verdict.reason


def test_a_contender_that_raises_is_not_timed(monkeypatch):
    case = replace(SMALL["sgd"], activation="no such name")
    monkeypatch.setattr(measure, "Judge", lambda case: None)
    with measure.started(["engine"], [case]) as workers:
        (found,) = measure.measure(case, workers, repeats=2, progress=lambda text: None, pause=0.0)
    assert found.status == "failed"
    assert found.reason.startswith("ArgumentError: activation: unknown name 'no such name'")


def test_a_contender_that_disagrees_is_not_timed(monkeypatch):
    """Its result has the reason; the others are timed."""
    ask = worker.Worker.ask

    def spoiled(self, method, *arguments):
        answer = ask(self, method, *arguments)
        if method == "trajectories" and self.peer == "engine":
            return [losses + 0.01 for losses in answer[0]], answer[1]
        return answer

    monkeypatch.setattr(worker.Worker, "ask", spoiled)
    case = SMALL["sgd"]
    with measure.started(["engine", "engine_numpy_eager"], [case]) as workers:
        results = measure.measure(case, workers, repeats=2, progress=lambda text: None, pause=0.0, turn_seconds=0.001)
    refused, timed = results if results[0].status == "refused" else results[::-1]
    assert (refused.status, refused.seconds) == ("refused", ())
    assert "first at step 1" in refused.reason
    assert timed.status == "timed" and len(timed.seconds) == 2
