"""The documentation site: the API pages have every public name once."""

import collections
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    name
    for page in (ROOT / "engine/docs/api").glob("*.md")
    for name in re.findall(r"(?m)^::: (\S+)$", page.read_text("utf-8"))
]


@pytest.mark.parametrize("package", ["fusemlp", "fusemlp.sklearn", "fusemlp.torch", "fusemlp_kernels"])
def test_the_api_pages_have_every_public_name(package):
    if package == "fusemlp.torch":
        pytest.importorskip("torch")
    public = {f"{package}.{name}" for name in importlib.import_module(package).__all__ if not name.startswith("_")}
    assert public - set(NAMES) == set()


def test_the_api_pages_have_no_name_twice():
    assert [name for name, count in collections.Counter(NAMES).items() if count > 1] == []
