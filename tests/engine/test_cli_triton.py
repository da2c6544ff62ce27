"""The command line on the Triton backend, under its interpreter."""

import json

import pytest

from fusemlp_kernels import availability
from make import refusal, run

if availability()["triton"] is not None:
    pytest.skip(f"triton: {availability()['triton']}", allow_module_level=True)

from fusemlp_kernels.triton import launch

if not launch.is_interpreted():
    pytest.skip("triton: a GPU needs no interpreter", allow_module_level=True)


def final_loss(backend, folder, capsys):
    network = ("--models", "1", "--hidden", "16")
    assert run("train", "iris", *network, "--epochs", "1", "--out", folder, "--backend", backend) == 0
    shown = capsys.readouterr()
    return json.loads((folder / "report.json").read_text())["test"]["loss"], shown.out + shown.err


def test_a_training_ends_where_numpys_ends_and_says_that_it_is_interpreted(tmp_path, capsys):
    numpy, said = final_loss("numpy", tmp_path / "numpy", capsys)
    assert "interpreter" not in said
    triton, said = final_loss("triton", tmp_path / "triton", capsys)
    assert "Triton's interpreter runs the kernels on the CPU, slowly" in said
    assert abs(triton - numpy) < 1e-4


def test_what_the_interpreter_cannot_do_is_refused_in_one_line(capsys):
    for option, said in (("--precision=bf16", "interpreter computes bf16 wrongly"), ("--precision=fp64", "numpy")):
        error = refusal(capsys, "train", "digits", "--backend", "triton", option, code=1)
        assert said in error and error.count("\n") == 1
