"""What a training leaves for people: run folders, metrics, plots, ONNX."""
