"""Binding the calls over all layers at once: ``clip_examples``, ``grad_weight``, ``grad_weight_update``, ``update``;
and ``grad_weight_members``, over all members."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds, members_of
from fusemlp_kernels.contract import MOST_PARTS, RATE_COLUMNS, Noise, TensorRule
from fusemlp_kernels.philox import seed_key
from fusemlp_kernels.triton import clock, configs, gradients, update
from fusemlp_kernels.triton.launch import LARGEST_INDEX, Run, Tensor, TritonDevice, in_sequence, is_aligned, signed
from fusemlp_kernels.triton.layers import arguments_of, launch_clock

WEIGHT, BIAS, SLOPE, SEGMENT = range(4)
PLAIN = TensorRule()


class _Tasks:
    """The table of the kernels over all layers: a row for each trained tensor."""

    def __init__(self, device: TritonDevice) -> None:
        self.device = device
        self.rows: list[dict[str, int]] = []
        self.rules: list[tuple[float, float]] = []
        self.aligned = True
        self._bases: dict[str, Tensor] = {}

    def far_base(self, kind: str) -> Any:
        """The tensor from which the offsets into tensors of "real" or "compute" type count."""
        kind = kind if self.device.dtype(kind) != self.device.dtype("real") else "real"
        return self.device.far_base(self._bases.setdefault(kind, self.device.zeros(1, kind)))

    def _place(self, name: str, tensor: Tensor) -> dict[str, int]:
        """The offset and strides of a matrix or vector; a vector's elements are its rows.

        An offset is the distance in elements from the base of its type, also from one allocation to another.
        """
        kind = "real" if tensor.dtype == self.device.dtype("real") else "compute"
        base = self._bases.setdefault(kind, tensor)
        offset = (tensor.data_ptr() - base.data_ptr()) // tensor.element_size()
        row, column = (*tensor.stride(), 0)[:2]
        # the kernel assumes that offsets are multiples of 8 elements: of 32 bytes in fp32, where addresses are of 16
        self.aligned &= offset % 8 == 0 and (is_aligned(tensor) if tensor.dim() == 2 else tensor.data_ptr() % 16 == 0)
        return {name: offset, f"{name}_row": row, f"{name}_col": column}

    def add(self, rule: TensorRule, **fields: Tensor | int | None) -> None:
        """One task: ``gradients.TASK_FIELDS``, with tensors for their places; the others are zero.

        The fast path computes one set of offsets for a matrix, its states and its shadow.
        """
        row: dict[str, int] = {}
        for name, value in fields.items():
            if isinstance(value, Tensor):
                row |= self._place(name, value)
            elif value is not None:
                row[name] = value
        pitches = {row[f"{name}_row"] for name in ("p", "s0", "s1", "average", "shadow") if row.get(f"{name}_row")}
        self.aligned &= row["kind"] != WEIGHT or len(pitches) <= 1
        self.rows.append(row)
        self.rules.append((rule.lr_factor, rule.weight_decay))

    def tables(self, rows: int, columns: int) -> tuple[Tensor, Tensor, int]:
        """The int64 table, the float64 table, and the number of tiles: of rows x columns, and of a bias of at most
        ``gradients.VECTOR`` rows."""
        first, table = 0, []
        for row in self.rows:
            table.append([{"first_tile": first, **row}.get(name, 0) for name in gradients.TASK_FIELDS])
            height = min(rows, gradients.VECTOR.value) if row["kind"] in (BIAS, SLOPE) else rows
            first += -(-row["N"] // height) * -(-row["K"] // columns)
        numbers = self.device.numbers(table or [[0] * len(gradients.TASK_FIELDS)], "int64")
        return numbers, self.device.numbers(self.rules or [(0.0, 0.0)], "float64"), first


def _collect(device: TritonDevice, call: SimpleNamespace, updates: bool) -> _Tasks:
    """The tasks of all layers and slopes."""
    tasks = _Tasks(device)
    for layer in call.layers:
        for kind, name in ((WEIGHT, "w"), (BIAS, "b")):
            tensor, states, rule, shadow = getattr(layer, name if updates else f"d{name}"), (), PLAIN, None
            if tensor is None:
                continue
            if updates:
                states, rule = getattr(layer, f"{name}_state"), getattr(layer, f"{name}_rule")
                shadow = layer.w_shadow if kind == WEIGHT else None
            first, second, average = call.rule.places(states, None) if updates else (None, None, None)
            tasks.add(
                rule, kind=kind, N=layer.N, K=layer.K if kind == WEIGHT else 1, gather=int(layer.rows is not None),
                dz=layer.dz, x=layer.x, p=tensor, s0=first, s1=second, average=average,
                shadow=shadow, shadowed=int(shadow is not None),
            )  # fmt: skip
    for slope in call.slopes:
        first, second, average = call.rule.places(slope.state, None) if updates else (None, None, None)
        tensor, rule = (slope.param, slope.rule) if updates else (slope.grad, PLAIN)
        tasks.add(rule, kind=SLOPE, N=1, K=1, x=slope.dslope, p=tensor, s0=first, s1=second, average=average)
    return tasks


def _bind_gradients(
    device: TritonDevice,
    call: SimpleNamespace,
    *,
    updates: bool,
    norm: Tensor | None = None,
    parts: int = 1,
    part: int = 0,
) -> tuple[Run, int]:
    """The grouped launch and its number of programs."""
    tasks = _collect(device, call, updates)
    shapes = [(row["N"], row["K"]) for row in tasks.rows if row["kind"] == WEIGHT]
    tile = configs.product_tile(device.arch, "weight", device.precision, shapes, aligned=tasks.aligned, parts=parts)
    table, tensors, tiles = tasks.tables(tile.rows, tile.columns)
    programs = tiles * parts
    clocked = {} if updates else {"hyper": None, "rates": device.zeros(RATE_COLUMNS, "float64")}
    arguments = arguments_of(
        device, gradients.grad_weight_kernel, call, compute=tasks.far_base("compute"), real=tasks.far_base("real"),
        rows=_rows(call), table=table, tensors=tensors, norm=norm, wants_norm=int(norm is not None), **clocked,
        rule=device.numbers(clock.rule_values(call.rule), "float64"), partials=device.zeros(programs, "float64"),
        ticket=device.zeros(1, "int32"), tasks=len(tasks.rows), programs=programs, splits=parts, part=part,
    )  # fmt: skip
    constants = {
        **tile.sides("NKM"), "PRODUCT": device.product, "ALIGNED": tasks.aligned, "PARTS": tile.parts,
        "UPDATES": updates, "RULE": call.rule.code if updates else 0, "TASKS": configs.table_length(len(tasks.rows)),
    }  # fmt: skip
    launch = device.launch(gradients.grad_weight_kernel, programs, arguments, constants, tile)
    return keeping(call, launch, programs), programs


def keeping(call: SimpleNamespace, launch: Run, programs: int) -> Run:
    """Return a launch that keeps its operands' memory alive: the kernel has only the distances between them."""

    def run(_kept: Any = call) -> None:
        launch()

    return run if programs else launch


