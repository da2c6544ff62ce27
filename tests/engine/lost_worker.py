"""A training that kills its process: its import is all that a worker of a test needs."""

import os
import signal

from fusemlp.fleet.results import Member


def killed_at_2(numbers, once):
    """Kill the process that trains model 2, with ``once`` only where that file is missing."""
    if 2 in numbers and (once is None or not once.exists()):
        if once is not None:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [Member(number, {}, None, None, "trained", "", {}) for number in numbers]
