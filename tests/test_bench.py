"""The benchmark compares equal work and reports all circumstances. Nothing here asserts a speed."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

from bench import busy, cases, measure, peers, processor, report, worker
from bench.__main__ import main
from fusemlp_kernels.numpy.compiled.compiler import X86

ROOT = Path(__file__).resolve().parents[1]
TINY = cases.Case((12, 8, 6, 4), batch_size=8, steps=6)
FLEET = cases.Case((12, 8, 4), batch_size=8, steps=6, optimizer="adam", learning_rate=1e-3, models=2)


def test_data_are_a_function_of_the_case_and_hold_every_class():
    first, second = cases.make_data(TINY), cases.make_data(TINY)
    np.testing.assert_array_equal(first.X, second.X)
    assert first.X.shape == (48, 12)
    assert set(first.y) == set(range(4))
    np.testing.assert_array_equal(np.sort(first.order), np.arange(48))


def test_the_checked_batches_are_passes_over_the_data():
    rows = cases.checked_rows(TINY, 20)
    assert rows.shape == (160,)
    for start in (0, 48, 96):
        np.testing.assert_array_equal(np.sort(rows[start : start + 48]), np.arange(48))


def test_a_name_says_what_a_case_is():
    assert TINY.name == "12-8-6-4@8"
    assert FLEET.name == "12-8-4@8:adam:x2"
    assert cases.Case((30, 64, 1), 256, steps=1, loss="mse", optimizer="adam").name == "30-64-1@256:mse:adam"
    assert len({case.name for case in cases.CASES.values()}) == len(cases.CASES)
    assert set(cases.QUICK) <= cases.CASES.keys()
    for case in (TINY, FLEET, *cases.CASES.values()):
        same = {"steps": case.steps, "epochs": case.epochs, "learning_rate": case.learning_rate}
        assert dataclasses.replace(cases.parsed(case.name), **same, gpu_only=case.gpu_only) == case


def test_every_contender_suits_a_case_and_every_case_a_contender():
    suits = {
        (name, case.name) for name in peers.PEERS for case in cases.CASES.values() if peers.unsuited(name, case) is None
    }
    assert {name for name, _ in suits} == set(peers.PEERS)
    assert {case for _, case in suits} == set(cases.CASES)
    for case in cases.CASES.values():
        assert (peers.reference_of(case), case.name) in suits


def test_ratios_are_taken_round_by_round():
    mine = measure.Result(TINY, "torch_eager", "timed", seconds=(2.0, 8.0, 4.0))
    reference = measure.Result(TINY, "engine", "timed", seconds=(1.0, 4.0, 1.0))
    assert mine.ratios(reference).p50 == 2.0


def test_a_measurement_ends_in_a_full_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)
    monkeypatch.setitem(cases.CASES, FLEET.name, FLEET)
    monkeypatch.setattr("bench.__main__.TURN_SECONDS", 0.002)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    path = tmp_path / "new" / "figures.jsonl"
    names = ["sklearn_mlp", "engine", "fleet", "torch_graph"]
    asked = ["--case", TINY.name, "--case", FLEET.name, "--peer", ",".join(names), "--device", "cpu"]
    assert main([*asked, "--repeats", "2", "--out", str(path)]) == 0
    printed = capsys.readouterr()
    assert "OPENBLAS_CORETYPE: unset" in printed.err

    lines = report.read(path)
    timed = report.timed(lines)
    assert [(line["peer"], line["case"]) for line in timed] == [
        ("engine", TINY.name),
        ("sklearn_mlp", TINY.name),
        ("fleet", FLEET.name),
    ]
    for line in timed:
        assert line["rounds"] == len(line["every_round"]) == 2
        for spread in (line["microseconds"], line["ratio"]):
            assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
        assert 0 < line["difference_of_tolerance"] <= 1
        assert line["first_epoch_seconds"] > 0
    for line in lines:
        assert line["machine"]["cpu"]
        assert line["machine"]["cores"] >= 1
        assert line["machine"]["system"].count(" ") == 1
        assert {"python", "numpy", "scipy", "fusemlp"} <= line["versions"].keys()
        assert line["openblas_variables_unset"] == {"OPENBLAS_CORETYPE": "Haswell"}
        assert line["date"].startswith("20")
        assert {"commit", "card", "variables"} <= line.keys()
    pools = lines[0]["thread_pools"]
    assert set(pools) == {"engine", "fleet", "sklearn_mlp"}
    assert any(pool["user_api"] == "blas" and pool["num_threads"] >= 1 for pool in pools["engine"])

    assert printed.out.strip() == report.markdown(lines).strip()
    assert "| 12-8-6-4, 8 |" in printed.out
    assert "| 2 x 12-8-4, 8, Adam |" in printed.out
    absent = next(text for text in printed.out.splitlines() if text.startswith("- Absent:"))
    assert "PyTorch whole-step CUDA graph (runs on a GPU only" in absent
    assert main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out == printed.out

    # a run that continues the file measures what is not in it, and no case begins after the time
    before = path.read_text()
    assert main([*asked, "--resume", "--out", str(path)]) == 0
    assert main([*asked, "--case", "64-32-10@32", "--resume", "--minutes", "0", "--out", str(path)]) == 0
    assert "the time is over: 0 of 1 cases are measured" in capsys.readouterr().err
    assert path.read_text() == before
    path.write_text(before.replace('"timed"', '"refused"', 1))
    assert main([*asked, "--resume", "--out", str(path)]) == 1


def run_of(tmp_path, *arguments):
    path = tmp_path / "figures.jsonl"
    asked = ["--case", TINY.name, "--peer", "engine", "--repeats", "1", "--quick", "--out", str(path), "--no-plots"]
    code = main([*asked, "--device", "cpu", *arguments])
    return code, path, report.read(path)


def test_processes_spin_during_turns_and_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)
    running = []
    asked = []

    @contextlib.contextmanager
    def recorded(number):
        with busy.spinning(number) as running[:]:
            yield running
        running.clear()

    def ask(self, method, *arguments):
        asked.append((method, [one for one in running if alive(one)]))
        return original(self, method, *arguments)

    original = worker.Worker.ask
    monkeypatch.setattr(measure, "spinning", recorded)
    monkeypatch.setattr(worker.Worker, "ask", ask)
    code, _, lines = run_of(tmp_path, "--busy", "2")
    printed = capsys.readouterr()
    assert code == 0
    assert {method: len(spun) for method, spun in asked} == {
        **{"load": 0, "trajectories": 0, "environment": 0, "peak": 0},
        **{"epochs_in": 2, "turn": 2},
    }
    assert not any(alive(one) for _, spun in asked for one in spun)
    assert [line["busy"] for line in lines] == [2] * len(lines)
    assert "Each turn ran beside 2 spinning processes. " in printed.out
    assert "To repeat: `python -m bench --busy 2`." in printed.out

    code, _, after = run_of(tmp_path)
    assert code == 2 and after == lines
    message = capsys.readouterr().err
    assert "it holds figures measured beside 2 spinning processes, and these are measured with nothing" in message


@pytest.mark.skipif(not X86, reason="the instruction sets are those of x86")
def test_json_is_one_object_and_a_narrower_instruction_set_has_the_share_of_its_peak(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)
    code, path, lines = run_of(tmp_path, "--isa", "sse", "--json")
    assert json.loads(capsys.readouterr().out) == {"file": str(path), "lines": lines}
    assert (code, main(["--markdown", str(path)])) == (0, 0)
    printed = capsys.readouterr().out
    assert [line["isa"] for line in lines] == ["sse"]
    assert lines[0]["instruction_sets"]["engine"]["fusemlp"] == "sse"
    # operations in a microsecond are a thousandth of those in a second, in units of 1e9
    share = lines[0]["flops"] / lines[0]["microseconds"]["p50"] / 1e3 / lines[0]["peak"]
    assert 0.0 < share < 1.0
    assert f"; {100 * share:.0f} %)" in printed
    assert "Limited to sse; verified by the library's own word for: fusemlp sse" in printed
    assert "To repeat: `python -m bench --isa sse`." in printed
    assert run_of(tmp_path)[0] == 2
    message = capsys.readouterr().err
    assert "measured with nothing beside, limited to sse, and these are measured with nothing beside; name" in message


@pytest.mark.skipif(
    sys.platform != "linux" or " cpuid_fault " not in Path("/proc/cpuinfo").read_text() or shutil.which("cc") is None,
    reason="this processor cannot hide instructions, or there is no C compiler",
)
def test_wider_instructions_are_hidden_from_every_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)
    code, _, lines = run_of(tmp_path, "--isa", "avx2")
    assert code == 0
    assert lines[0]["instruction_sets"]["engine"] == {"CPUID": "avx2", "fusemlp": "avx2"}
    assert "CPUID hides what is wider from every contender." in capsys.readouterr().out
    program = (
        "from llvmlite import binding; print(sum(binding.get_host_cpu_features()[n] for n in ('avx2', 'avx512f')))"
    )
    with processor.limited("avx2") as settings:
        asked = subprocess.run([sys.executable, "-c", program], env={**os.environ, **settings}, stdout=PIPE, check=True)
    assert asked.stdout == b"1\n"


def alive(process):
    """Return whether a process runs; one that has ended may not have been waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestSpinning:
    """The processes of ``--busy``."""

    def test_they_compute_as_the_contenders_do(self):
        with busy.spinning(2) as running:
            assert len({*running}) == 2
            for process in running:
                assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(os.PRIO_PROCESS, 0)
                assert os.getsid(process) == os.getsid(0)
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            time.sleep(0.3)
        # the time of children counts once they have ended; the other jobs of the machine may take most of it
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before > 0.02
        assert not any(map(alive, running))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, worker.WorkerError("gone", "gone")])
    def test_they_end_with_an_error_too(self, error):
        with pytest.raises((KeyboardInterrupt, worker.WorkerError)), busy.spinning(1) as running:
            raise error
        assert not alive(running[0])

    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_they_end_with_the_benchmark(self, sent):
        code = (
            "import time\nfrom bench.busy import spinning\n"
            "with spinning(2) as running:\n    print(*running, flush=True)\n    time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as parent:
            assert parent.stdout is not None
            running = [int(one) for one in parent.stdout.readline().split()]
            assert len(running) == 2 and all(map(alive, running))
            parent.send_signal(sent)
            parent.wait(timeout=30)
        until = time.monotonic() + 30
        while any(map(alive, running)) and time.monotonic() < until:
            time.sleep(0.01)
        assert not any(map(alive, running))

    def test_one_that_does_not_start_is_an_error(self, monkeypatch):
        monkeypatch.setattr(busy, "SPIN", "raise SystemExit")
        with pytest.raises(OSError, match="ended at once"), busy.spinning(1):
            pass


def test_a_worker_reports_what_was_raised_inside_it():
    with worker.Worker("engine") as one, pytest.raises(worker.WorkerError, match="engine failed to turn"):
        one.ask("turn", 1)


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "torch_eager", peers.Peer("PyTorch eager", "no_such_package"))
    assert main(["--peer", "torch_eager"]) == 2
    assert "no_such_package is not installed" in (message := capsys.readouterr().err)
    assert 'pip install "fusemlp[bench]"' in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer", "engine,torch_eagre"], "did you mean 'torch_eager'?"),
        (["--case", "784-10-10@32:adm"], "did you mean '784-10-10@32:adam'?"),
        (["--case", "784-0-10@32"], "or another as widths@batch"),
        (["--case", "784-10-10@32:x2:x4"], "has two suffixes of one kind; leave 'x4' out"),
        (["comprae", "a", "b"], "did you mean 'compare'?"),
        (["scale", "--ranks", "2"], "scale: this study has ended; bench/README.md has its figures"),
        (["--repeats", "0"], "a whole number of at least 1, got '0'"),
        (["--busy", "-1"], "a whole number of at least 1, got '-1'"),
        (["--case", "1024-1024-1024-1024-1024@4096:bf16", "--device", "cpu"], "it is for a GPU only"),
        (["--case", "784-10-10@32", "--peer", "fleet", "--device", "cpu"], "fleet: trains many models at once"),
        (["--markdown", "no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--resume"], "--resume: it continues a file; name it with --out"),
    ],
)
def test_what_it_cannot_measure_is_said(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(arguments))
    assert said in capsys.readouterr().err


def test_the_command_explains_itself_and_lists_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    options = ("--case", "--peer", "--quick", "--busy", "--repeats", "--out", "--json", "--markdown", "examples:")
    assert all(option in shown for option in options)
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*cases.CASES, *peers.PEERS))
