"""The oracle's step of a model of a fleet, its ridge and what it adds to sums, with the errors that these may have."""

import numpy as np
from calls import SLOPED
from step_bounds import TwoBytes, traced
from tolerance import U32, assert_updated, assert_within

from fusemlp_kernels import contract as c
from fusemlp_kernels import reference
from fusemlp_kernels.philox import dropout_keep


class Oracle:
    """A model's next step through the oracle, from the state that the ``fleet_cases.Fleet`` has now."""

    def __init__(self, fleet, index):
        self.fleet, self.index, self.model = fleet, index, fleet.models[index]
        self.before = {name: self._exact(fleet.params, name) for name in fleet.places}
        self.states = [{name: self._exact(state, name) for name in fleet.places} for state in fleet.states]
        self.carried = {name: self._exact(fleet.gradients, name) for name in fleet.places}
        self.counters = np.array(fleet.counters[index])
        self.stats = np.array(fleet.stats[index])

    def _exact(self, arena, name):
        return np.array(self.fleet.tensor(arena[self.index], name), np.float64)

    def check(self):
        """The step that has been made is the oracle's, within the bounds of its operations."""
        fleet, model, shape = self.fleet, self.model, self.fleet.shape
        offset, count, batch_index = (int(self.counters[at]) for at in (c.ROW_OFFSET, c.ROW_COUNT, c.BATCH_INDEX))
        rows = np.array(fleet.rows[self.index, offset : offset + count])
        divided = self._divided()
        unit, tiny = fleet.variant.output_unit, fleet.variant.output_tiny
        short = TwoBytes(unit, tiny, 1.0 / divided) if unit else None
        layers, keeps = [], []
        for index, name in enumerate(shape.activations):
            rate = model.rate if index < len(shape.activations) - 1 else 0.0
            slope = self.before.get(f"s{index}", model.slope if name in SLOPED else 0.0)
            w = fleet.variant.rounded(self.before[f"w{index}"]).astype(np.float64)
            layers.append(reference.Layer(w, self.before[f"b{index}"], name, slope, rate))
            width = shape.sizes[index + 1]
            keeps.append(dropout_keep(rate, index, model.seed, batch_index, count, width) if rate else None)
        weight = None if fleet.weight is None else np.array(fleet.weight[rows], np.float64)
        classes = None if fleet.class_weight is None else np.array(fleet.class_weight, np.float64)
        batch = reference.Batch(
            np.array(fleet.x[rows], np.float64), np.array(fleet.target[rows]), weight, classes, keeps
        )
        found = traced(layers, model.loss, batch, short=short, products=fleet.variant.products)
        loss = found.loss / divided
        assert_within(fleet.stats[self.index, c.LAST_LOSS], loss, found.loss_bound / divided)
        names = list(fleet.places)
        grads = dict(zip(names, [g / divided for layer in found.grads for g in layer], strict=True))
        errors = dict(zip(names, [e / divided for layer in found.bounds for e in layer], strict=True))
        self._check_account(batch, count, self._add_ridge(batch, grads, errors))
        self._check_update(grads, errors, batch_index)

    def _divided(self):
        """Return the divisor of the loss on top of the oracle's."""
        ridge, loss = self.model.ridge, self.model.loss
        if ridge is None or ridge.divisor is None or loss.reduction == "sum":
            return 1.0
        return ridge.divisor / (1.0 if loss.kind == "cross_entropy" else self.fleet.shape.sizes[-1])

    def _shares(self, batch):
        """The sum of the row weights."""
        loss = self.model.loss
        weight = np.ones(len(batch.x)) if batch.weight is None else batch.weight
        if loss.kind == "cross_entropy" and not loss.soft:
            classes = np.ones(self.fleet.shape.sizes[-1]) if batch.class_weight is None else batch.class_weight
            counts = batch.target != loss.ignore_index
            return float((weight * counts * classes[np.where(counts, batch.target, 0)]).sum())
        return float(weight.sum())

    def _add_ridge(self, batch, grads, errors):
        """Add its gradients; returns the penalty and the error that it may have."""
        shares = self._shares(batch)
        pull = 0.0 if self.model.ridge is None or shares == 0.0 else self.model.ridge.strength / shares
        if pull == 0.0:
            return 0.0, 0.0
        squares, longest = 0.0, 0
        for name in [name for name in grads if name[0] == "w" and name not in self.fleet.shape.frozen]:
            w = self.before[name]
            grads[name] = grads[name] + pull * w
            # the pull, its product with a weight, and the sum are rounded
            errors[name] = errors[name] + U32 * (2.0 * np.abs(pull * w) + np.abs(grads[name]))
            squares, longest = squares + float(np.square(w).sum()), max(longest, w.size)
        # each square and each partial sum is rounded
        return 0.5 * pull * squares, 0.5 * pull * squares * (longest + 2.0) * U32

    def _check_account(self, batch, count, penalty):
        """Check the batch's share of the sums; at the end of an epoch they are in its row of the statistics."""
        fleet, index = self.fleet, self.index
        total = int(self.counters[c.ROW_TOTAL])
        epoch, inside = divmod(int(self.counters[c.ROW_OFFSET]), total)
        account = fleet.stats[index]
        if fleet.epoch_stats is not None and inside + self.counters[c.ROW_STEP] >= total:
            assert not account[c.LAST_LOSS + 1 :].any()
            assert fleet.epoch_stats[index, epoch, c.LAST_LOSS] == account[c.LAST_LOSS]
            account = fleet.epoch_stats[index, epoch]
        loss, size = account[c.LAST_LOSS] * count, 8.0 * 2.0**-53 * np.abs(account)
        assert_within(account[c.BATCH_LOSSES], self.stats[c.BATCH_LOSSES] + loss, size[c.BATCH_LOSSES])
        assert_within(
            account[c.PENALTIES], self.stats[c.PENALTIES] + penalty[0] * count, penalty[1] * count + size[c.PENALTIES]
        )
        if self.model.loss.reduction == "mean":
            shares = self._shares(batch) * self._divided()
            columns = 1.0 if self.model.loss.kind == "cross_entropy" else fleet.shape.sizes[-1]
            error = (count + 2.0) * U32 * shares * columns + size[c.NORM_SUM]
            assert_within(account[c.NORM_SUM], self.stats[c.NORM_SUM] + shares * columns, error)

    def _check_update(self, grads, errors, batch_index):
        fleet, rule = self.fleet, self.model.rule
        names = list(fleet.places)
        every = rule.accumulate
        if batch_index % every:
            grads = {name: g + self.carried[name] for name, g in grads.items()}
            errors = {name: e + 2.0 * U32 * np.abs(grads[name]) for name, e in errors.items()}
        trained = [name for name in names if name not in fleet.shape.frozen]
        if (batch_index + 1) % every:
            for name in trained:
                assert_within(fleet.tensor(fleet.gradients[self.index], name), grads[name], errors[name])
        factor, relative = _clipping(rule, [grads[n] / every for n in trained], [errors[n] / every for n in trained])
        updates = int(self.counters[c.UPDATE_COUNT])
        rate = self.model.rate_at(updates)
        for name in names:
            now = fleet.tensor(fleet.params[self.index], name)
            if name not in trained or (batch_index + 1) % every:
                np.testing.assert_array_equal(now, self.before[name].astype(now.dtype))
                continue
            g = factor * grads[name] / every
            error = (factor * errors[name] / every + np.abs(g) * (relative + 3.0 * U32)) * (1.0 + relative)
            before = self.before[name], g, tuple(state[name] for state in self.states)
            states = [fleet.tensor(arena[self.index], name) for arena in fleet.states]
            assert_updated(now, states, rule, fleet.tensor_rule(self.model, name), before, updates, rate, error)
        following = self.model.rate_at(int(fleet.counters[self.index, c.UPDATE_COUNT]))
        assert fleet.hyper[self.index, c.LEARNING_RATE] == following


def _clipping(rule, grads, errors):
    """The factor, and its relative error."""
    if rule.clip_norm is None:
        return 1.0, 0.0
    norm = np.sqrt(sum(np.square(g).sum() for g in grads))
    off = np.sqrt(sum(np.square(e).sum() for e in errors)) + U32 * norm * 8.0
    relative = off / max(norm - off, 1e-30) if norm + off > rule.clip_norm else 0.0
    return reference.clip_factor(grads, rule.clip_norm), relative + 4.0 * U32
