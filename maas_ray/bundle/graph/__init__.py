"""Static checks of ONNX graphs: inspection, hazards, external data, local functions."""
