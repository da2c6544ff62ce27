"""The hook of hatchling that writes the commit and a software bill of materials into what it builds.

The commit goes beside ``_version.py``, in the source distribution too, which knows no git. The bill goes to
``*.dist-info/sboms/`` (PEP 770) in CycloneDX's JSON, all of it from pyproject.toml: the wheel holds no code of others,
so the dependencies stand there with the versions that are allowed, which pip chooses from. Nothing in it depends on
the machine or the time.
"""

from __future__ import annotations

import json
import runpy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VERSION_FILE = "engine/fusemlp/_version.py"
# The property with the versions of a dependency that are allowed.
SPECIFIER = "fusemlp:specifier"
COMMIT_FILE = {"sdist": "engine/fusemlp/_commit.txt", "wheel": "fusemlp/_commit.txt"}


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Add the commit to a source distribution and to a wheel, and the bill to a wheel; nothing to an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fusemlp-build-"))
        if version == "editable":
            return
        commit = runpy.run_path(str(Path(self.root, VERSION_FILE)))["commit"]()
        if commit:
            file = self.folder / "_commit.txt"
            file.write_text(f"{commit}\n", encoding="ascii")
            build_data["force_include"][str(file)] = COMMIT_FILE[self.target_name]
        if self.target_name == "wheel":
            core = self.metadata.core
            content = bill(core.name, self.metadata.version, core.description, commit, core.dependencies)
            sbom = self.folder / f"{core.name}.cdx.json"
            sbom.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            build_data["sbom_files"].append(str(sbom))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self.folder)


def bill(name: str, version: str, description: str, commit: str | None, requirements: Sequence[str]) -> dict[str, Any]:
    """Return the bill of a package as CycloneDX 1.6: the package with its commit, and its ``requirements``."""
    package = {"type": "library", "bom-ref": name, "name": name, "version": version, "description": description}
    package["purl"] = f"pkg:pypi/{name}@{version}"
    if commit:
        package["pedigree"] = {"commits": [{"uid": commit}]}
    others = sorted((component(Requirement(text)) for text in requirements), key=lambda other: other["name"])
    names = [other["name"] for other in others]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": package},
        "components": others,
        "dependencies": [{"ref": name, "dependsOn": names}, *({"ref": other} for other in names)],
    }


def component(requirement: Requirement) -> dict[str, Any]:
    """Return a dependency. It has no version, since the wheel does not contain it, but the versions allowed."""
    name = canonicalize_name(requirement.name)
    allowed = {"name": SPECIFIER, "value": str(requirement.specifier)}
    return {"type": "library", "bom-ref": name, "name": name, "purl": f"pkg:pypi/{name}", "properties": [allowed]}
