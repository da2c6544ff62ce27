"""Printed files are fresh, an unknown number is never another function, and a new row is a new function."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import print_formulas
import pytest
from calls import Clock, run_loss
from devices import VARIANT_PARAMETERS
from memory import Values

import fusemlp_kernels
from fusemlp_kernels import checks, pointwise
from fusemlp_kernels.contract import ACTIVATIONS, HYPER, LOSSES, LossSpec, Segment, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.pointwise import OPTIMIZERS, lines

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "engine/docs/contributing.md"
PACKAGE = Path(fusemlp_kernels.__file__).parent


@pytest.mark.parametrize("name", print_formulas.FILES)
def test_printed_files_are_fresh(name):
    assert (PACKAGE / name).read_text("utf-8") == print_formulas.FILES[name](), (
        f"{name} is not what pointwise.py says; print it again: python ci/print_formulas.py"
    )


def test_a_formula_that_no_backend_understands_says_so(monkeypatch):
    with pytest.raises(ValueError, match=r"expected `name = expression`, got 'x \+= 1'"):
        lines("x += 1")
    monkeypatch.setitem(pointwise.ACTIVATIONS, "own", pointwise.Activation("gamma(z)", "1"))
    for printed in print_formulas.FILES.values():
        with pytest.raises(ValueError, match=r"a function of abs, .* got 'gamma\(z\)'"):
            printed()
    monkeypatch.setitem(pointwise.LOSSES, "own", pointwise.Loss("loss = y - t"))
    with pytest.raises(
        ValueError, match=r"own: expected a formula that ends with `loss = \.\.\.` and `gradient = \.\.\.`"
    ):
        print_formulas.loss_lines("own")
    monkeypatch.setitem(pointwise.OPTIMIZERS, "own", pointwise.Optimizer((), "", "p = p - rho * g"))
    monkeypatch.delitem(pointwise.ACTIVATIONS, "own")
    monkeypatch.delitem(pointwise.LOSSES, "own")
    for printed in print_formulas.FILES.values():
        with pytest.raises(ValueError, match="'rho' is not a line of it and not a field of Hyperparameters"):
            printed()


# A name without a row, as if someone had added no more than that.


def nan_or_error(call, *written):
    """The call raises, or all that it writes is NaN."""
    try:
        call()
    except ArgumentError as error:
        assert "unknown name 'softsign'" in str(error)
        return
    for array in written:
        assert np.isnan(array).all()


def launches_of(variant):
    """The module of a backend on a device that launches its layers and losses."""
    variant.backend()
    file = {"triton": "layers", "cupy": "backend"}[variant.device.backend]
    return sys.modules[f"fusemlp_kernels.{variant.device.backend}.{file}"]


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_an_activation_without_a_formula_is_no_other(variant, monkeypatch):
    if not variant.device.on_host:
        for module in (launches_of(variant), checks):
            monkeypatch.setattr(module, "ACTIVATIONS", (*ACTIVATIONS, "softsign"))
    values = Values(5, variant)
    x, w, b, y = values.factors(6, 5), values.factors(4, 5), values.normal(4), values.factors(6, 4)
    nan_or_error(lambda: variant.bind("linear", x=x, w=w, b=b, y=y, activation="softsign")(), y)
    dz, w, z, out = values.factors(6, 3), values.factors(3, 4), values.factors(6, 4), values.factors(6, 4)
    nan_or_error(lambda: variant.bind("grad_input", dz=dz, w=w, y=z, z=z, dz_prev=out, activation="softsign")(), out)


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_a_loss_without_a_formula_is_no_other(variant, monkeypatch):
    if not variant.device.on_host:
        for module in (launches_of(variant), checks):
            monkeypatch.setattr(module, "LOSSES", (*LOSSES, "softsign"))
    values, found = Values(5, variant), {}
    z, target = values.factors(6, 4), values.normal(6, 4)

    def call():
        found["loss"], found["dz"], _ = run_loss(variant, LossSpec("softsign"), z, target)
        nan_or_error(lambda: None, found["loss"], found["dz"])

    nan_or_error(call)


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_an_optimizer_without_a_formula_is_no_other(variant, monkeypatch):
    with pytest.raises(ArgumentError, match="rule: kind: unknown name 'softsign'"):
        _ = UpdateRule("softsign").code
    for name in ("code", "states"):
        known = getattr(UpdateRule, name).fget
        value = len(OPTIMIZERS) if name == "code" else ()
        monkeypatch.setattr(
            UpdateRule, name, property(lambda rule, k=known, v=value: v if rule.kind == "softsign" else k(rule))
        )
    values, given = Values(5, variant), Clock(UpdateRule("sgd")).operands | {"rule": UpdateRule("softsign")}
    params, grads = values.normal(64), values.normal(64)
    operands = {"params": params, "grads": grads, "states": (), "segments": (Segment(0, 64, TensorRule()),)}
    nan_or_error(lambda: variant.bind("update", **operands, **given)(), params)


def test_numbers_without_a_formula_give_nan_in_the_compiled_loop():
    numba = pytest.importorskip("numba")
    from fusemlp_kernels.numpy.compiled import pointwise_numba as printed
    from fusemlp_kernels.numpy.compiled import tables

    @numba.njit
    def run(kind, y, z, d, e, p, g, rule, hyper):
        printed.activate(kind, y, z, y.size, 0.5)
        slope = printed.multiply_by_derivative(kind, d, y, z, d.size, 0.5, 1.0)
        loss = printed.element_losses(kind, z, z, e, 0, e.size, 1.0, 0.5)
        printed.update_tensor(p, g, g, g, p.size, 0.1, 0.0, rule, hyper)
        return slope, loss

    for kind in (-1, 97):
        arrays = [np.ones(9) for _ in range(6)]
        rule = np.ones(1, tables.HEAD)[0]
        rule["optimizer"] = kind
        sums = run(kind, *arrays, rule, np.ones(HYPER))
        y, _, d, e, p, _ = arrays
        assert all(np.isnan(array).all() for array in (y, d, e, p, *sums))


# One row for softsign (Turian et al., 2009), one for RMSprop (Tieleman and Hinton, 2012) and a line for the number that
# it reads: the package gets no more. The page shows the rows of an activation, in pointwise.py and in the oracle.
ACTIVATION_ROW, ORACLE_ROW = re.findall(r"^```py(\n    \"softsign\": .*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
OPTIMIZER_ROW = """
    "rmsprop": Optimizer(
        ("mean_square",),
        "rest = 1 - alpha",
        "mean_square = alpha * mean_square + rest * (g * g); p = p - rate * (g / (sqrt(mean_square) + eps))",
    ),
