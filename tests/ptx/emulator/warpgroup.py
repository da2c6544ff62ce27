"""wgmma: products whose factors lie in shared memory, and that are done when their warp waits for them.

A card may do them at any time between, so this is the latest it may read the factors and write the sums. A kernel that
overwrites a factor too early, or reads a sum too early, gets a wrong result here.

A descriptor names a matrix in shared memory ("Matrix Descriptor Format"): its start, two strides, and the swizzle. The
rows of a swizzled matrix have 32, 64 or 128 bytes; eight of them lie one after another, and the 16-byte units of each
change places by the number of the row, which is a part of the address. Each warp computes its 16 rows of the 64.

``wgmma.fence`` must stand between a write of a register by another instruction and the product that adds to it or takes
a from it; products of one shape may add to the same registers without. Registers of a may not change until the wait.
"""

from collections import namedtuple

import numpy as np

from .faults import Problem
from .matrix import GROUP, MEMBER, gathered, product, values_of
from .parse import Register, Vector
from .threads import WARP, Active, reader

# The bytes of a row, by the descriptor's two bits for the swizzle.
SPANS = np.array([16, 128, 64, 32])


def addresses_of(descriptors, across, along, transposed, size):
    """Return the addresses of elements of ``size`` bytes: ``across`` counts along M or N, ``along`` along K.

    ``transposed``: M or N is the direction of neighbouring addresses, else K. ``descriptors`` broadcast with both.
    """
    encoded = descriptors.astype(np.int64)
    start, lead, stride = ((encoded >> place & 0x3FFF) << 4 for place in (0, 16, 32))
    span = SPANS[(descriptors >> np.uint64(62)).astype(np.int64)]
    if transposed and (span == 16).any():
        raise NotImplementedError("transposed matrices without a swizzle")
    near, far = (across, along) if transposed else (along, across)
    near = near * size
    offset = near // span * lead + near % span + far // 8 * stride + far % 8 * span
    address = start + offset
    return address ^ (address >> 7 & span // 16 - 1) << 4


class Product(namedtuple("Product", "warps group target kind parts a b transposed keeps")):
    """``target`` += a @ b, of ``warps``; a (warps, n) has descriptors or, of each thread, the registers ``parts``.

    ``keeps`` tells whether the sums go on from those in ``target``. ``group`` is the number of each warp's group of
    products.
    """

    def of(self, some):
        names = ("warps", "group", "a", "b", "keeps")
        return self._replace(**{name: getattr(self, name)[some] for name in names})


def step_of(instruction, products):
    """Return a wgmma instruction as a function of the active threads."""
    name = instruction.modifiers[1]
    if name == "mma_async":
        return _multiply(instruction, products)
    if name == "commit_group":
        return _commit
    if name == "wait_group":
        count = int(str(instruction.operands[0]))
        return lambda active: _wait(active, count)
    return _fence


def registers_of(module):
    """Return the places of the registers that products read or write, and the row of each in ``threads.touched``."""
    places = {}
    for instruction in module.named("wgmma.mma_async"):
        for operand in instruction.operands[:2]:
            for part in operand.parts if isinstance(operand, Vector) else ():
                places.setdefault(part.place, len(places))
    return places


# The writer of a register since the last wgmma.fence of a warp: none; the products of N columns; or another.
NONE, OTHER = 0, -1


def noted(instruction, run, products):
    """Return an instruction's function, which also notes the registers of ``products`` that it writes."""
    target = instruction.operands[0] if instruction.operands else None
    parts = target.parts if isinstance(target, Vector) else (target,)
    rows = [products[part.place] for part in parts if isinstance(part, Register) and part.place in products]
    if not rows or instruction.modifiers[0] == "wgmma":
        return run

    def noting(active):
        run(active)
        _touch(active, rows, OTHER)

    return noting


def _touch(active, rows, what):
    if active.mask is None:
        active.threads.touched[rows] = what
    else:
        active.threads.touched[np.ix_(rows, active.some_warps)] = what


def _fence(active):
    active.threads.touched[:, active.warps] = NONE


def _check_touched(active, rows, allowed, what):
    touched = active.threads.touched[rows][:, active.warps]
    if (touched != NONE).any() and (touched[touched != NONE] != allowed).any():
        raise Problem(f"wgmma {what} that another instruction has written since the last wgmma.fence")


def _multiply(instruction, products):
    target, a, b, keeps, *signs = instruction.operands
    kind = instruction.modifiers[-1]
    # the signs of a and b, then for 16-bit factors the directions of those in shared memory
    if signs[:2] != [1, 1] or instruction.modifiers[-3] != "f32":
        raise NotImplementedError(instruction.name)
    turns = [bool(turn) for turn in signs[2:]]
    turned = (False, *turns) if len(turns) == 1 else tuple(turns) or (False, False)
    parts = a.parts if isinstance(a, Vector) else ()
    reads = [reader(part, "b32") for part in parts] or [reader(a, "b64")]
    reads += [reader(b, "b64"), reader(keeps, "pred")]
    columns = 2 * len(target.parts)
    sums, factors = ([products[part.place] for part in some] for some in (target.parts, parts))

    def run(active):
        threads, warps = active.threads, active.warps
        *left, right, goes_on = (active.by_warp(read(threads)) for read in reads)
        _check_touched(active, sums, columns, "adds to a register")
        _check_touched(active, factors, NONE, "multiplies a register")
        _touch(active, sums, columns)
        factor = np.stack(left, axis=1) if parts else left[0][:, 0]
        groups = threads.product_groups[warps]
        begun = Product(warps, groups, target.parts, kind, parts, factor, right[:, 0], turned, goes_on[:, 0])
        # what it reads must be there already
        _factors(threads, begun)
        threads.products.append(begun)

    return run


def _commit(active):
    active.threads.product_groups[active.warps] += 1


def _wait(active, count):
    threads = active.threads
    running = np.zeros(len(threads.product_groups), np.bool_)
    running[active.warps] = True
    left = []
    for begun in threads.products:
        done = running[begun.warps] & (begun.group < threads.product_groups[begun.warps] - count)
        if done.any():
            _finish(threads, begun.of(done))
        if not done.all():
            left.append(begun.of(~done))
    threads.products = left


def _factors(threads, of):
    """Return a (warps, 16, K) and b (warps, K, N) in float64, from shared memory as it is now."""
    size = 4 if of.kind == "tf32" else 2
    along, columns = np.arange(32 // size), np.arange(2 * len(of.target))
    rows = 16 * (of.warps % 4)[:, None, None] + np.arange(16)[:, None]
    b = _matrix(threads, of, of.b, columns[:, None], along, of.transposed[1], size)
    if of.parts:
        a = gathered(np.swapaxes(of.a, 0, 1), "a", of.kind)
    else:
        a = _matrix(threads, of, of.a, rows, along, of.transposed[0], size)
    return a, np.swapaxes(b, 1, 2)


def _matrix(threads, of, descriptors, across, along, transposed, size):
    addresses = addresses_of(descriptors[:, None, None], across, along, transposed, size)
    per_block = threads.size // WARP
    owners = (
        np.broadcast_to(one[:, None, None], addresses.shape).ravel()
        for one in (of.warps // per_block, of.warps % per_block)
    )
    bits = threads.shared.read(*owners, addresses.ravel(), size, proxy="wgmma reads")[0]
    return values_of(bits.reshape(addresses.shape), of.kind)


def _finish(threads, of):
    mask = np.zeros((len(threads.product_groups), WARP), np.bool_)
    mask[of.warps] = True
    active = Active(threads, mask.ravel())
    place = np.arange(len(of.target))[:, None]
    rows, columns = GROUP + 8 * (place // 2 % 2), 8 * (place // 4) + 2 * MEMBER + place % 2
    before = np.stack([active.by_warp(reader(part, "f32")(threads)) for part in of.target])
    factor = [active.by_warp(reader(part, "b32")(threads)) for part in of.parts]
    if factor and (np.stack(factor, axis=1) != of.a).any():
        raise Problem("a register that wgmma multiplies has changed before the wait for the product")
    sums = np.zeros((len(of.warps), 16, 2 * len(of.target)), np.float32)
    sums[:, rows, columns] = np.swapaxes(np.where(of.keeps[:, None], before, np.float32(0)), 0, 1)
    after = product(*_factors(threads, of), sums)
    for part, value in zip(of.target, np.swapaxes(after[:, rows, columns], 0, 1), strict=True):
        active.scatter(part, value)
