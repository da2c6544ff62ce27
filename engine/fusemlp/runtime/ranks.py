"""The processes that train one model together, the ranks, and their collectives, by ``torch.distributed``."""

from __future__ import annotations

import atexit
import datetime
import hashlib
import json
import logging
import math
import os
import platform
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, DistributedError, MissingLibraryError

_log = logging.getLogger("fusemlp")

# The variables of the environment that torchrun sets, and how a process trains without the others where they are left.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = f"to run in one process, unset {' '.join(VARIABLES)}, or write env -u WORLD_SIZE before the command"
# Seconds that a collective waits for the others unless told otherwise: the first step compiles its loop.
TIMEOUT = 120.0
# Libraries whose versions the bits of a step depend on.
LIBRARIES = ("fusemlp", "numpy", "numba", "torch")
# A process that waits longer than this for the others says so, in seconds: torchrun starts them together.
SILENT_SECONDS = 1.0
# After an error a rank waits for the reports of the others: seconds after the last report, and in all.
QUIET_SECONDS, REPORT_SECONDS = 2.0, 10.0
STORE_SILENT = "rank 0, which keeps the ranks' common store, ended or does not answer; see what it said itself"


@cache
def versions() -> dict[str, str]:
    """Return the versions that the bits of a step depend on, by what they are of."""
    found = {f"the version of {name}": version(name) for name in LIBRARIES}
    return {**found, "the version of Python": platform.python_version()}


def started() -> bool:
    """Return whether torchrun has started this process."""
    return all(name in os.environ for name in VARIABLES)


def leading() -> bool:
    """Return whether this process prints and writes files: unless it is another rank than 0."""
    return not started() or os.environ["RANK"] == "0"


def _place() -> tuple[int, int]:
    """Return the number of this process, and of how many; ArgumentError for numbers that torchrun does not set."""
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ArgumentError(
            f"distributed: expected RANK from 0 to WORLD_SIZE - 1 in the environment, got RANK={rank!r} and "
            f"WORLD_SIZE={world!r}; start the processes by torchrun; {ALONE}"
        )
    return int(rank), int(world)


