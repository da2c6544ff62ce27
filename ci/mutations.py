"""Bugs that a working engineer could plant in the Triton kernels, and the tests that must see each of them.

``ci/mutate_kernels.py`` plants them one at a time, in a copy. ``old`` occurs exactly once in ``file`` of
``kernels/fusemlp_kernels/triton``; ``tests`` are functions in ``tests/kernels``, run under Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

LINEAR, LOSS = "test_layers.py::test_linear", "test_loss.py::test_loss_grad"
LINEAR_LOSS, GRAD_INPUT = "test_loss.py::test_linear_loss_grad", "test_layers.py::test_grad_input"
OWN_WAY = "test_layers.py::test_every_operand_may_lie_in_its_own_way"
GRAD_WEIGHT, PARTS = "test_layers.py::test_grad_weight", "test_layers.py::test_gradients_of_a_batch_in_parts"
FUSED, UPDATE, ADVANCE = (
    f"test_update.py::{name}" for name in ("test_grad_weight_update", "test_update", "test_advance")
)
CLIP, NOISE = (f"test_clip_examples.py::{name}" for name in ("test_clip_examples", "test_update_adds_noise"))
WEIGHTS = "test_loss.py::test_all_weights_of_a_cross_entropy_together"
MANY_CLASSES = "test_loss.py::test_cross_entropy_of_ten_thousand_classes"
SCALED = "test_loss_scale.py::test_scaled_gradients_give_the_update_of_the_unscaled"
OVERFLOW = "test_loss_scale.py::test_a_batch_that_overflowed_changes_nothing_but_the_scale"
GROWTH = "test_loss_scale.py::test_the_scale_doubles_after_enough_updates"
FLEET = "test_train_fleet.py::test_steps_of_each_model_are_the_oracles"
RIDGES = "test_fleet_epochs.py::test_steps_with_ridges_and_divisors_are_the_oracles"
EPOCHS = "test_fleet_epochs.py::test_steps_through_three_epochs_are_the_oracles_and_each_has_its_account"
RACES = "test_train_fleet.py::test_between_two_barriers_nobody_reads_what_another_writes"
PERTURB = "test_perturb.py::test_a_start_and_a_step_are_those_of_the_definition"
TINY = "test_perturb.py::test_tiny_gradients_move_as_far_and_nan_stays_in_its_row"
OWN = "test_members.py::test_affine_members_and_back"
OWN_ROWS = "test_members.py::test_the_first_factors_take_the_rows_of_a_batch"
HEADS = "test_members.py::test_heads_and_their_gradients"
NAN_LAYER = "test_nan.py::test_nan_goes_through_a_layer_and_its_derivative"


@dataclass(frozen=True)
class Mutation:
    """One bug: ``old`` becomes ``new`` in a file of a package of kernels."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    package: str = "triton"


def _bugs(file: str, *entries: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(name, file, old, new, tuple(tests.split())) for name, old, new, tests in entries]


