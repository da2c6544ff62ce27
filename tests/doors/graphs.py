"""Run an ONNX graph of one input."""

import numpy as np
import onnx
import onnxruntime


def graph_outputs(path, X):
    """Return the outputs of a graph by name; check its structure, and the name and shape of its input."""
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("x", ["rows", X.shape[1]])
    X = X.astype({"tensor(float)": np.float32, "tensor(double)": np.float64}[given.type])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": X}), strict=True))
