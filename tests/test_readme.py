"""The pages for people: README.md, the README of each folder and engine/docs. Their links, and that snippets run.

A page that is added to engine/docs is taken without a change here. Its Python blocks run from top to bottom, and its
``fusemlp`` commands as typed. ``runs/digits-...`` and ``runs/houses-...`` stand for the newest run of this name; if the
page has made none, a short training makes one.
"""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer.main

from fusemlp.cli.app import app
from make import run

ROOT = Path(__file__).resolve().parents[1]
DOCS = tuple(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "engine/docs").rglob("*.md")))
PAGES = ("README.md", "engine/README.md", "engine/tutorial/README.md", "kernels/README.md", "bench/README.md", *DOCS)
# tests/test_guides.py runs these: their commands and Python blocks take turns.
GUIDES = tuple(page for page in DOCS if page.startswith("engine/docs/guides/"))
RUNS = {
    "runs/digits-...": "fusemlp train digits --epochs 2",
    "runs/houses-...": "fusemlp train houses.csv --target price --models 1 --epochs 2",
}


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def anchor(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_readme_has_at_most_200_lines():
    assert len(text_of("README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            found = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, found), target


def run_snippets(page, count=None, **names):
    """Run the Python blocks of a page as typed, one after another, and return the names that they leave."""
    names["__name__"] = "__main__"
    for number, block in enumerate(blocks(page, "python")[:count], 1):
        exec(compile(block, f"{page}, Python block {number}", "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_of_the_readme(folder):
    houses = pd.DataFrame({"size": np.arange(40, 100), "street": list("ab") * 30})
    names = run_snippets("README.md", houses=houses, prices=1000.0 * houses["size"], new_houses=houses[:5])
    assert (names["low"] <= names["high"]).all()
    X, y = names["Xv"], names["yv"]
    assert max(names["history"].history["val_accuracy"]) >= 0.965
    # A network that has learned nothing has log(10); unscaled pixels would begin above it.
    assert names["history"].history["loss"][0] < np.log(10)
    assert np.mean(names["engine"].predict(X) == y) >= 0.96
    assert np.mean(names["fleet"].predict(X).prediction == y) >= 0.96
    assert names["search"].score(X, y) >= 0.95


def known_labels(names, engine):
    return np.mean(names[engine].predict(names["Xv"]) == names["yv"])


def converted(names):
    known, module = names["residual"].outputs(names["X"]), names["module"]
    np.testing.assert_allclose(known, module(names["X"]).detach(), rtol=1e-4, atol=1e-5)
    return names["again"].state_dict().keys() == names["residual"].state_dict().keys()


# Facts about the names that the snippets of a page leave.
FACTS = {
    "python.md": lambda names: max(names["history"].history["val_accuracy"]) >= 0.965,
    # Optuna draws the trials without a seed: of ten one learns.
    "many-models.md": lambda names: (
        names["search"].score(names["Xv"], names["yv"]) >= 0.95 and names["study"].best_value >= 0.8
    ),
    "transfer.md": lambda names: np.mean(names["odd"].predict(names["Xv"]) == names["yv"] % 2) >= 0.85,
    "networks.md": lambda names: known_labels(names, "deep") >= 0.95,
    "losses.md": lambda names: np.mean(names["focused"].predict(names["Xv"]).argmax(axis=1) == names["yv"]) >= 0.95,
    "pytorch.md": converted,
    "tables.md": lambda names: (
        np.mean(names["model"].predict(names["table"]) == (names["table"]["size"] > 120)) >= 0.95
    ),
    "robustness.md": lambda names: known_labels(names, "firm") >= 0.8,
}


@pytest.mark.parametrize("page", [page for page in DOCS if page not in GUIDES and blocks(page, "python")])
def test_the_snippets_of_the_documentation(page, folder):
    names = run_snippets(page)
    assert FACTS.get(page.removeprefix("engine/docs/"), bool)(names)


def test_the_facts_are_of_pages():
    assert {f"engine/docs/{page}" for page in FACTS} <= set(DOCS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_snippets_of_the_kernels():
    names = run_snippets("kernels/README.md")
    torch = names["torch"]
    w0, b0, w1, b1 = (names[name].double().requires_grad_() for name in ("w0", "b0", "w1", "b1"))
    h = torch.relu(names["x"].double() @ w0.T + b0)
    loss = torch.nn.functional.cross_entropy(h @ w1.T + b1, names["labels"])
    loss.backward()
    # Each value comes of three products and sums of 64, 16 and 32 terms in fp32.
    bound = (64 + 16 + 32) * np.finfo(np.float32).eps
    for found, expected in ((names["loss"], loss), (names["dw"], w1.grad), (names["db"], b1.grad)):
        difference = (found.reshape(expected.shape).double() - expected.double()).abs().max()
        assert difference <= bound * expected.abs().max()


@pytest.mark.parametrize("sign", "-+")
def test_the_torch_loop_runs_before_and_after(sign, folder):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    block = next(block for block in blocks("README.md", "python") if "load_digits" in block)
    names = {}
    exec(compile(block, "README.md, digits", "exec"), names)
    (diff,) = blocks("README.md", "diff")
    loop = "\n".join(line[1:] for line in diff.splitlines() if line[0] in f" {sign}")
    exec(compile(loop, "README.md, loop", "exec"), names)
    found = names["module"].eval()(torch.tensor(names["Xv"]).float()).argmax(1)
    assert np.mean(found.numpy() == names["yv"]) >= 0.95


def write_tables():
    """Write the files that the commands of the pages name into the working folder."""
    generator = np.random.default_rng(0)
    size, patient = generator.integers(40, 200, 60), np.arange(60) % 12
    price = 3000 * size + 10000 * generator.standard_normal(60)
    houses = ["size,street,price", *(f"{s},{'ab'[s % 2]},{p:.0f}" for s, p in zip(size, price, strict=True))]
    Path("houses.csv").write_text("\n".join(houses))
    flats = [houses[0], *(f"{s + 5},a,{p:.0f}" for s, p in zip(size, price, strict=True))]
    Path("flats.csv").write_text("\n".join(flats))
    visits = [f"v{i},{p},{20 + i},{100 + 3 * i}" for i, p in enumerate(patient)]
    Path("visits.csv").write_text("\n".join(["name,patient,age,cost", *visits]))
    for at, part in enumerate(("march", "april", "recent")):
        sold = [f"F{row},{house}" for row, house in enumerate(houses[1:])][at::3]
        Path(f"{part}.csv").write_text("\n".join(["flat_id,size,zone,price", *sold]))
    pixels = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]
    Path("new.csv").write_text(",".join(["size,street", *pixels]) + "\n" + ",".join(["80,a", *"0" * 64]) + "\n")


def commands(page):
    """Return the words of each line of a page's shell blocks that begins with ``fusemlp``."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    # without what the shell does with the output
    own = [re.split(r" (?:2?>>?|\|) ", line)[0] for line in lines if line.startswith("fusemlp ")]
    typed = [shlex.split(line, comments=True) for line in own]
    # tests/engine/test_cli_train.py runs the one, which takes ten seconds, and test_trackers.py the other
    return [words for words in typed if not {"mnist5k", "--track"} & set(words)]


def newest_run(named):
    """Return the newest run folder of a name such as ``runs/digits-...``, made by a short training if there is none."""
    pattern = named.replace("...", "*")
    if not any(Path().glob(pattern)):
        assert run(*shlex.split(RUNS[named])[1:]) == 0
    return str(max(Path().glob(pattern), key=lambda path: path.stat().st_mtime))


@pytest.mark.parametrize("page", [page for page in ("README.md", *DOCS) if page not in GUIDES and commands(page)])
def test_commands_run_as_typed(page, folder, capsys):
    write_tables()
    for _, *words in commands(page):
        words = [newest_run(word) if word.endswith("-...") else word for word in words]
        assert run(*words) == 0, (words, capsys.readouterr().err)


def test_the_extras_that_pages_and_messages_name_exist():
    known = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    sources = [*(ROOT / page for page in PAGES), *(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    named = [name for path in sources for name in re.findall(r"(?:fusemlp|'\.)\[([\w,-]+)\]", path.read_text("utf-8"))]
    assert len(named) > 10
    assert set(",".join(named).split(",")) <= known.keys()


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_commands_have_options_that_exist(page):
    known = typer.main.get_command(app).commands
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if "fusemlp " in line]
    lines = [line[line.index("fusemlp ") :] for line in lines if not line.startswith(("pip", "#"))]
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        options = {"--help", "--help-all", *(option for parameter in known[name].params for option in parameter.opts)}
        assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md"])
def test_the_printed_program_is_what_the_command_prints(page, capsys):
    command = re.search(r"`fusemlp\s(plan [^`]*--optimizer[^`]*)`", text_of(page))
    assert run(*shlex.split(command[1])) == 0
    shown = re.search(r"^```\n(#  call.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    assert capsys.readouterr().out.startswith(shown[1])
