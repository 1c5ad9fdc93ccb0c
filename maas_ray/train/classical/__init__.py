"""Training with scikit-learn in one Ray task. The result is an ONNX graph without scikit-learn or pickle."""