MUTATIONS = (
    *_bugs(
        "linear.py",
        (
            "rows of y not masked",
            "stored = (at_m < M)[:, None] & (at_n < masked_width(N, ALIGNED))[None, :]",
            "stored = (at_m >= 0)[:, None] & (at_n < masked_width(N, ALIGNED))[None, :]",
            LINEAR,
        ),
        (
            "columns of y masked as if every matrix had padding",
            "(at_n < masked_width(N, ALIGNED))[None, :]",
            "(at_n < masked_width(N, True))[None, :]",
            LINEAR,
        ),
        (
            "mask of K does not move on",
            "inside = at_k < width - start\n        x_tile = tl.load(x_at, mask=wanted[:, None]",
            "inside = at_k < width\n        x_tile = tl.load(x_at, mask=wanted[:, None]",
            LINEAR,
        ),
        ("last block of K dropped", "in range(0, width, BK)", "in range(0, width - BK + 1, BK)", LINEAR),
        ("w stepped by x's stride", "w_at += BK * step_w", "w_at += BK * step_x", OWN_WAY),
        (
            "w read transposed",
            "[None, :] * row_pitch(w_row, ALIGNED) + at_k[:, None] * step_w",
            "[None, :] * step_w + at_k[:, None] * row_pitch(w_row, ALIGNED)",
            LINEAR,
        ),
        (
            "stride of the bias ignored",
            "tl.load(b + at_n * b_step, mask=named, other=0.0)\n    return whole_sum",
            "tl.load(b + at_n, mask=named, other=0.0)\n    return whole_sum",
            OWN_WAY,
        ),
        (
            "row -1 loads row 0",
            "wanted = source >= 0\n    named = at_n < N\n    width = masked_width(K, ALIGNED)",
            "wanted = at_m < M\n    named = at_n < N\n    width = masked_width(K, ALIGNED)",
            LINEAR,
        ),
        (
            "padding of y not zeroed",
            "out = tl.where((at_n < N)[None, :], activate(out, activation, slope), 0.0)",
            "out = activate(out, activation, slope)",
            LINEAR,
        ),
        ("kept outputs not scaled", "tl.where(keep, out * keep_scale, 0.0)", "tl.where(keep, out, 0.0)", LINEAR),
        (
            "every tile has the dropout mask of its row's first",
            "keep_mask(row, first, batch_index",
            "keep_mask(row, piece * (BN // PARTS), batch_index",
            LINEAR,
        ),
        (
            "batch always from the first row of the epoch",
            "    rows = this_batch(rows, counters, gather)\n    tile_m",
            "    tile_m",
            LINEAR,
        ),
        (
            "offsets of rows in 32 bits",
            "y + far * row_pitch(y_row, ALIGNED), z +",
            "y + (at_m * y_row)[:, None], z +",
            "test_addresses.py::test_rows_beyond_32_bits",
        ),
        (
            "last part of a reduction not summed",
            "return tl.sum(whole_sum(z, rest, PRODUCT), axis=0)",
            "parts = tl.arange(0, SPLIT)[:, None, None]\n"
            "    return tl.sum(tl.where(parts < SPLIT - 1, whole_sum(z, rest, PRODUCT), 0.0), axis=0)",
            FLEET,
        ),
        ("parts move on by one of them", "x_at += SPLIT * BK", "x_at += BK", FLEET),
    ),
    *_bugs(
        "tiles.py",
        ("last group of tiles taken for a full one", "tl.minimum(tall - first, GROUP)", "GROUP", LINEAR),
        ("batch too short by a row", "inside = offsets < count", "inside = offsets < count - 1", LINEAR),
    ),
    *_bugs(
        "launch.py",
        ("gaps of others' matrices taken for padding", "(columns % 8 == 0 or is_owned(tensor))", "True", OWN_WAY),
    ),
    *_bugs(
        "dropout.py",
        (
            "words of the layer and of the batch swapped",
            "zero + layer.to(tl.uint32),\n        zero + batch_index.to(tl.uint32),",
            "zero + batch_index.to(tl.uint32),\n        zero + layer.to(tl.uint32),",
            LINEAR,
        ),
        (
            "lanes of the mask in the wrong order",
            "tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))",
            "tl.join(tl.join(w0 & 0xFFFF, w1 & 0xFFFF), tl.join(w2 & 0xFFFF, w3 & 0xFFFF))",
            LINEAR,
        ),
        ("seven rounds of Philox", "tl.static_range(10)", "tl.static_range(7)", LINEAR),
    ),
    *_bugs(
        "layers.py",
        ("mask of the next layer", '"layer": dropout.layer,', '"layer": dropout.layer + 1,', LINEAR),
        ("seed cut to its low half", '        "key1": signed(key1),\n', '        "key1": 0,\n', LINEAR),
    ),
    *_bugs(
        "functions.py",
        (
            "relu swallows NaN",
            "return tl.where(z < other, other, z)",
            "return tl.where(z > other, z, other)",
            NAN_LAYER,
        ),
        ("derivative of relu swallows NaN", "tl.where(z <= 0, below, z))", "below)", NAN_LAYER),
        ("far branch of tanh without its sign", "far = tl.where(z < 0, -far, far)", "far = far", LINEAR),
    ),
    *_bugs(
        "members.py",
        (
            "rows of the first member",
            "tl.where(live, place, 0) * members + member",
            "tl.where(live, place, 0) * members",
            OWN,
        ),
        ("last stretch not summed", "mask=(at < splits)[:, None]", "mask=(at < splits - 1)[:, None]", OWN),
        ("dropped gradients pass", "tl.where(keep, g * keep_scale, 0.0)", "tl.where(keep, g * keep_scale, g)", OWN),
        (
            "members' rows of the first batch of the epoch",
            "batch_rows(this_batch(rows, counters, gather), at_m",
            "batch_rows(rows, at_m",
            OWN_ROWS,
        ),
        ("head of the first member", "place = member.to(tl.int64) * N", "place = member.to(tl.int64) * 0", HEADS),
    ),
    *_bugs(
        "perturb.py",
        (
            "attack on the first rows of the epoch",
            "tl.load(this_batch(rows, counters, gather) + row)",
            "tl.load(rows + row)",
            PERTURB,
        ),
        ("change beyond eps on one side", "d = minimum(maximum(d, -eps), eps)", "d = maximum(d, -eps)", PERTURB),
        (
            "words of a random start in the wrong order",
            "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
            "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
            PERTURB,
        ),
        (
            "squares of small gradients underflow",
            "other=0.0).to(tl.float64)",
            "other=0.0).to(tl.float32)",
            TINY,
        ),
    ),
    *_bugs(
        "loss.py",
        (
            "padding of dz not zeroed",
            "result = tl.where(inside, (tl.exp(shifted) * (mass / total)[:, None] - q) * scale, 0.0)",
            "result = (tl.exp(shifted) * (mass / total)[:, None] - q) * scale",
            LOSS,
        ),
        ("smoothing shared by the other classes alone", "+ eps / N", "+ eps / (N - 1)", LINEAR_LOSS),
        ("ignored labels count", "counts = counts & (label != ignored)", "counts = counts & True", WEIGHTS),
        (
            "normaliser without class weights",
            "shares = weights * tl.load(class_weight + label, mask=counts, other=0.0)",
            "shares = weights",
            WEIGHTS,
        ),
        (
            "normaliser without sample weights",
            "if tl.load(settings + WEIGHTED) + tl.load(settings + CLASSES)",
            "if tl.load(settings + CLASSES)",
            LINEAR_LOSS,
        ),
        (
            "normaliser counts ignored labels",
            "tl.load(settings + CLASSES) + tl.load(settings + IGNORES) != 0.0",
            "tl.load(settings + CLASSES) != 0.0",
            WEIGHTS,
        ),
        ("mean of element-wise losses over the rows alone", "total = total * N", "total = total * 1", LINEAR_LOSS),
        ("sum of means in place of sums", "LOSS_SUM) + total)", "LOSS_SUM) + total / divisor)", LINEAR_LOSS),
        (
            "last loss kept where the normaliser is zero",
            "    total = tl.where(mean & (normaliser == 0.0), 0.0, total)\n",
            "",
            "test_loss.py::test_a_batch_that_weighs_nothing_gives_zero",
        ),
        ("loss scale not in dz", "scale = scale * tl.load(hyper + LOSS_SCALE)", "scale = scale * 1.0", LINEAR_LOSS),
        (
            "gradient of prelu's slope on the wrong side",
            "tl.sum(by_y * by_slope_prelu(z))",
            "tl.sum(by_y * by_slope_prelu(-z))",
            LINEAR_LOSS,
        ),
        (
            "last of equal logits wins",
            "tl.where(largest > best, at, best_at)",
            "tl.where(largest >= best, at, best_at)",
            "test_loss.py::test_the_first_of_equal_logits_is_the_answer",
        ),
        (
            "logits not shifted",
            "tl.where(named, z - largest[:, None], 0.0)",
            "tl.where(named, z, 0.0)",
            "test_nan.py::test_logits_of_any_size_overflow_nowhere",
        ),
        ("sum of exponentials not rescaled", "total = total * tl.exp(highest - shift)", "total = total", MANY_CLASSES),
        (
            "x of the output layer from the first row of the epoch",
            "    x_rows = this_batch(x_rows, counters, x_gather)\n",
            "",
            LINEAR_LOSS,
        ),
    ),
    *_bugs(
        "gradients.py",
        (
            "padding of dz_prev cleared by chance",
            "result = tl.where((near < K)[None, :], g * derivative(v, activation, slope), 0.0)",
            "result = g * derivative(v, activation, slope)",
            "test_nan.py::test_nan_stays_out_of_the_padding",
        ),
        ("last block of N dropped", "in range(0, N, BN)", "in range(0, N - BN + 1, BN)", GRAD_INPUT),
        ("mask of the deeper rows of w lost", "(at_n < N - start)[:, None] &", "(at_n >= 0)[:, None] &", GRAD_INPUT),
        ("w stepped by columns", "w_at += BN * pitch", "w_at += BN", OWN_WAY),
        ("kept gradients not scaled", "tl.where(keep, g * keep_scale, 0.0)", "tl.where(keep, g, 0.0)", GRAD_INPUT),
        ("derivative read off the scaled output", "v = v * kept_share", "v = v * 1.0", GRAD_INPUT),
        (
            "gradient of prelu's slope with the wrong sign",
            "g * by_slope_prelu(v), 0.0)",
            "-g * by_slope_prelu(v), 0.0)",
            GRAD_INPUT,
        ),
        ("dz not transposed", "product(tl.trans(dz_tile), x_tile", "product(dz_tile, x_tile", GRAD_WEIGHT),
        (
            "row -1 counts in dw",
            "mask=(source >= 0)[:, None] & inside_k[None, :]",
            "mask=inside_b[:, None] & inside_k[None, :]",
            GRAD_WEIGHT,
        ),
        (
            "dw of the first rows of the epoch",
            "        rows = this_batch(rows, counters, gather)\n        acc",
            "        acc",
            GRAD_WEIGHT,
        ),
        ("added to the batch that comes first", "BATCH_INDEX) % every != 0", "BATCH_INDEX) % every != 1", GRAD_WEIGHT),
        ("tile of the task before", "(first <= tile)", "(first < tile)", GRAD_WEIGHT),
        ("last part reads behind the batch", "tl.minimum(M, begin + length)", "begin + length", PARTS),
        (
            "offset of a part in 32 bits",
            "shift = split.to(tl.int64) * part",
            "shift = split * part",
            "test_addresses.py::test_parts_beyond_32_bits",
        ),
        (
            "slope's gradient in every part",
            "mask=tl.where(split == 0, inside_n, False)",
            "mask=inside_n",
            PARTS,
        ),
        (
            "clock advanced by every program",
            "if is_last(ticket, programs):\n            advance_clock(",
            "if is_last(ticket, programs) | True:\n            advance_clock(",
            FUSED,
        ),
        (
            "square of large gradients overflows",
            "part = g / scale",
            "part = g / 1.0",
            "test_nan.py::test_the_norm_of_large_gradients_does_not_overflow",
        ),
    ),
    *_bugs(
        "grouped.py",
        ("clock stands where nothing is trained", "    if programs:\n        return run\n", "    return run\n", FUSED),
        ("shadow not written", "shadowed=int(shadow is not None),", "shadowed=0,", FUSED),
        (
            "shadow of the arena not written",
            '"shadowed": int(shadow is not None),',
            '"shadowed": 0,',
            SCALED,
        ),
        (
            "segments of whole blocks alone",
            '-(-row["N"] // rows)',
            'max(row["N"] // rows, 1)',
            "test_update.py::test_a_long_arena_is_updated_to_its_last_element",
        ),
    ),
    *_bugs(
        "pointwise_triton.py",
        (
            "activation without a formula is the identity",
            'y = z + float("nan")',
            "y = z",
            "test_pointwise.py::test_an_activation_without_a_formula_is_no_other",
        ),
        ("squares without their factor of two", "gradient = 2.0 * r", "gradient = r", LINEAR_LOSS),
        (
            "sides of the quantile swapped",
            "maximum((1.0 - option) * s, -option * s)",
            "maximum(option * s, (option - 1.0) * s)",
            LINEAR_LOSS,
        ),
        ("weight decay coupled", "decoupled = tl.load(rule + DECOUPLED)", "decoupled = tl.load(rule + INSIDE)", UPDATE),
        ("velocity with the wrong sign", "velocity + inner.to(tl.float32)", "velocity - inner.to(tl.float32)", UPDATE),
        ("average away from the parameters", "average + share.to", "average - share.to", UPDATE),
        ("Nesterov's step ignored", "(change + momentum.to(tl.float32) * velocity)", "velocity", UPDATE),
        ("missing bias correction", "root / bias_correction_1", "root", UPDATE),
        (
            "eps where the other convention has it",
            "tl.where(rate_inside, eps, eps * root)",
            "eps",
            "test_update.py::test_eps_lies_where_the_convention_has_it",
        ),
        (
            "factor of the learning rate ignored",
            "tl.load(hyper + LEARNING_RATE) * factor",
            "tl.load(hyper + LEARNING_RATE)",
            UPDATE,
        ),
        (
            "padding of Adam's parameters is 0 / 0",
            "tl.maximum(tl.where(rate_inside, eps, eps * root), 1.1754943508222875e-38)",
            "tl.where(rate_inside, eps, eps * root)",
            "test_update.py::test_adam_without_eps_leaves_zero_gradients_alone",
        ),
    ),
    *_bugs(
        "update.py",
        (
            "clipping never shrinks",
            "tl.where(factor > 1.0, 1.0, factor)",
            "tl.where(factor < 1.0, 1.0, factor)",
            UPDATE,
        ),
        (
            "clipping by the norm of the sum",
            "clip_factor(length * factor, limit)",
            "clip_factor(length, limit)",
            UPDATE,
        ),
        ("sum of accumulated batches in place of the mean", "factor = 1.0 / every", "factor = every / every", UPDATE),
        (
            "loss scale not divided out",
            "factor = factor / tl.load(hyper + LOSS_SCALE)",
            "factor = factor * 1.0",
            SCALED,
        ),
        ("infinite norm not skipped", '(tl.abs(length) < float("inf"))', "(length == length)", OVERFLOW),
        (
            "last part not summed",
            "for index in range(1, parts)",
            "for index in range(1, parts - 1)",
            "test_update.py::test_update_sums_the_parts_of_a_gradient",
        ),
        (
            "clock advanced by every program of the sweep",
            "if is_last(ticket, programs):\n        advance_clock(",
            "if is_last(ticket, programs) | True:\n        advance_clock(",
            UPDATE,
        ),
        (
            "padding of private batches counted",
            "            leave_out_padding(counters, rows, COUNTED)",
            "            pass",
            NOISE,
        ),
    ),
    *_bugs(
        "privacy.py",
        ("bias in no row's norm", "(by_x + tl.where(tl.load(row + KIND) == BIAS, 1.0, 0.0))", "by_x", CLIP),
        ("row clipped by its last layer alone", "squares += by_dz *", "squares = by_dz *", CLIP),
        ("rows clipped to the square", "factor = (largest / tl.sqrt(", "factor = (largest / (", CLIP),
        ("rows of the first batch in every norm", "this_batch(rows, counters, gather), at_m", "rows, at_m", CLIP),
        ("padding clipped", "inside = at_m < count\n    far", "inside = at_m < M\n    far", CLIP),
        ("noise of one tensor for all", "zero + (-2 - tensor)", "zero + (-2 - 0 * tensor)", NOISE),
        ("noise of one update for all", "zero + update.to(tl.uint32)", "zero", NOISE),
        ("second word of an element a word too high", "element // NORMALS", "element // NORMALS + 1", NOISE),
        ("sine where the cosine belongs", "tl.where(odd, sine, -sine)", "tl.where(odd, -sine, sine)", NOISE),
        (
            "signs of sine and cosine swapped",
            "tl.where(odd, angle & 2, angle & 1)",
            "tl.where(odd, angle & 1, angle & 2)",
            NOISE,
        ),
        ("variance of the noise is two", "tl.sqrt(-tl.log(", "tl.sqrt(-2.0 * tl.log(", NOISE),
        ("noise not divided", "* (1.0 / tl.load(noise + 1))", "", NOISE),
        ("noise between the rows", "tl.where(column.to(tl.int64) < columns, noisy, 0.0)", "noisy", NOISE),
        (
            "gaps between the rows counted",
            "(top + down.to(tl.int64)) * columns",
            "(top + down.to(tl.int64)) * pitch",
            NOISE,
        ),
    ),
    *_bugs(
        "clock.py",
        ("ticket not reset", "    if last:\n        tl.store(ticket, 0)\n", "", UPDATE),
        (
            "second to last program takes itself for the last",
            "taken == programs - 1",
            "taken == tl.maximum(programs - 2, 0)",
            LINEAR_LOSS,
        ),
        (
            "hyperparameters in reverse",
            "name) for name in HYPERPARAMETERS",
            "name) for name in HYPERPARAMETERS[::-1]",
            UPDATE,
        ),
        ("rates of the update before", "place = count - ", "place = count - 1 - ", ADVANCE),
        ("rates past the rows that are filled", "tl.minimum(place, last)", "place", ADVANCE),
        (
            "one bias correction for both",
            "tl.load(row + BIAS_CORRECTION_2)",
            "tl.load(row + BIAS_CORRECTION_1)",
            ADVANCE,
        ),
        ("rate scale forgotten", " * tl.load(hyper + RATE_SCALE)", "", ADVANCE),
        (
            "epoch one batch too long",
            "tl.where(offset >= total, 0, offset)",
            "tl.where(offset > total, 0, offset)",
            ADVANCE,
        ),
        ("short batch taken for a full one", "tl.minimum(step, total - offset)", "step", ADVANCE),
        ("scale doubles too late", "grows = good >= GROWTH_INTERVAL", "grows = good > GROWTH_INTERVAL", GROWTH),
        (
            "overflow does not halve the scale",
            "tl.store(hyper + LOSS_SCALE, tl.load(hyper + LOSS_SCALE) * 0.5)",
            "tl.store(hyper + LOSS_SCALE, tl.load(hyper + LOSS_SCALE))",
            OVERFLOW,
        ),
        ("skipped batches in a row never end", "            tl.store(counters + SKIPPED_IN_A_ROW, 0)\n", "", OVERFLOW),
    ),
    *_bugs(
        "resident_tables.py",
        ("rows of the first model", "return rows + model * rows_size + tl.load(", "return rows + tl.load(", FLEET),
    ),
    *_bugs(
        "resident.py",
        (
            "masks of the first model going back",
            "above = row + LAYER_COLUMNS\n    draw, share = draws + (model * depth + index)",
            "above = row + LAYER_COLUMNS\n    draw, share = draws + (0 * depth + index)",
            FLEET,
        ),
        (
            "no barrier behind the forward pass",
            "            tl.debug_barrier()\n        if entropy != 0:",
            "        if entropy != 0:",
            RACES,
        ),
        (
            "weights updated while dz is still to be computed from them",
            "            tl.debug_barrier()\n        for index in range(lowest, depth):",
            "        for index in range(lowest, depth):",
            RACES,
        ),
        ("loss of the last tile of rows alone", "total += loss.to(tl.float64)", "total = loss.to(tl.float64)", FLEET),
        (
            "gradient of the slope of the layer above",
            "tl.store(slopes + index, below)",
            "tl.store(slopes + index + 1, below)",
            FLEET,
        ),
        ("divisor forgotten", "found * tl.load(row + RATIO)", "found", RIDGES),
        (
            "penalty of frozen weights",
            "tl.where(number(row, W_TASK) >= 0,",
            "tl.where(number(row, W_TASK) >= -1,",
            RIDGES,
        ),
        (
            "ridge of a batch that weighs nothing",
            "exists = (found < 0.0) | (found > 0.0)",
            "exists = found == found",
            "test_fleet_epochs.py::test_a_batch_that_weighs_nothing_has_no_penalty",
        ),
        (
            "ridge that is NaN gets into the padding",
            "exists = (found < 0.0) | (found > 0.0)",
            "exists = found != 0.0",
            "test_fleet_epochs.py::test_a_weight_that_is_nan_reaches_its_model_and_no_padding",
        ),
    ),
    *_bugs(
        "resident_update.py",
        ("rates of the first model", "rates + model * rates_size", "rates", FLEET),
        (
            "clock read while it is written",
            "    tl.debug_barrier()\n    advance_clock(",
            "    advance_clock(",
            RACES,
        ),
        (
            "next rows put right while they are written",
            "        tl.debug_barrier()\n        tl.store(counters + ROW_OFFSET,",
            "        tl.store(counters + ROW_OFFSET,",
            RACES,
        ),
        ("accounts of the first model", "(model * epochs + epoch) * STATS", "epoch * STATS", EPOCHS),
        ("sums go on behind an epoch", "tl.where(closes, 0.0, account)", "account", EPOCHS),
        ("an epoch behind the last", "tl.where(epoch + 1 < epochs, epoch + 1, 0)", "epoch + 1", EPOCHS),
        (
            "ridge of biases",
            "g, start + at, mask, 0.0, weights, params, grads,",
            "g, start + at, mask, pull, weights, params, grads,",
            RIDGES,
        ),
        ("ridge lost where gradients are stored", "g += pull.to(tl.float32) * tl", "g += 0.0 * tl", RIDGES),
        (
            "padding of weights not kept from NaN",
            "g = tl.where(near < K, part_of(acc, piece, PARTS, BN, BK), 0.0)",
            "g = part_of(acc, piece, PARTS, BN, BK)",
            "test_train_fleet.py::test_nan_reaches_its_model_and_no_padding",
        ),
        ("frozen weights updated", "tl.where(task >= 0, N, 0)", "tl.where(task >= -1, N, 0)", FLEET),
        (
            "clipped by the norm of the sum of batches",
            "clip_factor(tl.sqrt(squares) * factor, limit)",
            "clip_factor(tl.sqrt(squares), limit)",
            FLEET,
        ),
    ),
    *_bugs(
        "fleets.py",
        ("second moment is the first", '"second": states[1]', '"second": states[0]', FLEET),
        ("average is the second moment", '"average": states[2]', '"average": states[1]', FLEET),
        (
            "steps of the first launch for all",
            "if entries != listed:",
            "if not listed:",
            "test_train_fleet.py::test_a_model_that_has_stopped_does_not_move",
        ),
    ),
)
