"""``bench compare`` finds what became slower; the pages' tables agree with the committed results."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import compare, doors, readme, report
from bench.cases import CASES

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("784-10-10@32", "784-128-10@128")
FLEETS = ("64-32-10@32:adam:x1", "64-32-10@32:adam:x8", "64-32-10@32:adam:x64")
PEERS = {"engine": 1.0, "engine_numpy_eager": 1.5, "torch_eager": 6.0, "jax_scan": 1.2}
FLEET_PEERS = {"fleet": 1.0, "jax_vmap": 1.4, "sklearn_loop": 14.0}

SAME = {
    **{"status": "timed", "reason": "", "difference_of_tolerance": 0.1, "plan": "", "variables": {}, "card": None},
    **{"date": "2026-01-01T00:00:00+00:00", "commit": "0123456789ab", "openblas_variables_unset": {}},
    **{"thread_pools": {"engine": []}, "versions": {"fusemlp": "1", "torch": "2", "jax": "3", "sklearn": "4"}},
    "machine": {"cpu": "some processor", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64"},
}


def lines(seed, *, own=1.0, machine=1.0, rounds=11, noise=0.02):
    """Return the lines of a run in which fusemlp is ``own`` times and the machine ``machine`` times as slow."""
    generator = np.random.default_rng(seed)
    found = []
    for name, times in [*((n, PEERS) for n in NETWORKS), *((n, FLEET_PEERS) for n in FLEETS)]:
        case = CASES[name]
        drift = machine * np.exp(noise * generator.standard_normal(rounds))
        reference = None
        for peer, factor in times.items():
            slower = own if peer in ("engine", "fleet") else 1.0
            every = 20.0 * factor * slower * drift * np.exp(noise * generator.standard_normal(rounds))
            reference = every if reference is None else reference
            ratio, spread = np.percentile(every / reference, [20, 50, 80]), np.percentile(every, [20, 50, 80])
            found.append(
                vars(case)
                | SAME
                | {
                    **{"case": name, "flops": case.flops, "peer": peer, "label": peer.upper()},
                    **{"rounds": rounds, "every_round": list(every), "first_epoch_seconds": 0.1 * factor},
                    "microseconds": dict(zip(("p20", "p50", "p80"), spread, strict=True)),
                    "ratio": dict(zip(("p20", "p50", "p80"), ratio, strict=True)),
                }
            )
    return found


def verdicts(before, after):
    return {(one.case, one.label): one.verdict(0.03) for one in compare.compared(before, after)}


def test_a_slower_machine_is_no_slower_engine():
    assert set(verdicts(lines(0), lines(1, machine=1.4)).values()) == {"-"}


def test_what_became_slower_is_found_and_nothing_else():
    found = verdicts(lines(0), lines(1, own=1.1, machine=0.8))
    assert {key for key, said in found.items() if said == "slower"} == {
        *((name, "ENGINE") for name in NETWORKS),
        *((name, "FLEET") for name in FLEETS),
    }
    assert found["784-10-10@32", "ENGINE_NUMPY_EAGER"] == "-"
    assert verdicts(lines(1, own=1.1), lines(0))["784-10-10@32", "ENGINE"] == "faster"


def test_without_others_the_clock_decides():
    alone = [
        [line for line in lines(seed, machine=slow) if line["peer"] == "engine"] for seed, slow in ((0, 1), (1, 2))
    ]
    assert set(verdicts(*alone).values()) == {"slower"}
    assert all(one.yardstick == () for one in compare.compared(*alone))


def test_noise_is_not_taken_for_a_change():
    """The interval must cover 1 if the rounds of the same code scatter by a fifth."""
    changed = [set(verdicts(lines(seed, noise=0.2), lines(seed + 100, noise=0.2)).values()) for seed in range(6)]
    assert sum(found != {"-"} for found in changed) <= 1


def written(path, found):
    report.write(found, path)
    return str(path)


def test_the_exit_code_says_whether_something_became_slower(tmp_path, capsys):
    before = written(tmp_path / "before.jsonl", lines(0))
    after = written(tmp_path / "after.jsonl", lines(1, own=1.2))
    assert compare.main([before, before]) == 0
    assert compare.main([before, after]) == 1
    printed = capsys.readouterr().out
    assert "| 784-10-10@32 | ENGINE |" in printed and "**slower**" in printed
    assert "beside TORCH_EAGER, JAX_SCAN, JAX_VMAP, SKLEARN_LOOP in the same rounds" in printed
    assert compare.main([before, written(tmp_path / "none.jsonl", [])]) == 2
    with pytest.raises(SystemExit, match="2"):
        compare.main([before, str(tmp_path / "missing.jsonl")])
    assert "no such file" in capsys.readouterr().err


def spun(seed, busy):
    """Return the lines of a run beside spinning processes."""
    return [{**line, "busy": busy} for line in lines(seed, machine=2.0)] if busy else lines(seed)


def test_runs_beside_other_numbers_of_processes_are_not_compared(tmp_path, capsys):
    quiet, one, two = (written(tmp_path / f"{busy}.jsonl", spun(busy, busy)) for busy in range(3))
    assert compare.main([one, one]) == 0
    for pair in ((quiet, one), (one, quiet), (one, two)):
        assert compare.main([*pair]) == 2
    message = capsys.readouterr().err
    assert f"{quiet} was measured with nothing beside, {one} was measured beside 1 spinning process;" in message


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_agree_with_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert readme.written(text) == text, "run python -m bench readme"
    assert text.count("<!-- bench ") == text.count("<!-- /bench -->") == len(readme.MARKED.findall(text)) >= 1


def test_every_committed_result_of_a_door_or_study_has_its_table():
    shown = {found["file"] for page in readme.PAGES for found in readme.MARKED.finditer(page.read_text("utf-8"))}
    files = {path.name for path in report.RESULTS.glob("*.jsonl") if readme.kind(path)}
    assert files and files <= shown
    assert "not yet measured on a GPU" in (ROOT / "bench" / "README.md").read_text("utf-8")


def test_the_pages_are_written_from_other_results(tmp_path, monkeypatch, capsys):
    target, other = tmp_path / "README.md", tmp_path / "bench.md"
    target.write_text("Before.\n<!-- bench old.jsonl -->\n| x |\n<!-- /bench -->\nAfter.\n")
    chosen = "<!-- bench old.jsonl cases=784-10-10@32 peers=engine,jax_scan -->"
    other.write_text(f"{chosen}\n| x |\n<!-- /bench -->\n")
    monkeypatch.setattr(readme, "PAGES", (target, other))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.main(["--check"]) == 2
    assert "old.jsonl" in capsys.readouterr().err
    path = written(tmp_path / "new.jsonl", lines(0))
    assert readme.main([path, "--check"]) == 1
    assert "| x |" in target.read_text() and "| x |" in other.read_text()
    assert readme.main([path]) == 0
    text = target.read_text()
    assert text.startswith("Before.\n<!-- bench new.jsonl -->\n") and text.endswith("<!-- /bench -->\nAfter.\n")
    assert "some processor" in text and "| 784-10-10, 32 |" in text
    text = other.read_text()
    assert text.startswith(chosen.replace("old", "new")) and "| network, batch | ENGINE | JAX_SCAN |" in text
    assert "| 784-10-10, 32 |" in text and "784-128-10" not in text and "models" not in text
    assert readme.main(["--check"]) == 0
    target.write_text(target.read_text() + "more")
    other.write_text(text.replace("784-10-10, 32", "784-10-10, 31"))
    assert readme.main(["--check"]) == 1
    assert readme.main([str(ROOT / "README.md")]) == 2


def test_a_brief_table_holds_medians(tmp_path):
    path = written(tmp_path / "new.jsonl", lines(0))
    chosen = " cases=784-10-10@32 peers=engine,jax_scan"
    full, brief = (readme.section(Path(path), choice) for choice in (chosen, f"{chosen} brief"))
    figures = [re.search(r"\| 784-10-10, 32 \| (.*) \|", text)[1].split(" | ") for text in (full, brief)]
    assert figures[1][0] == f"**{figures[0][0].split()[0]}**"
    assert re.fullmatch(r"[\d.,]+ \([\d.]+x\)", figures[1][1]) and figures[1][1].split()[0] in figures[0][1]
    assert "To repeat" in brief and len(brief) < len(full)


def test_a_door_has_its_table_in_the_readme_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    row = doors.line("64-32-10@32, SGD", [3e-4, 4e-4, 5e-4], [1e-4, 1e-4, 1e-4])
    path = tmp_path / "door.jsonl"
    doors.finish("torch_door", ("sklearn",), [row], path, headers=["network", "eager", "fused"])
    printed = capsys.readouterr().out
    assert "| 64-32-10@32, SGD | 400 us | 100 us | **4.00** (3.40 to 4.60) |" in printed
    other = written(tmp_path / "steps.jsonl", lines(0))
    before = "<!-- bench old-door.jsonl -->\n<!-- /bench -->\n<!-- bench steps.jsonl -->\n<!-- /bench -->\n"
    written(tmp_path / "old-door.jsonl", [{**json.loads(path.read_text()), "label": "old"}])
    after = readme.written(before, path)
    assert f"<!-- bench door.jsonl -->\n{printed}<!-- /bench -->" in after
    assert "<!-- bench steps.jsonl -->\n| network, batch |" in after
    assert "<!-- bench old-door.jsonl -->" in readme.written(before, Path(other))


def test_fusemlp_bench_is_the_benchmark_of_the_checkout(tmp_path):
    paths = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise SystemExit('another bench')")

    def run(*arguments, path=paths):
        command = [sys.executable, "-P", "-m", "fusemlp", "bench", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    shown = run("--help")
    assert shown.returncode == 0 and "usage: python -m bench" in shown.stdout
    refused = run("--case", "nonsense")
    assert refused.returncode == 2
    assert "Expected one of" in refused.stderr

    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "fusemlp_kernels").symlink_to(ROOT / "kernels/fusemlp_kernels")
    # a copy, since a link leads back to the checkout
    shutil.copytree(ROOT / "engine/fusemlp", installed / "fusemlp")
    outside = run("--quick", path=str(installed))
    assert outside.returncode == 2
    assert outside.stdout == ""
    assert "the benchmark comes with a checkout" in outside.stderr


def test_the_committed_results_are_whole():
    for path in sorted(report.RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            assert {"date", "machine", "versions"} <= record.keys(), path.name
            assert record["machine"]["system"] == "Linux x86_64", path.name


def test_the_figures_of_a_card_get_a_section_with_its_name(tmp_path, monkeypatch, capsys):
    results, found, page = tmp_path / "results", tmp_path / "gpu", tmp_path / "README.md"
    results.mkdir()
    found.mkdir()
    monkeypatch.setattr(readme, "PAGES", (page,))
    monkeypatch.setattr(readme, "RESULTS", results)
    written(results / "host.jsonl", lines(0))
    page.write_text("<!-- bench host.jsonl -->\n<!-- /bench -->\n<!-- gpu -->\nNothing yet.\n<!-- /gpu -->\n")
    written(found / "table.jsonl", lines(0))
    assert readme.main(["--gpu", str(found)]) == 2
    assert "expected the results of ci/gpu on a card" in capsys.readouterr().err
    for name, speed in (("Card B", 1), ("Card A", 2), ("Card A", 3)):
        (found / "table.jsonl").unlink()
        card = {"card": {"name": name, "driver": "1"}, "device": "gpu"}
        written(found / "table.jsonl", [line | card for line in lines(speed)])
        assert readme.main(["--gpu", str(found)]) == 0
    text = page.read_text()
    assert text.count("### Card A\n") == text.count("### Card B\n") == 1 and "Nothing yet" not in text
    assert text.count("(driver 1)") == 2 and readme.main(["--check"]) == 0
    assert "| the networks above | not yet" not in text and "not yet measured on a GPU" in text
    assert readme.kind(results / "host.jsonl") == "" and len(list(results.glob("*-card-a-table.jsonl"))) == 1