"""
HYPERPARAMETER = """
    alpha: float = 0.99
"""
# The oracle's formulas, and how large the errors may be: a plugin of the pytest that tests the copy.
PLUGIN = """
import calls
import numpy as np
import tolerance
from fusemlp_kernels import reference
from fusemlp_kernels.contract import UpdateRule


reference._ACTIVATIONS |= {ORACLE_ROW}
tolerance.ULPS["softsign"], tolerance.LIPSCHITZ["softsign"], tolerance.CURVATURE["softsign"] = 3, 1.0, 2.0
calls.RULES["rmsprop"] = UpdateRule("rmsprop", alpha=0.9, eps=1e-3)
update, update_bound = reference.update, tolerance.update_bound


def own_update(rule, tensor, p, g, state, t, lr):
    if rule.kind != "rmsprop":
        return update(rule, tensor, p, g, state, t, lr)
    lr, g = lr * tensor.lr_factor, g + tensor.weight_decay * p
    mean_square = rule.alpha * state[0] + (1.0 - rule.alpha) * g**2
    return p - lr * g / (np.sqrt(mean_square) + rule.eps), (mean_square,)


def own_bound(rule, tensor, p, g, state, t, lr, g_bound=0.0, u=tolerance.U32):
    if rule.kind != "rmsprop":
        return update_bound(rule, tensor, p, g, state, t, lr, g_bound, u)
    g_error = g_bound + 3.0 * u * (np.abs(g) + tensor.weight_decay * np.abs(p))
    g = np.abs(g + tensor.weight_decay * p)
    square = rule.alpha * state[0] + (1.0 - rule.alpha) * g**2
    error = (1.0 - rule.alpha) * (2.0 * g * g_error + g_error**2) + 6.0 * u * square + tolerance.TINY
    low, high = np.sqrt(np.maximum(square - error, 0.0)) + rule.eps, np.sqrt(square + error) + rule.eps
    change = (g + g_error) / low - g / high + 6.0 * u * (g + g_error) / low
    return lr * tensor.lr_factor * change + 4.0 * u * np.abs(p) + tolerance.TINY, (error,)


