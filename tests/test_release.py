"""The commit that the code names."""

import json
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import fusemlp
from fusemlp import _version
from make import read, run, trained

ROOT = Path(__file__).resolve().parents[1]


def git(folder, *words):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """Return a repository of one commit that holds ``_version.py`` where the checkout has it."""
    place = tmp_path / "engine" / "fusemlp"
    place.mkdir(parents=True)
    shutil.copy(_version.__file__, place)
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


def test_doctor_and_reports_name_the_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusemlp.cli.probes.commit", lambda: "0123456789ab")
    monkeypatch.setattr("fusemlp.cli.report.commit", lambda: "0123456789ab")
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["fusemlp"], report["commit"]) == (fusemlp.__version__, "0123456789ab")
    assert run("doctor") == 0
    assert f"fusemlp {fusemlp.__version__}, commit 0123456789ab, Python" in capsys.readouterr().out
    folder = trained(tmp_path, "--epochs", "1", "--models", "1", "--hidden", "4", "--quiet")
    assert read(folder / "report.json")["commit"] == "0123456789ab"