def report_failure(message: str) -> None:
    """Let the summary with which torchrun ends show why this process fails."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def _torch() -> Any:
    try:
        return import_module("torch"), import_module("torch.distributed")
    except ImportError as error:
        raise MissingLibraryError(
            f"distributed: it needs torch, which cannot be imported ({error}); install it with pip install torch"
        ) from error


def _leave(dist: Any) -> None:
    """End the threads of all groups: each ends with the last reference to its group."""
    for ranks in _all:
        # NCCL ends only after all graphs that have its collectives: init.cc, commDestroySync
        for program in ranks.programs:
            program.drop_graphs()
        if ranks._failed and ranks._cards is not None:
            # else NCCL waits for collectives in which a rank is missing, and torchrun for this process
            ranks._cards.abort()
        ranks._group = ranks._cards = ranks._store = None
    if dist.is_initialized():
        dist.destroy_process_group()


# those of this process by their time limit
_known: dict[float, Ranks] = {}
_all: weakref.WeakSet[Ranks] = weakref.WeakSet()


def joined(timeout: float) -> Ranks:
    """Return the ranks of this process: engines with one time limit have them in common. Raises what ``Ranks`` does."""
    if timeout not in _known or not _known[timeout].current:
        _known[timeout] = Ranks(timeout)
    return _known[timeout]


def own_card() -> str | None:
    """Return the card of this process, that of its number on its machine; None where torchrun has not started it."""
    number = os.environ.get("LOCAL_RANK") if started() else None
    return None if number is None else f"cuda:{number}"


def check_nccl() -> None:
    """Raise MissingLibraryError without NCCL."""
    if not _torch()[1].is_nccl_available():
        raise MissingLibraryError(
            "distributed: several processes add what they have on cards by NCCL, and this build of torch has none; "
            "install one for the driver (pytorch.org, on Linux), or give backend='numpy'"
        )


class Single:
    """This process alone: a rank without others to ask."""

    rank, world, leads = 0, 1, True
    # whether several processes train, as Ranks does also of one
    together = False
    # signals by which its starter ends it, beside Ctrl-C
    signals: tuple[signal.Signals, ...] = ()

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on a rank."""
        return [*flags]

    def of_first(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values that rank 0 has, by name, by which all ranks decide."""
        return dict(zip(values, map(float, values.values()), strict=True))

    def check_same(self, things: Mapping[str, Any]) -> None:
        """Raise DistributedError on every rank, naming the thing, unless arrays, or others' texts, are alike."""

    def marks(self, parameters: Any) -> list[Any]:
        """Return arrays for ``check_equal``, where the parameters lie."""
        return []

    def check_equal(self, mark: Sequence[Array]) -> None:
        """Raise DistributedError on every rank if one has computed other parameters than rank 0; see ``marks``."""

    def uncaptured(self) -> str | None:
        """Return why collectives on cards cannot be part of a graph; None if they can."""
        return None


class Ranks(Single):
    """This process, number ``rank`` of ``world``, and its collectives; each raises DistributedError after ``timeout``
    seconds, or when a process is gone.

    Raises ArgumentError if torchrun has not started this process, MissingLibraryError without torch.
    """

    together = True
    # of torchrun
    signals = (signal.SIGTERM,)

    def __init__(self, timeout: float = TIMEOUT) -> None:
        if not started():
            missing = ", ".join(name for name in VARIABLES if name not in os.environ)
            raise ArgumentError(
                f"distributed: torchrun has not started this process (no {missing} in the environment); start it with "
                "torchrun --nproc-per-node 2 SCRIPT, or leave distributed out"
            )
        self._torch, self._dist = _torch()
        dist = self._dist
        # the newer name first
        self._all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        if not dist.is_available() or not dist.is_gloo_available():
            raise MissingLibraryError(
                "distributed: this build of torch has no gloo; install another, pip install torch"
            )
        self.timeout = timeout
        limit = datetime.timedelta(seconds=timeout)
        # of arrays on the host, and of those on cards
        self._group: Any = None
        self._cards: Any = None
        self._failed = False
        _all.add(self)
        # programs that may have collectives in graphs
        self.programs: weakref.WeakSet[Any] = weakref.WeakSet()
        # collectives that have begun: all ranks count alike
        self._begun = 0
        self.rank, self.world = _place()
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        text = (
            f"distributed: rank {self.rank} waits up to {timeout:g} s for {self.world} ranks at {address}, because "
            f"WORLD_SIZE is {self.world}; {ALONE}"
        )
        notice = threading.Timer(SILENT_SECONDS, _log.warning, (text,))
        notice.daemon = True
        notice.start()
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=limit)
                # at the end of Python its threads now and then abort the process, whose exit code is lost
                atexit.register(_leave, dist)
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.leads = self.rank == 0
            # of its own: another engine may have another limit
            self._group = dist.new_group(backend="gloo", timeout=limit)
            self._store, self._everyone = dist.distributed_c10d._get_default_store(), dist.group.WORLD
        except (RuntimeError, ValueError) as error:
            mend = (
                "the port is in use; give another one, torchrun --master-port, or --standalone on one machine"
                if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
                else f"see that all of them are started, and that they reach this address; {ALONE}"
            )
            raise DistributedError(
                f"distributed: the {self.world} ranks did not meet at {address} within {timeout:g} s; {mend} ({error})"
            ) from error
        finally:
            notice.cancel()

    @property
    def current(self) -> bool:
        """True while torch knows the same processes."""
        return self._dist.group.WORLD is self._everyone

    def take_card(self, device: str) -> None:
        """Get ready for arrays on this card. All ranks must call this; raises ArgumentError if two have one card."""
        if self._cards is not None:
            return
        properties = self._torch.cuda.get_device_properties(device)
        # the same card may have several numbers
        taken = self.texts(f"card {getattr(properties, 'uuid', device)} of {platform.node()}")
        for rank, card in enumerate(taken):
            if taken.index(card) != rank:
                raise ArgumentError(
                    f"device: ranks {taken.index(card)} and {rank} have one card, {card}; leave device out, and each "
                    "takes the card of its number, and start no more processes than there are cards"
                )
        limit = datetime.timedelta(seconds=self.timeout)
        try:
            self._cards = self._dist.new_group(backend="nccl", timeout=limit)
        except RuntimeError as error:
            raise DistributedError(f"distributed: NCCL does not start on {device} ({error})") from error

    def uncaptured(self) -> str | None:
        # NCCL 2.9.6 is the first that can; torch brings a later one
        return "RCCL's collectives are started one by one" if self._torch.version.hip else None

    def _tensor(self, array: Any) -> Any:
        return self._torch.from_numpy(array) if isinstance(array, np.ndarray) else array

    def _group_of(self, array: Any) -> Any:
        return self._group if self._tensor(array).is_cpu else self._cards

    def _collective(self, run: Callable[[], object]) -> None:
        self._begun += 1
        try:
            run()
        except RuntimeError as error:
            self._failed = True
            # later engines make a group of their own
            _known.pop(self.timeout, None)
            words = [STORE_SILENT]
            # torch waits without limit for a store whose process is stopped
            asking = threading.Thread(target=lambda: words.append(self._absent()), daemon=True)
            asking.start()
            asking.join(REPORT_SECONDS + QUIET_SECONDS)
            raise DistributedError(f"distributed: {words[-1]} ({str(error).splitlines()[0]})") from error

    def _absent(self) -> str:
        """Return a sentence that names the ranks which do not report that a collective has failed."""
        keys = {rank: f"fusemlp/failed/{self._begun}/{rank}" for rank in range(self.world)}
        missing = [rank for rank in keys if rank != self.rank]
        try:
            self._store.set(keys[self.rank], "1")
            begun = last = time.monotonic()
            while missing and time.monotonic() < min(last + QUIET_SECONDS, begun + REPORT_SECONDS):
                time.sleep(0.05)
                silent = [rank for rank in missing if not self._store.check([keys[rank]])]
                if silent != missing:
                    missing, last = silent, time.monotonic()
        except RuntimeError:
            return STORE_SILENT
        if not missing:
            return f"a collective failed on all {self.world} ranks; see their own messages"
        names = f"rank{'' if len(missing) == 1 else 's'} {', '.join(map(str, missing))}"
        return f"{names} of {self.world} ended or did not answer within {self.timeout:g} s; see what it said itself"

    def all_gather(self, into: Array, own: Array) -> None:
        """Write the arrays ``own`` (n,) of all ranks into the contiguous ``into`` (world, n), by rank."""
        group, flat = self._group_of(own), self._tensor(into.reshape(-1))
        self._collective(lambda: self._all_gather(flat, self._tensor(own), group=group))

    def swap(self, rows: Sequence[Array], counts: Sequence[int]) -> Array:
        """Send ``rows[r]`` to rank r; return what each rank has sent to this one, one after another, of rank r
        ``counts[r]`` rows of one shape."""
        sent = np.concatenate(rows)
        found = np.empty((sum(counts), *sent.shape[1:]), sent.dtype)
        size = math.prod(sent.shape[1:]) * sent.itemsize
        into, own = (self._tensor(array.reshape(-1).view(np.uint8)) for array in (found, sent))
        sizes = [size * count for count in counts], [size * len(one) for one in rows]
        self._collective(lambda: self._dist.all_to_all_single(into, own, *sizes, group=self._group))
        return found

    def add(self, *arrays: Array) -> None:
        """Replace each array by its sum over the ranks, in any order."""

        def run() -> None:
            add, group = self._dist.ReduceOp.SUM, self._group_of(arrays[0])
            tensors = [self._tensor(array) for array in arrays]
            for work in [self._dist.all_reduce(one, op=add, group=group, async_op=True) for one in tensors]:
                work.wait()

        self._collective(run)

    def any(self, *flags: bool) -> list[bool]:
        counts = np.array(flags, np.int64)
        self.add(counts)
        return [bool(count) for count in counts]

    def of_first(self, values: Mapping[str, float]) -> dict[str, float]:
        numbers = np.array([*values.values()], np.float64)
        self._collective(lambda: self._dist.broadcast(self._tensor(numbers), src=0, group=self._group))
        return dict(zip(values, numbers.tolist(), strict=True))

    def texts(self, text: str) -> list[str]:
        """Return the texts of all ranks."""
        # torch's own gathering of objects would unpickle them
        data = np.frombuffer(text.encode(), np.uint8)
        sizes = np.zeros((self.world, 1), np.int64)
        self.all_gather(sizes, np.array([len(data)]))
        own, found = np.zeros(sizes.max(), np.uint8), np.zeros((self.world, sizes.max()), np.uint8)
        own[: len(data)] = data
        self.all_gather(found, own)
        return [bytes(row[:size]).decode() for row, (size,) in zip(found, sizes, strict=True)]

    def check_same(self, things: Mapping[str, Any]) -> None:
        marks = {name: _mark(thing) for name, thing in things.items()}
        first, *_ = all_marks = [json.loads(text) for text in self.texts(json.dumps(marks))]
        for rank, found in enumerate(all_marks):
            for name in {**first, **found}:
                if found.get(name) != first.get(name):
                    raise DistributedError(
                        f"distributed: {name} differs: rank 0 has {first.get(name)}, rank {rank} has {found.get(name)}"
                        "; give all ranks the same"
                    )

    def marks(self, parameters: Any) -> list[Any]:
        """Return whole numbers that other parameters do not have: the bytes of a digest, or on a device the sums of
        their bits as integers, of all and of every other."""
        if isinstance(parameters, np.ndarray):
            return [np.frombuffer(hashlib.sha256(parameters.data).digest(), np.uint8)]
        bits = parameters.view(import_module("torch").int32)
        # exact in float64
        return [some.sum() & ((1 << 52) - 1) for some in (bits, bits[::2])]

    def check_equal(self, mark: Sequence[Array]) -> None:
        own = np.concatenate(mark)
        found = np.empty((self.world, len(own)))
        self.all_gather(found, own)
        others = [str(rank) for rank, one in enumerate(found) if not np.array_equal(one, found[0])]
        if others:
            raise DistributedError(
                f"distributed: the parameters of rank {', '.join(others)} are no longer those of rank 0: a callback "
                "has changed something on some ranks only, or their processors compute differently; let callbacks do "
                "the same on all, and use processors of one kind"
            )


def _mark(thing: Any) -> str:
    """Return a short text that two different things do not share."""
    if isinstance(thing, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(thing).view(np.uint8).data).hexdigest()
        return f"{thing.dtype} {thing.shape} of digest {digest[:16]}"
    text = str(thing)
    return text if len(text) <= 200 else f"{text[:100]}... of digest {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def tree_sum(arrays: Sequence[Array] | Array) -> Array:
    """Add arrays in pairs, pairs of pairs and so on; they are written to, the first is the sum."""
    arrays, step = [arrays[place] for place in range(len(arrays))], 1
    while step < len(arrays):
        for at in range(0, len(arrays) - step, 2 * step):
            arrays[at] += arrays[at + step]
        step *= 2
    return arrays[0]
