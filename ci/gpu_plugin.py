"""A plugin of pytest for ``ci/gpu``: results are written test by test, and a lost CUDA context ends the process.

``GPU_RESULTS`` names the file of JSON lines. A test has a line when it starts and one with its outcome, so that a
process that died shows which test ended it. After some errors every later CUDA call of a process fails: the first
such test is the culprit, and the others run again in another process.
"""

from __future__ import annotations

import json
import os
import re
import time

import pytest

# Errors after which a CUDA context is of no use: the runtime's documentation, cudaError.
STICKY = re.compile(
    r"illegal memory access|device-side assert|misaligned address|launch failure|illegal instruction|"
    r"ILLEGAL_ADDRESS|LAUNCH_FAILED|ASSERT\b|MISALIGNED_ADDRESS|hardware stack error|uncorrectable"
)


def note(**line):
    with open(os.environ["GPU_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid):
    note(test=nodeid, outcome="started", at=time.time())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None:
        if STICKY.search(f"{call.excinfo.typename}: {call.excinfo.value}"):
            item.session.shouldstop = "the CUDA context of this process is lost"
        if call.excinfo.typename == "MissingLibraryError":
            # A card's machine may lack numba, which the comparison with NumPy's backend needs.
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {call.excinfo.value}")
    return report


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        message = "" if report.passed else str(report.longrepr)[-2000:]
        note(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), message=message)
