"""Models in forms that other runtimes run: ONNX and StableHLO."""