reference.update, tolerance.update_bound = own_update, own_bound
"""
# Beside the tests that are there: whole steps, and updates, with the new functions.
TESTS = """
from dataclasses import replace

import numpy as np
import pytest
from calls import RULES, Clock
from devices import TILES, VARIANT_PARAMETERS
from fleet_cases import Fleet, Model, Shape
from memory import Values
from tolerance import assert_updated

from fusemlp_kernels.contract import LossSpec, Segment, TensorRule


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_updates_by_rmsprop(variant):
    values, rule, tensor = Values(5, variant), RULES["rmsprop"], TensorRule(0.5, 0.1)
    params, square = values.normal(99), np.abs(values.normal(99))
    for _ in range(3):
        clock, grads = Clock(rule), values.normal(99)
        given = *(array.astype(np.float64) for array in (params, grads)), (square.astype(np.float64),)
        operands = {"params": params, "grads": grads, "states": (square,), "segments": (Segment(0, 99, tensor),)}
        variant.bind("update", **operands, **clock.operands)()
        assert_updated(params, (square,), rule, tensor, given, 0, clock.rate, u=variant.unit)


# numba's loop and Triton's resident kernel; tiles round what one call leaves to the next, and the oracle does not
WHOLE_STEPS = [p for p in VARIANT_PARAMETERS if p.values[0].device.backend != "cupy" and p.values[0].device != TILES]


@pytest.mark.parametrize("variant", WHOLE_STEPS)
def test_steps_with_softsign_and_rmsprop(variant):
    model = Model(RULES["rmsprop"], LossSpec("mse"), seed=3, decay=0.05, lr_factor=0.5)
    fleet = Fleet(variant, Shape(activations=("softsign", "softsign")), [model, replace(model, seed=4)])
    for _ in range(2):
        fleet.check_a_step()
"""


def test_one_row_adds_an_activation_or_an_optimizer_on_every_backend(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / PACKAGE.name / "pointwise.py"
    text = table.read_text("utf-8")
    for start, stop, row in (
        ("ACTIVATIONS: dict", "\n}", ACTIVATION_ROW),
        ("OPTIMIZERS: dict", "\n}", OPTIMIZER_ROW),
        ("class Hyperparameters", "\n\n\n", HYPERPARAMETER),
    ):
        end = text.index(stop, text.index(start))
        text = text[:end] + row.rstrip() + text[end:]
    table.write_text(text, "utf-8")
    (tmp_path / "added_formulas.py").write_text(PLUGIN.replace("ORACLE_ROW", ORACLE_ROW), "utf-8")
    (tmp_path / "test_added.py").write_text(TESTS, "utf-8")
    paths = [tmp_path, ROOT / "engine", ROOT / "tests/kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    command = [sys.executable, ROOT / "ci/print_formulas.py"]
    subprocess.run(command, env=given, check=True, cwd=tmp_path)
    style = subprocess.run([sys.executable, "-m", "ruff", "format", "--check", tmp_path / PACKAGE.name], cwd=ROOT)
    assert style.returncode == 0
    layers = ROOT / "tests/kernels/test_layers.py::test_layers_of_many_blocks"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "added_formulas", "-p", "no:cacheprovider"]
    chosen = "(softsign or rmsprop) and not (fp16 or tf32 or fp64 or float64)"
    command += ["-k", chosen, layers, tmp_path / "test_added.py"]
    done = subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
