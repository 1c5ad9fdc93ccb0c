"""Exports a torch module with its preprocessing to ONNX, and verifies the export. Independent of runs and stores."""
