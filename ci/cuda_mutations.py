"""Bugs that a working engineer could plant in the CUDA C of the CuPy backend, and the tests that must see each of them.

``ci/mutate_kernels.py`` plants them as it does those of ``mutations.py``; the tests run on the kernels compiled as C++,
with the threads between two barriers in a shuffled order: a barrier that is missing shows as a wrong number.
"""

from __future__ import annotations

from mutations import (
    ADVANCE,
    GRAD_INPUT,
    GRAD_WEIGHT,
    GROWTH,
    LINEAR,
    LINEAR_LOSS,
    LOSS,
    MANY_CLASSES,
    NAN_LAYER,
    OVERFLOW,
    OWN_WAY,
    SCALED,
    UPDATE,
    WEIGHTS,
    Mutation,
)  # fmt: skip

FIRST = "test_loss.py::test_the_first_of_equal_logits_is_the_answer"
LONG_ARENA = "test_update.py::test_a_long_arena_is_updated_to_its_last_element"
LONG_BATCH = "test_cupy_facts.py::test_the_sums_of_a_long_batch_are_added_up_from_parts"


def _bugs(file: str, *entries: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, tuple(tests.split()), "cupy") for name, old, new, tests in entries]


CUDA_MUTATIONS = (
    *_bugs(
        "common.cuh",
        (
            "no barrier before the parts of a sum are written",
            "    __syncthreads();\n    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;\n",
            "    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;\n",
            f"{MANY_CLASSES} {LINEAR_LOSS}",
        ),
        (
            "no barrier before the parts of a sum are read",
            "parts[threadIdx.x / WARP] = value;\n    __syncthreads();\n",
            "parts[threadIdx.x / WARP] = value;\n",
            f"{LINEAR_LOSS} {UPDATE}",
        ),
        (
            "part of a sum from the last lane of a half",
            "mask = WARP / 2; mask > 0; mask /= 2) value +=",
            "mask = WARP / 4; mask > 0; mask /= 2) value +=",
            LINEAR_LOSS,
        ),
        (
            "shuffle of the lower half alone",
            "value += __shfl_xor_sync(ALL_LANES, value, mask)",
            "value += __shfl_xor_sync(0xffffu, value, mask)",
            LINEAR_LOSS,
        ),
        (
            "last part of a sum left out",
            "i < THREADS / WARP; i++) total +=",
            "i < THREADS / WARP - 1; i++) total +=",
            MANY_CLASSES,
        ),
        ("ticket never ready again", "        if (last) *ticket = 0;\n", "", LONG_BATCH),
        (
            "last block is the last but one",
            "atomicAdd(ticket, 1u) == count - 1",
            "atomicAdd(ticket, 1u) == count - 2",
            UPDATE,
        ),
        (
            "other blocks asked before all know who is last",
            "    }\n    __syncthreads();\n    __threadfence();\n    return last;",
            "    }\n    __threadfence();\n    return last;",
            LINEAR_LOSS,
        ),
        (
            "tensor of the block before",
            "entries[low + left / 2].first_block <= blockIdx.x",
            "entries[low + left / 2].first_block < blockIdx.x",
            UPDATE,
        ),
    ),
    *_bugs(
        "lanes.cuh",
        (
            "vectors where they do not lie on 16 bytes",
            " && reinterpret_cast<unsigned long long>(at) % 16 == 0",
            "",
            OWN_WAY,
        ),
        (
            "lanes behind the last column stored",
            "if (i < place.count) store(at + i * to.col",
            "if (i <= place.count) store(at + i * to.col",
            LINEAR,
        ),
        ("step between columns ignored", "store(at + i * to.col, values[i])", "store(at + i, values[i])", OWN_WAY),
        ("row of the last eight columns", "(columns + LANES - 1) / LANES", "columns / LANES", LINEAR),
    ),
    *_bugs(
        "layers.cu",
        ("row -1 loads the row before", "if (from.row >= 0) load_lanes", "load_lanes", LINEAR),
        (
            "batch always from the first row of the epoch",
            "[call.counters[ROW_OFFSET] + place.row]",
            "[place.row]",
            LINEAR,
        ),
        ("kept outputs scaled the other way", "y * scale : 0.0f", "y / scale : 0.0f", LINEAR),
        ("dropped gradients kept", "? values[i] * scale : 0.0f", "? values[i] * scale : values[i]", GRAD_INPUT),
    ),
    *_bugs(
        "philox.cuh",
        (
            "words of the columns and of the row swapped",
            "static_cast<unsigned>(block), static_cast<unsigned>(row)",
            "static_cast<unsigned>(row), static_cast<unsigned>(block)",
            LINEAR,
        ),
        ("nine rounds of Philox", "round < 10", "round < 9", LINEAR),
        ("half words of the mask swapped", "kept |= 2u << (2 * i)", "kept |= 2u << (2 * i) >> 1", LINEAR),
    ),
    *_bugs(
        "functions.cuh",
        ("relu swallows NaN", "return z < other ? other : z;", "return z > other ? z : other;", NAN_LAYER),
    ),
    *_bugs(
        "pointwise.cuh",
        (
            "derivative of silu without its product",
            "s * (1.0f + v * (1.0f - s))",
            "s * (1.0f + (1.0f - s))",
            GRAD_INPUT,
        ),
        (
            "nesterov without its look ahead",
            "(change + scalars.momentum * velocity)",
            "(change + velocity)",
            UPDATE,
        ),
    ),
    *_bugs(
        "teams.cuh",
        (
            "last of equal logits taken",
            "other == value && other_column < column",
            "other == value && other_column > column",
            FIRST,
        ),
        (
            "no barrier before the largest are read",
            "            columns[threadIdx.x / WARP] = mine.column;\n        }\n        __syncthreads();\n",
            "            columns[threadIdx.x / WARP] = mine.column;\n        }\n",
            MANY_CLASSES,
        ),
        (
            "largest of the first warp alone",
            "i < SIZE / WARP; i++) mine.take",
            "i < 1; i++) mine.take",
            MANY_CLASSES,
        ),
    ),
    *_bugs(
        "rows.cuh",
        ("ignored labels count", " && !(call.ignores && row.label == call.ignored)", "", WEIGHTS),
        (
            "share without the class weight",
            "if (row.counts && call.class_weight.data) row.share *=",
            "if (!row.counts && call.class_weight.data) row.share *=",
            WEIGHTS,
        ),
        ("padding counts", "count < call.rows ? count", "count > call.rows ? count", LOSS),
        ("loss not divided by its divisor", "return total * call.divisor;", "return total;", LOSS),
        ("loss scale not in dz", "    if (call.hyper) scale *= call.hyper[LOSS_SCALE];\n", "", LINEAR_LOSS),
    ),
    *_bugs(
        "loss.cu",
        ("padding of dz not zeroed", "else if (at < call.rows && dz)", "else if (at < 0 && dz)", LOSS),
        (
            "parts of the block read before they are there",
            "parts[team][3] = sums.below;\n    }\n    __syncthreads();\n",
            "parts[team][3] = sums.below;\n    }\n",
            LOSS,
        ),
        (
            "smoothing shared by the other classes alone",
            "eps / static_cast<float>(call.columns)",
            "eps / static_cast<float>(call.columns - 1)",
            LINEAR_LOSS,
        ),
        (
            "columns stepped by a warp in long rows",
            "    for (long long column = lane; column < call.columns; column += SIZE) {\n        float shifted",
            "    for (long long column = lane; column < call.columns; column += WARP) {\n        float shifted",
            MANY_CLASSES,
        ),
    ),
    *_bugs(
        "gradients.cu",
        (
            "no barrier before the stretches are added",
            "        stretches[stretch][lane] = sum;\n        __syncthreads();\n",
            "        stretches[stretch][lane] = sum;\n",
            GRAD_WEIGHT,
        ),
        (
            "stretch added twice",
            "for (int i = 1; i < STRETCHES && stretch == 0",
            "for (int i = 0; i < STRETCHES && stretch == 0",
            GRAD_WEIGHT,
        ),
        (
            "part that is not full left out",
            "? begin + PART_ROWS : call.rows",
            "? begin + PART_ROWS : begin",
            LONG_BATCH,
        ),
        (
            "parts of the first group for all",
            "vector->sums + group * vector->parts * COLUMNS",
            "vector->sums",
            LONG_BATCH,
        ),
        (
            "first batch of an accumulation added to what was there",
            "% call.accumulate != 0 ? 1.0f",
            "% call.accumulate == 0 ? 1.0f",
            GRAD_WEIGHT,
        ),
    ),
    *_bugs(
        "update.cu",
        (
            "last element of a tensor left alone",
            "            if (at >= tensor.rows * tensor.columns) break;\n            long long row",
            "            if (at >= tensor.rows * tensor.columns - 1) break;\n            long long row",
            LONG_ARENA,
        ),
        ("gradients not divided by the loss scale", "            factor /= call.hyper[LOSS_SCALE];\n", "", SCALED),
        ("overflow taken for an update", "sound = fabs(norm) < largest", "sound = fabs(norm) <= largest", OVERFLOW),
    ),
    *_bugs(
        "clock.cuh",
        ("epoch one batch too long", "if (offset >= total)", "if (offset > total)", ADVANCE),
        ("scale doubles too late", "good >= rule->growth_interval", "good > rule->growth_interval", GROWTH),
        ("rates of the update before", "long long place = count - ", "long long place = count - 1 - ", ADVANCE),
        ("rates past the rows that are filled", "if (place > last) place", "if (place > last + 1) place", ADVANCE),
    ),
)
