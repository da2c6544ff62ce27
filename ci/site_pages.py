"""Hooks of mkdocs: pages of the site that lie outside ``engine/docs``, and links that work there and on GitHub.

Pages link by relative paths of the repository. A link to a page of the site leads to that page, one to any other file
of the repository to a copy of it: a picture as it is, text as a page under ``source/``, a folder as a list of programs.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "engine/docs"
# Pages that stay in their folder, where GitHub shows them, and their names in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "engine/README.md": "user-guide.md",
    "kernels/README.md": "kernels.md",
    "bench/README.md": "benchmarks.md",
    "engine/tutorial/README.md": "tutorial.md",
}
PICTURES = {".png", ".svg", ".jpg"}
FENCED = re.compile(r"^(```+)[^\n]*\n.*?^\1[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s]+(?=\))|(?<=src=\")(?!\w+:)[^\"]+(?=\")")
INLINE_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
# A name, path or option of this length fits into a line of a telephone.
NAME = re.compile(r"(?<!\S)[^\s<]*[-_./][^\s<]*(?!\S)")
LONGEST_NAME = 26


def site_path(path: str) -> str:
    """Return the name in the site of a file of the repository, relative to its root."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if Path(path).suffix in PICTURES else f"source/{path}.md"


def repository_path(page: str) -> str:
    """Return the file of the repository from which a page of the site comes."""
    return next((path for path, name in ELSEWHERE.items() if name == page), f"{DOCS}/{page}")


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Return a page with its text changed, and its code blocks as they are."""
    end, parts = 0, []
    for block in FENCED.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def follow(page: str, link: str) -> str:
    """Return the link of a page of the site to a file; one without a file stays, for mkdocs to report."""
    path, mark, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), path))
    if not (ROOT / target).exists():
        return link
    return posixpath.relpath(site_path(target), posixpath.dirname(page)) + mark + anchor


def programs_of(folder: str) -> list[str]:
    """Return the programs in a folder; of a file, none."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py"))


def linked(path: str) -> Iterator[str]:
    """Yield the files and folders of the repository to which a page links."""
    texts: list[str] = []
    outside_fences((ROOT / path).read_text(encoding="utf-8"), lambda text: texts.append(text) or text)
    for link in LINK.findall("\n".join(texts)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link.partition("#")[0]))
        if (ROOT / target).exists():
            yield target
            yield from programs_of(target)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and copies of the files to which pages link."""
    for path, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    pages = [repository_path(file.src_uri) for file in files.documentation_pages()]
    for path in sorted({target for page in pages for target in linked(page)}):
        name = site_path(path)
        if name.startswith("source/"):
            files.append(copy_of(path, name, config))
    return files


def copy_of(path: str, name: str, config: MkDocsConfig) -> File:
    """Return a picture as it is, or a page that shows a text or lists the programs of a folder."""
    if Path(path).suffix in PICTURES:
        return File.generated(config, name, abs_src_path=str(ROOT / path))
    if (ROOT / path).is_dir():
        links = [f"- [{Path(program).name}]({Path(program).name}.md)" for program in programs_of(path)]
        return File.generated(config, name, content="\n".join([f"# {path}\n", *links]))
    text = (ROOT / path).read_text(encoding="utf-8")
    return File.generated(config, name, content=f"# {path}\n\n````{Path(path).suffix[1:]}\n{text}````\n")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to the site's pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    if page.parent is None:
        # A page without neighbours needs no list of them.
        page.meta["hide"] = ["navigation"]
    return outside_fences(markdown, lambda text: LINK.sub(lambda link: follow(page.file.src_uri, link[0]), text))


def on_page_content(html: str, **_: Any) -> str:
    """Keep names in the text, such as those of options, on one line: browsers break lines after hyphens."""

    def kept(name: re.Match[str]) -> str:
        return f'<span class="name">{name[0]}</span>' if len(name[0]) <= LONGEST_NAME else name[0]

    return INLINE_CODE.sub(lambda code: NAME.sub(kept, code[0]), html)
