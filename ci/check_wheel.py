"""Build the wheel and test it outside the checkout; run with the checkout's environment.

usage: python ci/check_wheel.py [FOLDER]

Three builds must give the same bytes; the metadata and the bill of materials must be what pyproject.toml says. FOLDER
keeps the wheel and the source distribution.

The wheel goes into a fresh environment that borrows the dependencies of the running one. A line in a ``.pth`` file adds
their folder to the search path without reading the ``.pth`` files in it, so the checkout's editable install is not
seen.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "engine"
PACKAGES = {"fusemlp": SOURCE / "fusemlp", "fusemlp_kernels": ROOT / "kernels/fusemlp_kernels"}

# The argument is the folder that both packages must come from.
ORIGINS = """
import importlib.util, pathlib, sys
for name in ("fusemlp", "fusemlp_kernels"):
    origin = importlib.util.find_spec(name).origin
    if origin is None or not pathlib.Path(origin).resolve().is_relative_to(sys.argv[1]):
        sys.exit(f"{name} comes from {origin}, not from the wheel in {sys.argv[1]}")
"""

TRAINING = """
import numpy as np
from fusemlp import MLP, SGD, Engine
rng = np.random.default_rng(0)
y = np.repeat(np.arange(3), 50)
X = (rng.standard_normal((3, 4))[y] + 0.3 * rng.standard_normal((150, 4))).astype(np.float32)
engine = Engine(MLP([4, 8, 3]), loss="cross_entropy", optimizer=SGD(lr=0.1), batch_size=32, seed=0)
loss = engine.fit(X, y, epochs=5).history["loss"]
if not (len(loss) == 5 and np.isfinite(loss).all() and loss[-1] < loss[0]):
    raise SystemExit(f"training does not lower the loss: {loss}")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Return the command's output; if it fails, print everything it wrote and exit."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        shown = " ".join(str(word) for word in command if "\n" not in str(word))
        sys.exit(f"{done.stdout}\nexit status {done.returncode}: {shown}")
    return done.stdout


def missing_files(wheel: Path) -> list[str]:
    """Return the files of both packages in the checkout, ``py.typed`` included, that the wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        present = set(archive.namelist())
    wanted = {f"{name}/py.typed" for name in PACKAGES}
    for name, folder in PACKAGES.items():
        inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        wanted |= {
            f"{name}/{path.as_posix()}"
            for path in inside
            if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
        }
    return sorted(wanted - present)


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source distribution and from it the wheel into ``folder``; return both.

    The source distribution is built again, and the wheel from the checkout, and from files with other places, times and
    modes; a difference is an error.
    """
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*command, folder, ROOT, cwd=ROOT)
    run(*command, folder / "again", "--sdist", "--wheel", ROOT, cwd=ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "elsewhere", filter="data")
    (unpacked,) = (folder / "elsewhere").iterdir()
    for path in unpacked.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (10**9, 10**9))
    run(*command, folder / "third", "--wheel", unpacked, cwd=unpacked)
    for other in (*(folder / "again").iterdir(), *(folder / "third").iterdir()):
        if other.read_bytes() != (folder / other.name).read_bytes():
            sys.exit(f"{other.name}: the build in {other.parent.name}/ has other bytes than the first")
    return sdist, wheel


def wrong_metadata(installed: Distribution) -> list[str]:
    """Return what in the metadata and in the bill of an installed wheel is not what pyproject.toml says."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    text = installed.read_text("METADATA") or ""
    metadata = Metadata.from_email(text, validate=True)
    wanted = {canonicalize_name(one.name): str(one.specifier) for one in map(Requirement, project["dependencies"])}
    needed = [requirement for requirement in metadata.requires_dist or [] if "extra" not in str(requirement.marker)]
    bill = json.loads(installed.read_text(f"sboms/{project['name']}.cdx.json") or "{}")
    package = bill["metadata"]["component"]
    listed = {part["name"]: part["properties"][0]["value"] for part in bill["components"]}
    checks = {
        "the name": (metadata.name, package["name"]) == (project["name"],) * 2,
        "the version": str(metadata.version) == package["version"] == installed.version,
        "the description": metadata.description == (ROOT / project["readme"]).read_text(encoding="utf-8"),
        "the Python": str(metadata.requires_python) == project["requires-python"],
        "the dependencies": {canonicalize_name(one.name): str(one.specifier) for one in needed} == wanted,
        "the dependencies in the bill": listed == wanted,
        "the extras": {*(metadata.provides_extra or ())} == {*map(canonicalize_name, project["optional-dependencies"])},
        "the command": {script.name for script in installed.entry_points} == {*project["scripts"]},
    }
    return [name for name, right in checks.items() if not right]


def main(kept: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="fusemlp-wheel-") as name:
        folder = Path(name).resolve()
        sdist, wheel = build(folder)
        if missing := missing_files(wheel):
            sys.exit(f"{wheel.name} lacks: {', '.join(missing)}")

        target = folder / "environment"
        venv.create(target, symlinks=os.name != "nt")
        scripts = target / ("Scripts" if os.name == "nt" else "bin")
        python = scripts / "python"
        pip = (sys.executable, "-m", "pip", "--python", python)
        run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(run(python, "-I", "-c", asked, cwd=folder).strip())
        (site / "dependencies.pth").write_text(
            "".join(f"{sysconfig.get_path(kind)}\n" for kind in ("purelib", "platlib")), encoding="utf-8"
        )

        run(python, "-I", "-c", ORIGINS, site, cwd=folder)
        if wrong := wrong_metadata(PathDistribution(next(site.glob("fusemlp-*.dist-info")))):
            sys.exit(f"{wheel.name} differs from pyproject.toml in: {', '.join(wrong)}")
        asked = "from fusemlp._version import commit; print(commit())"
        commits = {run(python, "-I", "-c", asked, cwd=folder), run(sys.executable, "-c", asked, cwd=SOURCE)}
        if len(commits) > 1:
            sys.exit(f"the wheel and the checkout name the commits {commits}")
        version = run(python, "-I", "-c", "import fusemlp; print(fusemlp.__version__)", cwd=folder).strip()
        for command in ((python, "-I", "-m", "fusemlp"), (scripts / "fusemlp",)):
            printed = run(*command, "--version", cwd=folder)
            if version not in printed.split():
                sys.exit(f"--version prints {printed!r}, the version is {version}")
        run(python, "-I", "-c", TRAINING, cwd=folder)
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                shutil.copy(path, kept)
    print(f"{wheel.name}: built three times alike, installed, imported and trained outside the checkout")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None)
