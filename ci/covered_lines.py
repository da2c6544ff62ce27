"""Print the share of each folder's lines that the tests of ``ci/coverage`` ran."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    report = ROOT / "build/coverage.json"
    subprocess.run([sys.executable, "-m", "coverage", "json", "--quiet", "-o", report], cwd=ROOT, check=True)
    every, ran = Counter[str](), Counter[str]()
    for file, about in json.loads(report.read_text(encoding="utf-8"))["files"].items():
        parts = Path(file).parts
        for folder in ("/".join(parts[: 3 if len(parts) > 3 else 2]), "all"):
            every[folder] += about["summary"]["num_statements"]
            ran[folder] += about["summary"]["covered_lines"]
    print("| folder | statements | run by tests |\n|---|---:|---:|")
    for folder in sorted(every, key=lambda name: (name == "all", name)):
        print(f"| {folder} | {every[folder]:,} | {ran[folder] / every[folder]:.1%} |")


if __name__ == "__main__":
    main()
