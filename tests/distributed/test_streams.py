"""Batches that come one by one in several processes: the same bits on any number, and each reads its part."""

import threading
from queue import Queue

import numpy as np
import pytest
import streams
import worlds

from fusemlp.inputs.blocks import Blocks
from fusemlp.program.program import Sharding
from make import assert_same

pytest.importorskip("torch")
pytest.importorskip("pyarrow")
NAMES = [f"{name}{ending}" for name in streams.SOURCES for ending in streams.ENGINES]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    streams.write(folder)
    return worlds.Worlds(folder, (1, 2), streams.main, folder)


@pytest.mark.parametrize("name", [*NAMES, "a short batch first", "a generator", "resumed"])
def test_one_and_two_ranks_give_the_same_bits(found, name):
    assert_same(found.of(2, name), found.of(1, name))


@pytest.mark.parametrize("name", ["arrays", "tables", "a list"])
@pytest.mark.parametrize("ending", ["", ", weighted"])
def test_two_ranks_train_as_one_process_does(found, name, ending):
    alone = streams.trained(streams.SOURCES[name](found.folder), **streams.ENGINES[ending])
    found.assert_close(2, f"{name}{ending}", alone, rtol=1e-9, atol=1e-9)


def test_a_short_batch_that_comes_first_is_split_as_it_is_read(found):
    found.assert_close(2, "a short batch first", streams.cut_short(found.folder), rtol=1e-9, atol=1e-9)


def test_a_resumed_fit_ends_as_one_that_was_not_cut_off(found):
    np.testing.assert_array_equal(found.of(2, "resumed")["params"], found.of(2, "arrays")["params"])


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_reads_its_part_of_the_blocks(found, name):
    (all_blocks,), both = ([read[name] for read in found.said(count, "read")] for count in (1, 2))
    assert sorted(both[0] + both[1]) == sorted(all_blocks)
    # three epochs of several windows, in each of which the first rank may have one block more
    if name.startswith(("arrays", "tables", "in order", "short")):
        windows = 3 * -(-len(set(all_blocks)) // (4 if name.startswith("tables") else 3))
        assert 0 <= len(both[0]) - len(both[1]) <= windows and both[1]


def test_ranks_train_on_a_memory_mapped_array_in_the_order_of_blocks(tmp_path):
    np.save(tmp_path / "X.npy", np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32))
    worlds.run(2, tmp_path, streams.mapped, tmp_path / "X.npy")


SAID = {
    "seed": "distributed: Blocks differs: rank 0 has Blocks(101 rows in 13 blocks, batch_size=16, window=3, seed=0)",
    "shuffle": "distributed: shuffle of blocks differs: rank 0 has True, rank 1 has False; give",
    "batches": "distributed: X differs: rank 0 has ",
    "targets": "distributed: a digest of the targets of an epoch differs: rank 0 has ",
    "steps": "distributed: steps_per_epoch differs: rank 0 has 2, rank 1 has 3; give",
}


@pytest.mark.parametrize("name", SAID)
def test_what_differs_is_named_on_every_rank(found, name):
    first, second = (said[name] for said in found.said(2, "said"))
    assert first == second and first.startswith(SAID[name])


class Thread:
    """A process of ``world``, which is a thread."""

    def __init__(self, rank, queues, world):
        self.rank, self.world, self._queues = rank, world, queues

    def swap(self, rows, counts):
        for other, array in enumerate(rows):
            self._queues[self.rank, other].put(array.copy())
        found = [self._queues[other, self.rank].get(timeout=20) for other in range(self.world)]
        assert [len(array) for array in found] == list(counts)
        return np.concatenate(found)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"shuffle": False}, {"batch_size": 200}, {"window": 1}])
def test_the_rows_of_all_ranks_make_the_batches_of_one_process(world, options):
    X, y, w = streams.rows()
    given = {"batch_size": streams.SIZE, "block_rows": 8, "window": 5, "seed": 4, **options}
    sharding = Sharding("fast" if world == 3 else "ordered", world)
    queues = {(one, other): Queue() for one in range(world) for other in range(world)}
    found = {}

    def owner(places):
        return sharding.owner(places, min(given["batch_size"], len(X)))

    def run(rank):
        blocks = Blocks(X, y, w, **given)
        blocks.seek(2 + len(blocks))
        found[rank] = list(blocks.shared(Thread(rank, queues, world), owner))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks = Blocks(X, y, w, **given)
    blocks.seek(2 + len(blocks))
    expected = list(blocks)
    assert all(len(batches) == len(expected) for batches in found.values()) and len(found) == world
    for at, (x, *others) in enumerate(expected):
        have = owner(np.arange(len(x)))
        for rank, batches in found.items():
            own, *rest = batches[at]
            np.testing.assert_array_equal(own, np.where((have == rank)[:, None], x, 0.0))
            for array, wanted in zip(rest, others, strict=True):
                np.testing.assert_array_equal(array, wanted)
