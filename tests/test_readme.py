"""The pages for people: README.md and the README of each folder. Their length, their links, and that snippets run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from fusemlp.cli.app import app, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "engine/README.md", "kernels/README.md", "bench/README.md")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_readme_has_at_most_220_lines() -> None:
    assert len(text_of("README.md").splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_a_heading(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            found = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, found), target


@pytest.mark.parametrize("page", ["README.md", "engine/README.md"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_python_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    names: dict[str, Any] = {}
    ran = 0
    for block in blocks(page, "python"):
        columns = 784 if "784" in block else 64
        X, y = generator.random((200, columns), np.float32), np.arange(200) % 10
        names |= {"X": X, "y": y, "Xv": X[:40], "yv": y[:40], "x": X[:8]}
        if "engine.step(x, y)" in block:
            # the page's y of a single batch
            block = block.replace("engine.step(x, y)", "engine.step(x, y[:8])")
        exec(compile(block, f"{page}, block {ran}", "exec"), names)
        ran += 1
    assert ran >= 3


def test_the_torch_loop_runs() -> None:
    torch = pytest.importorskip("torch")
    import fusemlp.torch

    (diff,) = blocks("README.md", "diff")
    loop = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    x, y = torch.randn(8, 64), torch.arange(8)
    names = {"fusemlp": fusemlp, "torch": torch, "nn": torch.nn, "loader": [(x, y)]}
    exec(compile(loop, "README.md, loop", "exec"), names)
    assert torch.isfinite(names["loss"])


@pytest.mark.parametrize("page", ["README.md", "engine/README.md"])
def test_commands_have_options_that_exist(page: str) -> None:
    command: Any = typer.main.get_command(app)
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if "fusemlp " in line]
    lines = [line[line.index("fusemlp ") :] for line in lines if not line.startswith(("pip", "#"))]
    assert len(lines) >= 4
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        assert name in command.commands, line
        known = {option for parameter in command.commands[name].params for option in parameter.opts}
        for word in words:
            assert not word.startswith("--") or word in known, line


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md"])
def test_the_printed_program_is_what_the_command_prints(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"`fusemlp\s(plan [^`]*--optimizer[^`]*)`", text_of(page))
    assert command is not None
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command[1]))
    assert ended.value.code == 0
    shown = re.search(r"^```\n(#  call.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    assert shown is not None and capsys.readouterr().out.startswith(shown[1])
