"""Check that this commit can be released, build it into build/release, and tag it.

usage: ci/release [--dry-run | --tag]

A dry run, which is the default, does all but the tag. The tree must be clean, the version new, and its changes and
citation written. Then ci/test must have passed on this commit, or runs now, and the archives are built: three times,
with equal bytes, and with metadata and a bill of materials that say what pyproject.toml says. Nothing is pushed.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import runpy
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION_FILE, CHANGES, CITATION = "engine/fusemlp/_version.py", "engine/docs/changelog.md", "engine/CITATION.cff"
# ci/test writes the commit that it passed on here.
PASSED = "build/passed"


def git(root: Path, *words: str) -> str:
    """Return what git prints."""
    return subprocess.run(["git", *words], cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def version_of(root: Path) -> str:
    """Return the version in the checkout."""
    return str(runpy.run_path(str(root / VERSION_FILE))["__version__"])


def obstacles(root: Path, today: date) -> list[str]:
    """Return what must be mended before the commit can be released, each with its mend."""
    version, problems = version_of(root), []
    if changed := git(root, "status", "--porcelain"):
        problems.append(f"the tree is not clean; commit or remove:\n{changed}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        problems.append(f"{VERSION_FILE}: expected a version such as 1.2.3, found {version}")
    if git(root, "tag", "--list", f"v{version}"):
        problems.append(f"{version} is tagged already; raise __version__ in {VERSION_FILE}")
    first = re.search(r"^## (.*)$", (root / CHANGES).read_text(encoding="utf-8"), re.MULTILINE)
    heading = first[1] if first else "no heading"
    entry = re.fullmatch(r"(\S+) \((\d{4}-\d\d-\d\d)\)", heading)
    if entry is None or entry[1] != version:
        problems.append(f"{CHANGES}: expected the changes under '## {version} ({today})' on top, found {heading!r}")
    elif not _is_past(entry[2], today):
        problems.append(f"{CHANGES}: expected the date of a day up to today, {today}, found {entry[2]}")
    citation = dict(re.findall(r"^(version|date-released): (.*)$", (root / CITATION).read_text("utf-8"), re.MULTILINE))
    expected = {"version": version, "date-released": entry[2] if entry else str(today)}
    if citation != expected:
        problems.append(f"{CITATION}: expected {expected}, as the changes have it, found {citation}")
    return problems


def _is_past(text: str, today: date) -> bool:
    try:
        return date.fromisoformat(text) <= today
    except ValueError:
        return False


def main() -> None:
    about, _, _ = (__doc__ or "").partition("\n\nusage")
    parser = argparse.ArgumentParser(prog="ci/release", description=about)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--dry-run", action="store_true", help="do all but the tag; the default")
    choice.add_argument("--tag", action="store_true", help="tag the commit at the end")
    options = parser.parse_args()
    if problems := obstacles(ROOT, date.today()):
        sys.exit("\n".join(f"ci/release: {problem}" for problem in problems))
    version, commit = version_of(ROOT), git(ROOT, "rev-parse", "HEAD")
    passed = ROOT / PASSED
    if passed.exists() and passed.read_text(encoding="ascii").strip() == commit:
        print(f"ci/release: ci/test passed on {commit[:12]}", flush=True)
    else:
        print("ci/release: ci/test", flush=True)
        subprocess.run([ROOT / "ci/test"], check=True)
    folder = ROOT / "build/release"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, ROOT / "ci/check_wheel.py", folder], check=True)
    if (git(ROOT, "rev-parse", "HEAD"), git(ROOT, "status", "--porcelain")) != (commit, ""):
        sys.exit("ci/release: the checkout changed during the checks; start again")
    for path in sorted(folder.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(ROOT)}")
    if not options.tag:
        print(f"ci/release: {version} can be released; ci/release --tag tags it as v{version}")
        return
    git(ROOT, "tag", "--annotate", f"v{version}", "--message", f"fusemlp {version}")
    print(f"ci/release: tagged v{version}; to publish it: git push origin v{version}, and upload {folder.name}/")


if __name__ == "__main__":
    main()
