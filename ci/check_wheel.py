"""Build the wheel and test it outside the checkout; run with the checkout's environment.

The wheel goes into a fresh environment that borrows the dependencies of the running one. A line in a ``.pth`` file adds
their folder to the search path without reading the ``.pth`` files in it, so the checkout's editable install is not
seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fusemlp": ROOT / "engine/fusemlp", "fusemlp_kernels": ROOT / "kernels/fusemlp_kernels"}

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


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fusemlp-wheel-") as name:
        folder = Path(name).resolve()
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=ROOT)
        (wheel,) = folder.glob("*.whl")
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
        version = run(python, "-I", "-c", "import fusemlp; print(fusemlp.__version__)", cwd=folder).strip()
        for command in ((python, "-I", "-m", "fusemlp"), (scripts / "fusemlp",)):
            printed = run(*command, "--version", cwd=folder)
            if version not in printed.split():
                sys.exit(f"--version prints {printed!r}, the version is {version}")
        run(python, "-I", "-c", TRAINING, cwd=folder)
    print(f"{wheel.name}: installed, imported and trained outside the checkout")


if __name__ == "__main__":
    main()
