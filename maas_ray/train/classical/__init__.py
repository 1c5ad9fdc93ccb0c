"""Training with scikit-learn: one Ray task, whose result is an ONNX graph that needs no scikit-learn and no pickle."""
