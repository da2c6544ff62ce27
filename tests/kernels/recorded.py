"""Record the launches of the Triton backend for whole training steps, without starting them.

As a script, without Triton's interpreter, it compares each launch's types, as Triton's JIT finds them from the
arguments, with those that ``kernel_variants`` compiles for, and prints the differences.
"""

import sys

import kernel_launches
import kernel_variants
import numpy as np

from fusemlp import DPSGD, MLP, PGD, SGD, Adam, CrossEntropy, Engine, Frequency, Residual
from fusemlp.program.builder import Inputs
from fusemlp.runtime.steps import TrainingStep, bind
from fusemlp_kernels.triton import configs

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def launches(target, precision):
    """Return the launches of a step of several networks on ``target``."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 40)
    weights = rng.uniform(0.5, 2, 40)
    wide = rng.integers(0, 600, 2048)
    with kernel_launches.recording(target, precision) as found:
        for net, batch, y, options in (
            (MLP([6, 9, 7, 4], activation="prelu", dropout=0.2), 40, labels, {"optimizer": Adam()}),
            (MLP([6, 200], activation="gelu"), 40, labels, {"optimizer": SGD(momentum=0.9)}),
            (MLP([6, 30, 4]), 40, labels, {"loss": CrossEntropy(class_weight=[1, 2, 1, 1]), "optimizer": SGD()}),
            (MLP([6, 17, 100]), 40, rng.standard_normal((40, 100)), {"loss": "mse", "optimizer": SGD(clip_norm=1.0)}),
            (MLP([6, 9, 300]), 40, rng.standard_normal((40, 300)), {"loss": "mae", "optimizer": Adam(accumulate=2)}),
            (MLP([2048, 1024, 600]), 2048, wide, {"optimizer": Adam()}),
            (MLP([6, *[8] * 10, 4]), 40, labels, {"optimizer": Adam()}),
        ):
            engine = Engine(net, batch_size=batch, backend="triton", precision=precision, plan="eager", **options)
            x = rng.standard_normal((batch, net.sizes[0]))
            engine.step(x, y)
            if batch == 40:
                engine.step(x, y, weights)
        for net, options in (
            (MLP([6, 9, 4]), {"adversarial": PGD(0.1)}),
            (MLP([6, 9, 7, 4], dropout=0.2, members=3), {}),
            (MLP([6, 9, Residual(7), 4], dropout=0.2, norm="layer"), {}),
        ):
            engine = Engine(net, batch_size=20, backend="triton", precision=precision, plan="eager")
            engine.fit(rng.standard_normal((40, 6)), labels, epochs=1, **options)
        engine = Engine(MLP([6, 9, 4], encoding=Frequency(3)), backend="triton", precision=precision, plan="eager")
        engine.fit(rng.standard_normal((40, 6)), labels, epochs=1)
        engine.input_gradient(rng.standard_normal((40, 6)), labels)
        arch = configs.Architecture(configs.family_of(target), 132)
        if configs.narrow_tile(arch, precision) is not None:
            engine = Engine(MLP([32, 64, 16]), batch_size=20, backend="triton", precision=precision, plan="narrow")
            engine.fit(rng.standard_normal((40, 32)), np.arange(40) % 16, epochs=1)
            engine.predict(rng.standard_normal((40, 32)))
        if "card" in configs.TABLES[arch.family] and precision in kernel_variants.RESIDENT_PRECISIONS:
            for loss in ("cross_entropy", "mse"):
                engine = Engine(MLP([6, 9, 4]), loss, batch_size=20, backend="triton", precision=precision, plan="card")
                targets = labels if loss == "cross_entropy" else rng.standard_normal((40, 4))
                engine.fit(rng.standard_normal((40, 6)), targets, epochs=1)
        if arch.family in configs.CHIP and precision in kernel_variants.RESIDENT_PRECISIONS:
            engine = Engine(MLP([64, 32, 10]), batch_size=32, backend="triton", precision=precision, plan="chip")
            engine.fit(rng.standard_normal((40, 64)), np.arange(40) % 10, epochs=1)
        if precision in kernel_variants.RESIDENT_PRECISIONS:
            for net in (MLP([6, 9, 4], dropout=0.2), MLP([6, 100, 90])):
                options = {"backend": "triton", "precision": precision, "plan": "resident"}
                Engine(net, batch_size=20, **options).fit(rng.standard_normal((40, 6)), labels, epochs=1)
            # a step of its own: the accountant's library need not be here
            engine = Engine(MLP([6, 9, 4]), batch_size=20, **options | {"plan": "eager", "privacy": DPSGD(1.0)})
            data = {"x": rng.standard_normal((20, 6)), "target": labels[:20]}
            arrays = {
                name: engine.memory.backend.from_host(array, {"x": "compute"}.get(name)) for name, array in data.items()
            }
            inputs = Inputs(20, indexed=True)
            training = TrainingStep(inputs, engine.loss.spec(accuracy=True), engine.optimizer.rule(), 20)
            bind(engine, training, arrays).run()
    return found


def different(target, precision):
    """Return the differences in types or properties of the arguments between Triton's JIT and ``kernel_variants``."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler = make_backend(kernel_variants.gpu_target(target))
    found = []
    for launch in launches(target, precision):
        kernel = launch.kernel
        binder = create_function_from_signature(kernel.signature, kernel.params, compiler)
        options = configs.launch_options(configs.family_of(target), launch.tile)
        given = {**launch.arguments, **launch.constants, **options}
        bound, kinds, rest = binder(**given)
        _, signature, constants, attributes = kernel._pack_args(compiler, given, bound, kinds, rest)
        source = kernel_variants.source(launch.variant(precision), target)
        attributes = {place: value for place, value in attributes.items() if value}
        for what, launched, ahead in (
            ("signature", signature, source.signature),
            ("constants", constants, source.constants),
            ("attributes", attributes, source.attrs),
        ):
            if launched != ahead:
                keys = [key for key in {*launched, *ahead} if launched.get(key) != ahead.get(key)]
                parts = ", ".join(f"{key}: {launched.get(key)} launched, {ahead.get(key)} ahead" for key in keys)
                found.append(f"{launch.name} {precision} {launch.tile}: {what}: {parts}")
    return found


if __name__ == "__main__":
    asked = [(target, precision) for target in sys.argv[1:] for precision in PRECISIONS]
    for line in dict.fromkeys(line for each in asked for line in different(*each)):
        print(line)