@binds("grad_weight")
def bind_grad_weight(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_weight``."""
    run, programs = _bind_gradients(device, call, updates=False, norm=call.norm, parts=call.parts, part=call.part)
    return call.norm.zero_ if programs == 0 and call.norm is not None else run


@binds("grad_weight_members")
def bind_grad_weight_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_weight_members``: the layers of the grouped launch are the members, whose rows lie apart.

    Biases have a launch of their own: few of them begin where the fast path of the weights needs it.
    """
    runs = []
    for wanted in ("dw", "db"):
        if getattr(call, wanted) is None:
            continue
        count = members_of(call, call.N)
        layers = [
            SimpleNamespace(
                N=call.N, K=call.K, rows=None, dz=call.dz[member::count], x=call.x[member::count],
                **{"dw": None, "db": None, wanted: getattr(call, wanted)[member * call.N :][: call.N]},
            )
            for member in range(count)
        ]  # fmt: skip
        grouped = SimpleNamespace(M=call.M // count, layers=layers, slopes=(), rule=call.rule, counters=call.counters)
        runs.append(_bind_gradients(device, grouped, updates=False)[0])
    return in_sequence(runs)


@binds("grad_weight_update")
def bind_grad_weight_update(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_weight_update``."""
    run, programs = _bind_gradients(device, call, updates=True)
    if programs:
        return run
    # nothing to train, or no elements in it: the clock goes on all the same
    return launch_clock(device, call)


@binds("clip_examples")
def bind_clip_examples(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``clip_examples``."""
    tasks, tile = _Tasks(device), configs.CLIP
    for layer in call.layers:
        tasks.add(
            PLAIN, kind=BIAS if layer.b_trained else WEIGHT, N=layer.N, K=layer.K if layer.w_trained else 0,
            gather=int(layer.rows is not None), dz=layer.dz, x=layer.x,
        )  # fmt: skip
    table, _, _ = tasks.tables(1, 1)
    arguments = arguments_of(
        device, update.clip_examples_kernel, call, compute=tasks.far_base("compute"), rows=_rows(call), table=table,
        limit=device.numbers([call.clip], "float64"), tasks=len(tasks.rows),
    )  # fmt: skip
    constants = {"BM": tile.rows, "BK": tile.columns}
    programs = -(-call.M // tile.rows)
    launch = device.launch(update.clip_examples_kernel, programs, arguments, constants, tile)
    return keeping(call, launch, programs)


@binds("update")
def bind_update(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``update``."""
    params, rule, norm, shadow, noise = call.params, call.rule, call.norm, call.shadow, call.noise
    tile = configs.SWEEP if noise is None else configs.NOISY_SWEEP
    if call.parts > MOST_PARTS and noise is None:
        tile = configs.PARTS_SWEEP
    before: list[Run] = []
    if norm is None and (rule.clip_norm is not None or call.scaled):
        norm = device.zeros(1, "float64")
        before.append(_bind_norm(device, call.grads, norm))
    tasks = _Tasks(device)
    for segment in call.segments:
        # without gaps any width will do
        columns, pitch = segment.columns or tile.columns, segment.pitch or tile.columns
        tasks.add(segment.rule, kind=SEGMENT, N=segment.size, K=columns, p=segment.offset, p_row=pitch)
    table, tensors, programs = tasks.tables(tile.columns, LARGEST_INDEX)
    if programs == 0:
        return launch_clock(device, call, scaled=call.scaled)
    first, second, average = rule.places(call.states, params)
    arguments = arguments_of(
        device, update.update_kernel, call, parameters=params, first=first, second=second, average=average,
        shadow=params if shadow is None else shadow, shadowed=int(shadow is not None), norm=norm, table=table,
        tensors=tensors, rule=device.numbers(clock.rule_values(rule, scaled=call.scaled), "float64"),
        ticket=device.zeros(1, "int32"), tasks=len(tasks.rows), programs=programs,
    ) | _noise(device, noise or Noise(0.0, 1.0, 0))  # fmt: skip
    constants = {
        "BLOCK": tile.columns, "RULE": rule.code, "TASKS": configs.table_length(len(tasks.rows)),
        "NOISY": noise is not None, "MANY": tile.rows,
    }  # fmt: skip
    return in_sequence([*before, device.launch(update.update_kernel, programs, arguments, constants, tile)])


def _noise(device: TritonDevice, noise: Noise) -> dict[str, Any]:
    """The arguments of noise."""
    low, high = seed_key(noise.seed)
    numbers = device.numbers([noise.deviation, noise.divisor], "float64")
    return {"noise": numbers, "key0": signed(low), "key1": signed(high)}


def _rows(call: SimpleNamespace) -> Tensor | None:
    """The row numbers of the layer that takes its rows of the batch by them."""
    return next((layer.rows for layer in call.layers if layer.rows is not None), None)


def _bind_norm(device: TritonDevice, grads: Tensor, norm: Tensor) -> Run:
    tile = configs.SWEEP
    programs = tile.count(1, grads.numel())
    arguments = {
        "grads": grads, "norm": norm, "partials": device.zeros(programs, "float64"),
        "ticket": device.zeros(1, "int32"), "size": grads.numel(), "programs": programs,
    }  # fmt: skip
    return device.launch(update.norm_kernel, programs, arguments, {"BLOCK": tile.columns}, tile)
