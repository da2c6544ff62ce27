"""cp.async: copies into shared memory that are done when the thread that began them waits, and no earlier.

A card may do them at any time between. The bytes cannot be read until then, so a kernel that depends on the time is
found; see ``Shared.begin_copy``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Copy:
    """``values`` (threads, words) for ``places``; ``group`` is the number of each thread's group of copies."""

    thread: np.ndarray
    group: np.ndarray
    places: np.ndarray
    values: np.ndarray

    def of(self, some):
        return Copy(self.thread[some], self.group[some], self.places[some], self.values[some])


def begin(active, addresses, values):
    """Begin a copy of each active thread, as part of its next group."""
    threads, index, words = active.threads, active.index, values.shape[1]
    places = threads.shared.begin_copy(*active.owners, addresses, 4 * words)
    threads.copies.append(Copy(index, threads.copy_groups[index], places.reshape(-1, words), values))


def commit(active):
    """End the group of each active thread."""
    active.threads.copy_groups[active.index] += 1


def wait(active, count):
    """Do the copies of the active threads, except those of each one's last ``count`` groups."""
    threads = active.threads
    running = np.zeros(threads.count, np.bool_)
    running[active.index] = True
    left = []
    for copy in threads.copies:
        done = running[copy.thread] & (copy.group < threads.copy_groups[copy.thread] - count)
        if done.any():
            these = copy.of(done)
            warps = np.repeat(threads.warp[these.thread], these.values.shape[1])
            threads.shared.end_copy(these.places.ravel(), warps, these.values.ravel())
        if not done.all():
            left.append(copy.of(~done))
    threads.copies = left
