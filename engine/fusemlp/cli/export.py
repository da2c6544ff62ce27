"""``fusemlp export``: the model of a run for other programs."""

from __future__ import annotations

from collections.abc import Callable

from fusemlp.cli.options import ExportOptions
from fusemlp.cli.output import check_output, show
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.engine import Engine, load
from fusemlp.report.onnx import onnx_bytes
from fusemlp.report.onnx_features import has_words
from fusemlp.report.runs import open_run, weights_path
from fusemlp.runtime.files import write_atomically
from fusemlp.training.saving import model_bytes
from fusemlp_kernels.errors import ArgumentError


def export(options: ExportOptions) -> None:
    """Write the requested files, and print the inputs and outputs of their models."""
    bare = options.bare
    files = {"onnx": options.onnx, "safetensors": options.safetensors}
    wanted = {argument: file for argument, file in files.items() if file is not None}
    if not wanted:
        raise ArgumentError("onnx: say what to write: --onnx FILE, --safetensors FILE, or both")
    if bare and "onnx" not in wanted:
        raise ArgumentError("bare: it is for --onnx FILE; a safetensors file never holds the scaling of the features")
    for argument, file in wanted.items():
        check_output(argument, file, (f".{argument}",), force=options.force)
    run, config = open_run(options.run)
    preprocessor = Preprocessor.from_config(config["preprocessor"])
    # Any machine can export: 16-bit precisions have float32 parameters too.
    precision = "fp64" if config["precision"] == "fp64" else "fp32"
    engine = load(weights_path(run, options.weights), backend="numpy", precision=precision)
    about = {"preprocessor": preprocessor.to_json()}
    contents: dict[str, Callable[[], bytes]] = {
        "onnx": lambda: onnx_bytes(engine, None, about) if bare else onnx_bytes(engine, preprocessor),
        "safetensors": lambda: model_bytes(engine, about),
    }
    # Make both before writing either.
    made = {argument: contents[argument]() for argument in wanted}
    lines = []
    for argument, file in wanted.items():
        write_atomically(file, made[argument])
        lines += [f"{argument} {file}", f"  {_inputs(engine, preprocessor, scaled=bare or argument == 'safetensors')}"]
    shown = {
        "run": str(options.run),
        "weights": options.weights,
        **{argument: None if file is None else str(file) for argument, file in files.items()},
        "onnx_input": None if "onnx" not in wanted else _kind_of_input(preprocessor, bare=bare),
    }
    show(shown, lines, as_json=options.as_json)


def _kind_of_input(preprocessor: Preprocessor, *, bare: bool) -> str:
    return "scaled columns" if bare else "one input a feature" if has_words(preprocessor) else "features"


def _inputs(engine: Engine, preprocessor: Preprocessor, *, scaled: bool) -> str:
    """Return one line on the inputs and outputs of the exported model."""
    width = engine.network.sizes[0] if scaled else len(preprocessor.feature_names)
    answers = "values" if preprocessor.classes is None else "labels"
    if not scaled:
        units = "in original units" if preprocessor.classes is None else "of the data"
        features = zip(preprocessor.feature_names, preprocessor.sources, strict=True)
        named = ", ".join(repr(name) for name, source in features if name != source)
        dates = f", but of dates {named}" if named else ""
        each = ", an input (rows, 1) for each, words as strings" if has_words(preprocessor) else ""
        return f"takes the {width} features as they are in the data{dates}{each}, gives {answers} {units}"
    if preprocessor.classes is None:
        gives = "values as the run scales them"
    else:
        gives = "a value for each class" if preprocessor.one_hot_targets else "class indices"
    return (
        f"takes {width} columns as the run scales them ({preprocessor.scale}), gives {gives}; "
        "its metadata entry 'preprocessor' has the scaling"
    )
