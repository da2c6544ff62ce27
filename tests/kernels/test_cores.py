"""The number of threads on the CPU, from variables, control groups, the process's cores and OpenBLAS."""

import json
import os
import threading

import pytest
from processes import python

from fusemlp import MLP, Engine
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy import launches

PRINTED = "import json; from fusemlp_kernels.numpy import launches as o; print(json.dumps([o.threads(), o.limits()]))"
LIMITING = {launches.VARIABLE, "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOTO_NUM_THREADS"}


def found(code, **variables):
    run = python("-c", code, without=LIMITING, **variables)
    assert run.returncode == 0, run.stderr
    number, limits = json.loads(run.stdout)
    return number, limits


def test_the_least_limit_holds():
    number, limits = found(PRINTED)
    assert number == min(limits.values()) >= 1
    assert "OMP_NUM_THREADS" not in limits and launches.VARIABLE not in limits
    assert limits["CPU affinity"] >= 1


@pytest.fixture
def fixed(monkeypatch):
    """Return the limits of this process with these variables alone."""
    read = launches._fixed.__wrapped__

    def limits(**variables):
        for name in LIMITING:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return read()

    return limits


@pytest.mark.parametrize("value, openmp", [("1", 1), ("1,4", 1), (" 3 ", 3), ("", None), ("many", None), ("0", None)])
def test_openmps_variable_is_a_limit(value, openmp, fixed):
    assert fixed(OMP_NUM_THREADS=value).get("OMP_NUM_THREADS") == openmp


def test_the_own_variable_overrides_all_limits():
    """A process with one core can ask for a team of 7."""
    assert found(PRINTED, FUSEMLP_NUM_THREADS="7", OMP_NUM_THREADS="1") == (7, {launches.VARIABLE: 7})


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "4,2"])
def test_an_impossible_number_is_refused_when_a_network_is_built(value, fixed, monkeypatch):
    said = f"^FUSEMLP_NUM_THREADS: expected a positive whole number of threads, got {value!r}; unset"
    monkeypatch.setattr(launches, "_fixed", lambda: fixed(FUSEMLP_NUM_THREADS=value))
    with pytest.raises(ArgumentError, match=said):
        Engine(MLP([2, 2]), backend="numpy")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_the_cores_of_the_process_are_a_limit():
    one = min(os.sched_getaffinity(0))
    number, limits = found(f"import os; os.sched_setaffinity(0, [{one}]); {PRINTED}")
    assert number == limits["CPU affinity"] == 1


LIMITED = """
import json
from threadpoolctl import threadpool_limits
from fusemlp_kernels.numpy import launches
before = launches.threads()
with threadpool_limits(1, user_api="blas"):
    within, limits = launches.threads(), launches.limits()
assert launches.threads() == before
print(json.dumps([within, limits]))
"""


def test_a_limit_on_blas_threads_holds_while_it_lasts():
    number, limits = found(LIMITED)
    if "OpenBLAS" not in limits:
        pytest.skip("NumPy and SciPy have another BLAS here")
    assert number == limits["OpenBLAS"] == 1


FORKED = f"""
import os, sys
from fusemlp_kernels.numpy import launches
assert launches.threads() == 3
os.environ["{launches.VARIABLE}"] = "5"
assert launches.threads() == 3
child = os.fork()
if not child:
    os._exit(launches.threads())
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), {{}}])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_reads_its_own_variables():
    assert found(FORKED, FUSEMLP_NUM_THREADS="3")[0] == 5


def test_a_worker_of_joblib_has_its_share():
    code = f"""
import json, os
from joblib import Parallel, delayed
def work():
    {PRINTED.replace("print(json.dumps(", "return (").removesuffix(")")}
print(json.dumps(Parallel(n_jobs=max(2, os.cpu_count()))([delayed(work)()] * 2)[0]))
"""
    number, limits = found(code)
    assert number == limits["OMP_NUM_THREADS"] == 1


def test_a_launch_beside_others_has_one_thread(monkeypatch):
    """The calling thread's launches have one, whatever the variable says; those of another thread have all."""
    monkeypatch.setattr(launches, "_fixed", lambda: {launches.VARIABLE: 4})
    monkeypatch.setattr(launches, "_openblas", list)
    beside = []
    with launches.one_thread():
        other = threading.Thread(target=lambda: beside.append(launches.threads()))
        other.start()
        other.join()
        with launches.one_thread():
            pass
        assert launches.threads() == 1
    assert (beside, launches.threads()) == ([4], 4)


V1 = {"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}


def group(root, membership, files):
    """Write control groups, folder below /sys/fs/cgroup to the files in it, and which of them are this process's."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for folder, contents in files.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "membership, files, quota",
    {
        "in a container": ("0::/\n", {".": {"cpu.max": "50000 100000\n"}}, 0.5),
        "no quota": ("0::/\n", {".": {"cpu.max": "max 100000\n"}}, None),
        "the real root has no file": ("0::/\n", {".": {"cgroup.procs": ""}}, None),
        "a group of its own": ("0::/jobs/a\n", {"jobs/a": {"cpu.max": "400000 200000\n"}}, 2.0),
        "the group above has less": (
            "0::/jobs/a\n",
            {"jobs/a": {"cpu.max": "400000 100000\n"}, "jobs": {"cpu.max": "100000 100000\n"}},
            1.0,
        ),
        "the group above has more": (
            "0::/jobs/a\n",
            {"jobs/a": {"cpu.max": "100000 100000\n"}, "jobs": {"cpu.max": "400000 100000\n"}},
            1.0,
        ),
        "a group beside": ("0::/jobs/a\n", {"jobs/a": {}, "jobs/b": {"cpu.max": "100000 100000\n"}}, None),
        "the host's path": ("0::/docker/1f\n", {".": {"cpu.max": "300000 100000\n"}}, 3.0),
        "version 1": ("5:memory:/\n4:cpu,cpuacct:/\n", {"cpu,cpuacct": V1}, 1.5),
        "version 1, cpu alone, below": ("2:cpuacct:/\n1:cpu:/kubepods/a\n", {"cpu/kubepods": V1, "cpu": {}}, 1.5),
        "version 1 without a quota": ("1:cpu:/\n", {"cpu": {**V1, "cpu.cfs_quota_us": "-1\n"}}, None),
        "both versions": ("1:cpu:/\n0::/a\n", {"cpu": V1, "a": {}}, 1.5),
        "no cpu controller": ("1:cpuset:/\n", {"cpuset": V1}, None),
        "unreadable": ("0::/\n", {".": {"cpu.max": "\n"}}, None),
    }.values(),
)
def test_quotas_of_control_groups(tmp_path, membership, files, quota):
    # without control groups there is no quota
    assert launches._quota(tmp_path) is None
    assert launches._quota(group(tmp_path, membership, files)) == quota


@pytest.mark.parametrize("quota, limit", [(0.1, 1), (0.5, 1), (1.2, 1), (1.5, 2), (2.0, 2), (2.4, 2)])
def test_a_quota_is_rounded_and_leaves_a_core(fixed, monkeypatch, quota, limit):
    monkeypatch.setattr(launches, "_quota", lambda root: quota)
    assert fixed()["CPU quota"] == limit
