"""Trainings of one rank on batches that come one by one; rank 0 writes the parameters of each as an .npz file."""

import os
import tracemalloc
from itertools import pairwise
from unittest import mock

import numpy as np
from cases import message

from fusemlp import MLP, SGD, Adam, Blocks, Callback, CrossEntropy, Engine, load_checkpoint
from fusemlp.inputs import blocks

ROWS, SIZE = 101, 16
NET = MLP([7, 12, 4], dropout=0.2)
TRAINED = {"optimizer": Adam(lr=0.01), "batch_size": SIZE}
WEIGHTED = {"optimizer": SGD(0.05, momentum=0.9), "loss": CrossEntropy(class_weight=[1.0, 2.0, 0.5, 1.0])}


def engine(**options):
    net = options.pop("net", NET)
    return Engine(net, **{"backend": "numpy", "seed": 5, "precision": "fp64", "normalise": False, **TRAINED, **options})


def rows():
    generator = np.random.default_rng(7)
    return generator.normal(size=(ROWS, 7)), generator.integers(0, 4, ROWS), generator.uniform(0.5, 2.0, ROWS)


def write(folder):
    """Write the rows as files of each kind."""
    import pyarrow
    from pyarrow import parquet

    for name, array in zip("Xyw", rows(), strict=True):
        np.save(folder / f"{name}.npy", array)
    X, y, w = rows()
    columns = {**{f"x{place}": X[:, place] for place in range(7)}, "y": y, "w": w}
    parquet.write_table(pyarrow.table(columns), folder / "all.parquet", row_group_size=9)


def of_arrays(folder, **options):
    paths = [folder / f"{name}.npy" for name in "Xyw"]
    return Blocks(*paths, **{"batch_size": SIZE, "block_rows": 8, "window": 3, "seed": 2, **options})


def of_tables(folder, **options):
    return Blocks(
        folder / "all.parquet", target="y", weight="w", **{"batch_size": SIZE, "window": 4, "seed": 2, **options}
    )


def unequal(folder):
    """Batches of several sizes, the largest of which is not the first."""
    del folder
    ends = [0, 10, 41, 42, 60, ROWS]
    return [tuple(array[start:stop] for array in rows()) for start, stop in pairwise(ends)]


def unlike(rank):
    """Batches the second of which has another label on rank 1."""
    X, y, _ = rows()
    return [(X[:10], y[:10]), (X[10:20], np.where(np.arange(10) == 3 * rank, 0, y[10:20]))]


def generated(folder):
    def batches():
        while True:
            yield from unequal(folder)

    return batches()


class Counted:
    """Counts the blocks that are read, while it is entered."""

    def __init__(self):
        self.read = []

    def __enter__(self):
        self._patches = []
        for kind in (blocks.ArrayBlocks, blocks.RowGroups):
            self._patches.append(mock.patch.object(kind, "read", self._counting(kind.read)))
            self._patches[-1].start()
        return self

    def _counting(self, read):
        def counted(source, block, into):
            self.read.append(block)
            read(source, block, into)

        return counted

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


class Saves(Callback):
    """Saves a checkpoint after the batch number ``batch`` of the second epoch, and ends the training there."""

    def __init__(self, path):
        self.path = path

    def on_batch_end(self, engine, batch):
        if engine.epochs_trained == 1 and batch == 3:
            engine.save_checkpoint(self.path)
            engine.stop_training = True


SOURCES = {
    "arrays": of_arrays,
    "tables": of_tables,
    "short batches left out": lambda folder: of_arrays(folder, drop_last=True),
    "in order": lambda folder: of_arrays(folder, shuffle=False),
    "one batch": lambda folder: of_arrays(folder, batch_size=200),
    "a list": unequal,
}
ENGINES = {"": {}, ", weighted": WEIGHTED}


def trained(batches, **options):
    made = engine(**options)
    history = made.fit(batches, epochs=3, steps_per_epoch=None if hasattr(batches, "__len__") else 5)
    return {"params": made.memory.params, **{f"history {name}": values for name, values in history.history.items()}}


def cut_short(files, **options):
    """Train twice; the second fit begins with the last batch of a pass, which is short."""
    made = engine(**options)
    for _ in range(2):
        made.fit(of_arrays(files), epochs=1, steps_per_epoch=6)
    return {"params": made.memory.params}


def mapped(path):
    """Train on a memory-mapped array, within half of its bytes, to the bits of training on a copy."""
    array = np.load(path, mmap_mode="r")
    y, start = np.arange(len(array)) % 3, 100
    # It never stops: in Python 3.11 that crashes beside threads that free arrays (gh-128679), as gloo's do.
    tracemalloc.start()

    def fitted(X):
        made = engine(net=MLP([X.shape[1], 8, 3]), precision="fp32", batch_size=96, distributed=True)
        made.fit(X[:start], y[:start], epochs=1)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        made.fit(X, y, epochs=2, row_order=Blocks(X, y, block_rows=500, window=2).order)
        return made.state_dict(), tracemalloc.get_traced_memory()[1] - before

    (parameters, peak), (expected, _) = fitted(array), fitted(np.array(array))
    for name, whole in expected.items():
        np.testing.assert_array_equal(parameters[name], whole)
    assert peak < array.nbytes / 2, peak


def main(files, folder):
    """Train on all sources, count what is read, and go on from a checkpoint."""
    rank = int(os.environ["RANK"])
    found, read = {}, {}
    for name, made in SOURCES.items():
        for ending, options in ENGINES.items():
            with Counted() as counted:
                found[f"{name}{ending}"] = trained(made(files), distributed=True, **options)
            read[f"{name}{ending}"] = counted.read
    found["a short batch first"] = cut_short(files, distributed=True)
    found["a generator"] = trained(generated(files), distributed=True)
    path = folder / "half.safetensors"
    engine(distributed=True).fit(of_arrays(files), epochs=3, callbacks=[Saves(path)])
    again = load_checkpoint(path, backend="numpy", distributed=True)
    again.fit(of_arrays(files), epochs=3, resume=True)
    found["resumed"] = {"params": again.memory.params}
    other = engine(distributed=True)
    said = {
        "seed": message(lambda: other.fit(of_arrays(files, seed=rank), epochs=1)),
        "shuffle": message(lambda: other.fit(of_arrays(files, shuffle=rank == 0), epochs=1)),
        "batches": message(lambda: other.fit([(rows()[0] + rank, rows()[1])], epochs=1)),
        "targets": message(lambda: other.fit(unlike(rank), epochs=1)),
        "steps": message(lambda: other.fit(generated(files), steps_per_epoch=2 + rank, epochs=1)),
    } if int(os.environ["WORLD_SIZE"]) > 1 else {}  # fmt: skip
    print({"read": read, "said": said})
    if rank == 0:
        for name, arrays in found.items():
            np.savez(folder / f"{name}.npz", **arrays)
