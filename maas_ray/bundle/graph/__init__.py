"""An ONNX graph before anything runs it: inspection, hazards, external data, local functions."""
