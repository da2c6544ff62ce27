"""Threads that share a launch: the same bits for any number of them, and none is left in the way afterwards."""

import hashlib
import itertools
import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import python

from fusemlp import MLP, SGD, Adam, CrossEntropy, Engine, PReLU
from fusemlp.sklearn import MLPClassifier
from fusemlp_kernels.numpy import launches, plan
from fusemlp_kernels.numpy.compiled import tables as t

RNG = np.random.default_rng(0)


def with_threads(monkeypatch, number):
    monkeypatch.setattr(launches, "_fixed", lambda: {launches.VARIABLE: number})
    monkeypatch.setattr(launches, "_openblas", list)


def digest(engine, X, y):
    parts = [value for value in engine.state_dict().values()]
    parts += [engine.predict(X), np.array(list(engine.evaluate(X, y).values()))]
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


LABELS = RNG.integers(0, 10, 700)
PROGRAMS = {
    "sgd": (MLP([200, 300, 10]), "cross_entropy", SGD(0.05), LABELS),
    "adam": (MLP([200, 150, 90, 10], dropout=0.2), "cross_entropy", Adam(0.01), LABELS),
    "clipped": (MLP([200, 300, 10]), "cross_entropy", Adam(0.01, clip_norm=0.1), LABELS),
    "accumulated": (MLP([200, 300, 10]), "cross_entropy", SGD(0.05, momentum=0.9, accumulate=2), LABELS),
    "slopes": (MLP([200, 300, 2], activation=PReLU(0.1)), "mse", Adam(0.01), RNG.standard_normal((700, 2))),
    # what a layer no longer needs leaves its memory to layers of other widths
    "deep": (MLP([200, 150, 240, 90, 170, 10], activation="gelu", dropout=0.1), "cross_entropy", Adam(0.01), LABELS),
    "members": (
        MLP([200, 64, 48, 10], activation="silu", dropout=0.1, members=6),
        "cross_entropy",
        Adam(0.01, accumulate=2),
        LABELS,
    ),
    "options": (
        MLP([200, 300, 10], activation="gelu"),
        CrossEntropy(label_smoothing=0.1, class_weight=[0.5] * 10, ignore_index=3),
        SGD(0.05),
        LABELS,
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_bits_do_not_depend_on_the_number_of_threads(program, precision, monkeypatch):
    net, loss, optimizer, targets = PROGRAMS[program]
    X, weight = RNG.standard_normal((700, 200)), RNG.uniform(0.5, 2.0, 700)
    led = []
    lead = launches._Team.lead

    def watched(self, members, work, job):
        led.append(members)
        lead(self, members, work, job)

    monkeypatch.setattr(launches._Team, "lead", watched)
    found = set()
    for number in (1, 2, 3, 4, plan.FEW + 2):
        with_threads(monkeypatch, number)
        led.clear()
        engine = Engine(net, loss=loss, optimizer=optimizer, batch_size=128, seed=1, precision=precision)
        engine.fit(X, targets, epochs=2, sample_weight=weight)
        engine.step(X[:128], targets[:128])
        found.add(digest(engine, X, targets))
        # a launch of fewer tasks has fewer threads
        assert max(led, default=1) == number
    assert len(found) == 1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_sum_of_a_penalty_does_not_depend_on_the_number_of_threads(monkeypatch):
    curves = set()
    for number in (1, 2, plan.FEW + 2):
        with_threads(monkeypatch, number)
        model = MLPClassifier((300,), alpha=0.1, max_iter=2, batch_size=128, random_state=1)
        model.fit(np.sin(np.arange(700 * 200.0)).reshape(700, 200), LABELS)
        curves.add(tuple(model.loss_curve_))
    assert len(curves) == 1


def test_a_launch_by_itself_and_one_that_finds_the_team_busy_do_without_it(monkeypatch):
    with_threads(monkeypatch, 2)
    led = []
    monkeypatch.setattr(launches._Team, "lead", lambda self, members, work, job: led.append(members))
    X, y = RNG.standard_normal((256, 200)), RNG.integers(0, 10, 256)
    engine = Engine(MLP([200, 300, 10]), batch_size=128)
    with launches.one_thread():
        engine.fit(X, y, epochs=1)
    with launches._the_team(2).free:
        engine.fit(X, y, epochs=1)
    assert led == []


def test_a_task_has_more_rows_where_there_are_blocks_enough_for_all_threads():
    # the programs above have batches of 16 blocks: with one thread all make a task, with four a fourth
    assert [plan.row_tasks(8, 16, threads) for threads in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert [plan.row_tasks(block, 64, 1) for block in (8, 64, 256, 512, 1024, 0)] == [2, 16, 64, 64, 64, 1]
    # each of two threads has as many, of about the same length: 36 blocks make no five tasks
    assert [plan.row_tasks(8, blocks, 2) for blocks in (1, 16, 36, 63, 100, 640)] == [1, 2, 2, 2, 4, 20]


def test_where_no_thread_can_be_started_the_launch_runs_all_the_same(monkeypatch, caplog):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    X, y = RNG.standard_normal((256, 200)), RNG.integers(0, 10, 256)
    found = []
    for number in (1, 3):
        with_threads(monkeypatch, number)
        monkeypatch.setattr(launches, "_team", None)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        engine = Engine(MLP([200, 300, 10]), batch_size=128)
        with caplog.at_level("INFO", logger="fusemlp.kernels"):
            engine.fit(X, y, epochs=1)
        found.append(digest(engine, X, y))
    assert found[0] == found[1]
    assert "1 threads train in place of 3: can't start new thread" in caplog.text


SLOW = """
import ctypes, random, sys, time
import numpy as np
from fusemlp_kernels.numpy import launches
from numba import cfunc, types

sys.setswitchinterval(1e-4)
STEPS, PHASES, TASKS = 2500, 4, 7
done = np.zeros((PHASES, TASKS), np.int64)
at = np.zeros(3, np.int64)  # step, phase, errors
rng = random.Random(0)
sleepy = len(sys.argv) > 1

@ctypes.CFUNCTYPE(*[ctypes.c_int64] * 4)
def work(job, task, room):
    step, phase = int(at[0]), int(at[1])
    if task >= 0:
        if sleepy and rng.random() < 0.002:
            time.sleep(rng.random() * 0.003)
        # a phase begins when the one before has ended, and a task runs once
        if (done[phase, task] != step) or (phase and done[phase - 1].min() <= step):
            at[2] += 1
        done[phase, task] += 1
        return 0
    if phase >= 0 and done[phase].min() != step + 1:
        at[2] += 1
    at[1] = phase + 1
    if at[1] == PHASES:
        at[0], at[1] = step + 1, 0
    return TASKS if at[0] < STEPS else 0

at[1] = -1
one = launches._the_team(4)
one.lead(4, ctypes.cast(work, ctypes.c_void_p).value, 0)
assert at[2] == 0, at
assert (done == STEPS).all(), done
print("ok")
"""


@pytest.mark.parametrize("sleepy", [False, True])
def test_ten_thousand_phases_are_each_done_once_and_in_order(sleepy):
    """A team of four on any number of cores; with sleeps, threads are away in the middle of a task."""
    ran = python("-c", SLOW, *(["sleepy"] if sleepy else []))
    assert ran.stdout == "ok\n", ran.stderr


PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from fusemlp import MLP, SGD, Engine
rng = np.random.default_rng(0)
X, y = rng.standard_normal((512, 200)).astype(np.float32), rng.integers(0, 10, 512)
def engine():
    return Engine(MLP([200, 300, 10]), optimizer=SGD(0.05), batch_size=128, seed=1)
def bits(made):
    return b"".join(value.tobytes() for value in made.state_dict().values())
alone = engine()
alone.fit(X, y, epochs=2)
"""

FORK = f"""{PRELUDE}
stop = False
def train():
    other = engine()
    with alone.inference.forward.turn:
        while not stop:
            other.fit(X, y, epochs=1)
beside = threading.Thread(target=train)
beside.start()
codes = []
for _ in range(5):
    time.sleep(0.02)
    child = os.fork()
    if not child:
        own = engine()
        own.fit(X, y, epochs=2)
        alone.predict(X)
        os._exit(0 if bits(own) == bits(alone) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
beside.join()
print(codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore")
def test_a_process_that_is_forked_in_the_middle_of_a_launch_trains_and_predicts():
    ran = python("-c", FORK, FUSEMLP_NUM_THREADS="2")
    assert ran.stdout == "[0, 0, 0, 0, 0]\n", ran.stderr


INTERRUPTED = f"""{PRELUDE}
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
made = engine()
try:
    made.fit(X, y, epochs=1_000_000)
    print("not interrupted")
except KeyboardInterrupt:
    pass
after = engine()
after.fit(X, y, epochs=2)
print(bits(after) == bits(alone), [one.name for one in threading.enumerate() if not one.daemon])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there SIGINT is for a whole console")
def test_ctrl_c_in_the_middle_of_a_launch_leaves_no_lock_behind():
    ran = python("-c", INTERRUPTED, FUSEMLP_NUM_THREADS="2")
    assert ran.stdout == "True ['MainThread']\n", ran.stderr


TOGETHER = f"""{PRELUDE}
made = [engine() for _ in range(4)]
threads = [threading.Thread(target=one.fit, args=(X, y), kwargs=dict(epochs=2)) for one in made]
for one in threads:
    one.start()
for one in threads:
    one.join()
print([bits(one) == bits(alone) for one in made])
"""


def test_launches_from_many_threads_end_with_the_same_bits():
    assert python("-c", TOGETHER, FUSEMLP_NUM_THREADS="2").stdout == "[True, True, True, True]\n"


KINDS = ["GATHER", "AFFINE", "ACTIVATE", "BACKWARD", "ENTROPY", "WEIGHT", "BIAS", "SLOPES", "UPDATE", "NORM"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 700), st.integers(0, 900)), min_size=1, max_size=8),
    st.integers(0, 3000),
    st.sampled_from([0, 48]),
)
def test_a_plan_covers_all_of_each_call_once(shapes, height, tall):
    sizes = [outputs * max(inputs, 1) for _, outputs, inputs in shapes]
    rows = [plan.Row(kind, n, k, at, at + 1) for at, (kind, n, k) in enumerate(shapes)]
    packs = [plan.Row("PACK", n, k) for kind, n, k in shapes if kind == "AFFINE"]
    found = plan.plan(rows, packs, height, sizes, plan.Cut(tall))
    assert found.block % plan.ROWS == 0
    phases = np.array(found.phases, t.PHASE)
    calls = [*rows, *packs]
    assert list(range(len(rows))) == [
        at for phase in phases for at in range(phase["first"], phase["end"]) if at < len(rows)
    ]
    assert found.most == max(1, phases["tasks"].max())
    for phase in phases:
        if phase["cut"] == t.BY_ROWS:
            assert phase["tasks"] * found.block >= height
        else:
            covered = {at: [] for at in range(phase["first"], phase["end"])}
            own = found.tasks[phase["first_task"] : phase["first_task"] + phase["tasks"]]
            for first, end in own:
                for at, top, bottom, left, right in found.pieces[first:end]:
                    assert left % t.PANEL == 0
                    assert top % (t.PANEL // 2) == 0 or calls[at].kind in ("NORM", "UPDATE")
                    covered[at].append((right - left) * (bottom - top if calls[at].kind in ("WEIGHT", "PACK") else 1))
            for at, found_sizes in covered.items():
                call = calls[at]
                whole = {"WEIGHT": call.n * call.k, "PACK": call.n * call.k}
                whole |= dict.fromkeys(("NORM", "UPDATE"), sizes[min(call.first, len(sizes) - 1)])
                assert sum(found_sizes) == whole.get(call.kind, call.n)


@pytest.mark.parametrize(
    "widths, height",
    [((784, 512, 256), 128), ((900, 900, 900, 900), 768), ((500, 1000, 500), 1024), ((100, 300, 300), 512)],
)
def test_small_pieces_of_weights_come_last(widths, height):
    rows = [plan.Row("WEIGHT", n, k) for k, n in itertools.pairwise(widths)]
    cut = plan.plan(rows, [], height, [], plan.Cut(48))
    works = [(bottom - top) * (right - left) for _, top, bottom, left, right in cut.pieces]
    assert works == sorted(works, reverse=True)
    assert {piece[2] - piece[1] for piece in cut.pieces if piece[1] == 0} <= {48, 96, 144, 192, 240}
    # each task goes to the thread that is free first
    ends = [0, 0]
    for first, end in cut.tasks:
        ends[ends.index(min(ends))] += sum(works[first:end])
    assert max(ends) <= 1.05 * min(ends)


def test_rows_that_use_the_memory_of_others_are_a_phase_of_their_own():
    one, two = (1000, 400, 40), (1200, 800, 80)
    rows = [plan.Row("AFFINE", 10, 10, arrays=(one,)), plan.Row("ACTIVATE", 10, 0, arrays=(one,))]
    assert len(plan.plan(rows, [], 10, [], plan.Cut()).phases) == 1
    rows.append(plan.Row("BACKWARD", 10, 10, arrays=(two,)))
    assert [phase[1:3] for phase in plan.plan(rows, [], 10, [], plan.Cut()).phases] == [(0, 2), (2, 3)]
