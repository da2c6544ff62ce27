"""The gallery: draw the pictures of its programs, and add them to its page as a hook of mkdocs.

A program of ``engine/docs/gallery`` is a script that saves one picture of its own name. Its docstring is the text of
the page. ``python ci/site_gallery.py [NAME...]`` runs the programs, in ci/test's environment, and writes each picture
beside its program, as a small PNG of 128 colours that names the code it was made of (``fingerprint``): a test finds a
picture that is older than its program.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import runpy
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FOLDER = Path(__file__).resolve().parents[1] / "engine/docs/gallery"
STYLE = FOLDER / "gallery.mplstyle"
# The order of the page.
NAMES = ("photograph", "distance", "boundaries", "curves", "sweep", "quantiles", "dependence", "attack", "certified")


def parts(name: str) -> tuple[str, str, str]:
    """Return the title, the text and the code of a program."""
    program = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.parse(program).body[0]
    title, _, text = (ast.get_docstring(ast.parse(program)) or "").partition("\n\n")
    return title.rstrip("."), text, "\n".join(program.splitlines()[docstring.end_lineno :]).strip()


def fingerprint(name: str) -> str:
    """Return a hash of the code and the style that make a picture."""
    return hashlib.sha256((parts(name)[2] + STYLE.read_text(encoding="utf-8")).encode()).hexdigest()


def draw(name: str, folder: Path) -> dict[str, Any]:
    """Run a program in a folder, compress its picture there, and return the names that the program leaves."""
    import matplotlib.pyplot as plt
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    plt.switch_backend("agg")
    # a program may take arguments
    with plt.style.context(STYLE), contextlib.chdir(folder), mock.patch.object(sys, "argv", [name]):
        names = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        plt.close("all")
    picture, about = folder / f"{name}.png", PngInfo()
    about.add_text("Description", fingerprint(name))
    Image.open(picture).quantize(128).save(picture, optimize=True, pnginfo=about)
    return names


def section(name: str) -> str:
    """Return a program as a section of the page: title, text, picture and code."""
    title, text, code = parts(name)
    fenced = textwrap.indent(f"```python\n{code}\n```\n", "    ")
    return f'## {title}\n\n{text}\n\n![{title}]({name}.png)\n\n??? example "{name}.py"\n{fenced}'


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Add the programs to the page of the gallery."""
    if page.file.src_uri != "gallery/index.md":
        return markdown
    return "\n".join([markdown, *map(section, NAMES)])


if __name__ == "__main__":
    for picture in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            draw(picture, Path(folder))
            (FOLDER / f"{picture}.png").write_bytes((Path(folder) / f"{picture}.png").read_bytes())
        print(FOLDER / f"{picture}.png")
