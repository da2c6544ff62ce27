"""The reports of a training: run folders, metrics, plots, ONNX."""
