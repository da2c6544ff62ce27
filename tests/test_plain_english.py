"""Hold a short list of hard idioms out of comments, docstrings, messages and Markdown pages."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each idiom, and its replacement.
IDIOMS = {
    r"so many": "N, or this many",
    r"one behind the other": "contiguous, or one after another",
    r"nobody|somebody|anybody|whoever|whomever": "the caller, the kernel, the user",
    r"quicker|quickest": "faster, fastest",
    r"nor": "a second sentence",
    r"whose steps": "the engine that ...",
    r"told the place of": "bound to",
    r"no accident of": "not caused by",
    r"(?:has|have|had|having) to do with": "concerns, uses",
    r"has nothing to (?:say|do)|have no say": "does not affect",
    r"of which one": "one of them",
    r"all that there (?:is|are)": "all, everything",
}
PATTERNS = {re.compile(rf"\b(?:{idiom})\b", re.IGNORECASE): instead for idiom, instead in IDIOMS.items()}
NEITHER = re.compile(r"\bneither\b[^.;]*?\bnor\b", re.IGNORECASE)
# A docstring says what it returns or does; a comment gives a reason. A relative clause in front hides both.
OPENING = re.compile(r"(?:^(?:How|That)|(?:^|(?<=\. ))(?:What|Where|Who|Whose|Whether|Which))\b(?![^.]*\?)")
C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*(?:\n[ \t]*//[^\n]*)*", re.DOTALL)
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h", ".md", ".sh"}
# This file quotes the idioms.
SKIPPED = {"tests/test_plain_english.py"}


def passages(path, text):
    """Yield line number, passage and whether its first word counts, for the prose in a file."""
    if path.endswith(".py"):
        yield from of_python(text)
    elif path.endswith(".md"):
        fenced = False
        for number, line in enumerate(text.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                yield number, re.sub(r"`[^`]*`", "", line), False
    elif path.endswith((".cu", ".cuh", ".cpp", ".h")):
        for found in C_COMMENT.finditer(text):
            words = re.sub(r"\s*\n\s*(?://|\*)?\s*|\s+", " ", found[0].strip("/* \n"))
            yield text.count("\n", 0, found.start()) + 1, words, True
    else:
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line.strip("# "), line.lstrip().startswith("#")


def of_python(text):
    """Yield the comment blocks and strings of a Python file; the first words of comments and docstrings count."""
    block = []
    start, last, before = 0, 0, tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        number = token.start[0]
        if token.type == tokenize.COMMENT:
            if block and (number > last + 1 or token.line.lstrip()[:1] != "#"):
                yield start, " ".join(block), True
                block = []
            start, last = start if block else number, number
            block.append(token.string.strip("# "))
        elif token.type in STRINGS:
            docstring = token.string.startswith('"""') and before in (tokenize.NEWLINE, tokenize.INDENT)
            words = re.sub(r"{[^{}]*}", "", re.sub(r"^[rRfFbBuU]*", "", token.string)).strip("\"' \n")
            yield number, " ".join(words.split()), docstring
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.DEDENT):
            before = token.type
    if block:
        yield start, " ".join(block), True


def problems(path, text):
    """Return file, line and replacement of each idiom in a file."""
    found = []
    for number, words, opens in sorted(passages(path, text)):
        plain = NEITHER.sub("", words)
        hits = [f"{hit[0]} -> {instead}" for pattern, instead in PATTERNS.items() for hit in pattern.finditer(plain)]
        if opens:
            hits += [f"a sentence begins with {hit[0]}" for hit in OPENING.finditer(words)]
        found += [f"{path}:{number}: {hit}" for hit in hits]
    return found


def checked_files():
    """Return the tracked files with prose, and the scripts of ci."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    scripts = [path for path in listed if path.startswith("ci/") and not Path(path).suffix]
    return [path for path in listed if Path(path).suffix in SUFFIXES and path not in SKIPPED] + scripts


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists the files, and this is no checkout")
def test_comments_docstrings_messages_and_pages_are_plain_english():
    files = [path for path in checked_files() if (ROOT / path).exists()]
    found = [line for path in files for line in problems(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text", "lines"),
    [
        ("a.py", '"""What a thing is."""\n# so\n# many rows\nraise ValueError(f"nor {nobody}")\n', [1, 2, 4]),
        ("a.py", "# Fine. Where it ends, it\n# stops.\n\n\ndef f():\n    'Whoever.'\n", [1, 6]),
        ("a.py", '"""Return 1."""\nnobody = "What is it?"  # Which one is it?\n', []),
        ("a.cu", "int nobody; // so\n// many\n", [1]),
        ("a.md", "`nobody`\n\n```\nnor\n```\nneither a nor b, quicker\n", [6]),
        ("ci/test", "# Where it runs\nnobody\n", [1, 2]),
    ],
)
def test_idioms_are_found_in_prose_and_nowhere_else(path, text, lines):
    assert [int(problem.split(":")[1]) for problem in problems(path, text)] == lines
