"""A release: the commit that the code names, its pages, and the table of files that it reads."""

import json
import re
import runpy
import shutil
import subprocess
from datetime import date
from pathlib import Path

import pytest
import release
from safetensors import safe_open

import fusemlp
from fusemlp.report.onnx_graph import OPSET
from fusemlp.report.runs import FORMAT
from fusemlp.runtime.files import CHECKPOINT, MODEL
from make import output_of, read, result_of, trained

ROOT = Path(__file__).resolve().parents[1]


def git(folder, *words):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """Return a repository of one commit that holds the version and its pages where the checkout has them."""
    for name in (release.VERSION_FILE, release.CHANGES, release.CITATION):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "x")
    return tmp_path


def commit_of(folder):
    return runpy.run_path(str(folder / "engine" / "fusemlp" / "_version.py"))["commit"]()


def test_a_checkout_names_its_commit(checkout):
    assert commit_of(checkout) == git(checkout, "rev-parse", "--short=12", "HEAD")
    git(checkout, "tag", "v9.9.9")
    (checkout / "untracked").touch()
    assert commit_of(checkout) == git(checkout, "rev-parse", "--short=12", "HEAD")
    with (checkout / "engine" / "fusemlp" / "_version.py").open("a") as file:
        file.write("# changed\n")
    assert commit_of(checkout) == git(checkout, "rev-parse", "--short=12", "HEAD") + "-dirty"


def test_an_installed_package_names_the_commit_of_its_build_or_none(checkout):
    """The package lies inside another project's repository, as in an environment there."""
    environment = checkout / "environment"
    shutil.copytree(checkout / "engine", environment / "engine")
    assert commit_of(environment) is None
    (environment / "engine" / "fusemlp" / "_commit.txt").write_text("0123456789ab\n")
    assert commit_of(environment) == "0123456789ab"


def edited(checkout, name, old, new):
    """Commit a change of a file, if the name is that of one."""
    text = (checkout / name).read_text()
    assert old in text
    (checkout / name).write_text(text.replace(old, new, 1))
    git(checkout, "commit", "--quiet", "--all", "--message", "x")


def test_this_version_has_its_changes_and_its_citation(checkout):
    assert release.obstacles(checkout, date.max) == []


VERSION = release.version_of(ROOT)
OBSTACLES = {
    "a tag": (lambda folder: git(folder, "tag", f"v{VERSION}"), "is tagged already"),
    "a change": (lambda folder: (folder / "new").touch(), r"the tree is not clean(.|\n)*\?\? new"),
    "another version": (lambda folder: edited(folder, release.VERSION_FILE, VERSION, "9.9.9"), "'## 9.9.9 .*' on top"),
    "a name": (lambda folder: edited(folder, release.VERSION_FILE, VERSION, "9.9rc"), "such as 1.2.3, found 9.9rc"),
    "no date": (lambda folder: edited(folder, release.CHANGES, f"## {VERSION} (", "## Next ("), "found 'Next"),
    "a date to come": (lambda folder: edited(folder, release.CHANGES, f"{VERSION} (20", f"{VERSION} (29"), "found 29"),
    "no such day": (
        lambda folder: edited(folder, release.CHANGES, f"{VERSION} (20", f"{VERSION} (2026-13-77) (20"),
        "top",
    ),
    "another citation": (lambda folder: edited(folder, release.CITATION, VERSION, "9.9.9"), r"CITATION\.cff: expected"),
}


@pytest.mark.parametrize(("change", "message"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_a_release_lacks_is_named(checkout, change, message):
    change(checkout)
    assert any(re.search(message, problem) for problem in release.obstacles(checkout, date(2099, 1, 1)))


def test_doctor_and_reports_name_the_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusemlp.cli.probes.commit", lambda: "0123456789ab")
    monkeypatch.setattr("fusemlp.cli.report.commit", lambda: "0123456789ab")
    report = result_of(capsys, "doctor")
    assert (report["fusemlp"], report["commit"]) == (fusemlp.__version__, "0123456789ab")
    assert f"fusemlp {fusemlp.__version__}, commit 0123456789ab, Python" in output_of(capsys, "doctor")
    folder = trained(tmp_path, "--epochs", "1", "--models", "1", "--hidden", "4", "--quiet")
    assert read(folder / "report.json")["commit"] == "0123456789ab"


def table_of_files():
    """Return the table in compatibility.md: of each file its format, the first release to write it, the oldest read."""
    text = (ROOT / "engine/docs/compatibility.md").read_text(encoding="utf-8")
    _, _, *rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {file.strip(): tuple(map(str.strip, cells)) for file, _, *cells in rows}


# A file of each kind, of the release that wrote its format first; tests/engine/test_old_runs.py reads them.
KEPT = {
    "model `.safetensors`": "release_0_1_0/model.safetensors",
    "checkpoint `.safetensors`": "release_0_1_0/checkpoint.safetensors",
    "estimator `.safetensors`": "release_0_2_0/regressor.safetensors",
    "run folder": "runs_2026_11/plain/config.json",
    "pickled engine or estimator": "release_0_1_0/engine.pickle",
}


def test_every_format_that_is_read_has_a_file_of_its_release():
    table = table_of_files()
    assert {file for file, (_, _, oldest) in table.items() if oldest != "not read"} == set(KEPT)
    for file, name in KEPT.items():
        path, (form, since, oldest) = ROOT / "tests/fixtures" / name, table[file]
        assert since == oldest, "a format that is read from a later release on needs a file of that one too"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as opened:
                metadata = opened.metadata()
            described = json.loads(metadata.get("fusemlp_model") or metadata["fusemlp"])
            assert (str(described["format"]), described["version"]) == (form, since), file
            assert ("estimator" in described.get("extra", {})) == file.startswith("estimator")
        elif path.suffix == ".json":
            described = read(path)
            assert (str(described["format"]), described["versions"]["fusemlp"]) == (form, since), file
        else:
            assert path.exists() and form == "none"


def test_the_table_has_the_formats_that_are_written():
    forms = {file: form for file, (form, _, _) in table_of_files().items()}
    assert forms["model `.safetensors`"] == str(MODEL.version)
    assert forms["checkpoint `.safetensors`"] == forms["estimator `.safetensors`"] == str(CHECKPOINT.version)
    assert forms["run folder"] == str(FORMAT)
    assert forms["ONNX graph"] == f"opset {OPSET}"
