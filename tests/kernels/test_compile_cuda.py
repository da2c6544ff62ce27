"""CUDA C compiles without a GPU, bad machine code is reported, and the record is up to date."""

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import compile_cuda
import pytest

from fusemlp_kernels.cupy import sources

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "module": "loss", "kernel": "loss_rows", "type": "half", "nvrtc": "12.9.86", "arch": "sm_90", "registers": 128,
    "stack": 0, "spills": 0, "shared_static": 48 << 10, "source": "0",
}  # fmt: skip
# An array with an index known only at run time cannot be in registers.
STACK = """extern "C" __global__ void stack(int* out, int count) {
    int local[64] = {};
    for (int i = 0; i < count; i++) local[out[i] & 63] += i;
    for (int i = 0; i < count; i++) out[i] = local[out[count + i] & 63];
}"""
# 96 live numbers, and 1024 threads with 64 registers each.
SPILL = """extern "C" __global__ void __launch_bounds__(1024) spill(double* x) {
    double v[96];
#pragma unroll
    for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = v[i] * v[95 - i];
}"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="the wheel of NVRTC is in the test extra on Linux")


@linux
def test_stacks_and_spills_are_seen():
    for code, name in ((STACK, "stack"), (SPILL, "spill")):
        _, log = compile_cuda.compile_source(code, [], "sm_80")
        taken = compile_cuda.resources(log)[name]
        assert compile_cuda.problems({**GOOD, **taken})
        assert taken["stack"] > 0 and (taken["spills"] > 0) == (name == "spill")


@linux
def test_a_source_that_does_not_compile_shows_the_error(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_cuda, "CACHE", tmp_path)
    monkeypatch.setattr(sources, "text", lambda module: 'extern "C" __global__ void f() { g(); }')
    said = compile_cuda.compiled(compile_cuda.Work("sm_80", "layers", "float"))
    assert said.startswith("sm_80 layers.cu (float): ") and 'identifier "g" is undefined' in said
    assert not list(tmp_path.iterdir())


@linux
def test_what_was_compiled_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_cuda, "CACHE", tmp_path)
    monkeypatch.setattr(sources, "text", lambda module: STACK)
    work = compile_cuda.Work("sm_80", "layers", "float")
    first = compile_cuda.compiled(work)
    monkeypatch.setattr(compile_cuda, "compile_source", None)
    assert compile_cuda.compiled(work) == first and first[0]["kernel"] == "stack"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"spills": 8}, "8 bytes are spilled"),
        ({"stack": 16}, "a stack of 16 bytes"),
        ({"shared_static": (48 << 10) + 1}, "bytes of shared memory; a launch has 49152"),
    ],
)
def test_bad_machine_code_is_noticed(wrong, said):
    assert compile_cuda.problems(GOOD) == []
    (problem,) = compile_cuda.problems({**GOOD, **wrong})
    assert said in problem and "sm_90 loss.cu loss_rows (half)" in problem


def test_another_result_than_recorded_is_noticed():
    assert compile_cuda.differences([GOOD], [GOOD]) == []
    (found,) = compile_cuda.differences([{**GOOD, "registers": 130}], [GOOD])
    assert "registers 128 -> 130" in found
    (found,) = compile_cuda.differences([{**GOOD, "kernel": "other"}], [GOOD])
    assert "loss.cu other (half) is not in the record" in found
    # Another version of the compiler may allocate differently.
    assert compile_cuda.differences([{**GOOD, "registers": 130, "nvrtc": "13.0"}], [GOOD]) == []


def test_a_record_of_other_code_is_noticed():
    found = compile_cuda.record_problems([GOOD])
    assert any("not of the current sources, such as sm_90 loss loss_rows" in problem for problem in found)
    assert any(f"{4 * 2 * len(sources.MODULES)} are missing" in problem for problem in found)


def test_the_record_is_of_the_sources_as_they_are():
    record = compile_cuda.read_record()
    assert compile_cuda.record_problems(record) == []
    assert {row["arch"] for row in record} == {"sm_75", "sm_80", "sm_90", "sm_100"}
    for row in record:
        assert row.keys() == GOOD.keys()
        assert all(type(row[name]) is type(GOOD[name]) for name in GOOD)
    assert json.loads(compile_cuda.RECORD.read_text()) == sorted(
        record, key=lambda row: [row[name] for name in compile_cuda.KEY]
    )


def test_a_machine_without_the_wheel_is_told(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit, match=r"the wheel nvidia-cuda-nvrtc-cu12.*pip install nvidia-cuda-nvrtc-cu12"):
        compile_cuda.main(["--check"])
