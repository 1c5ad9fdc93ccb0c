"""Runs graphs with onnxruntime, and estimates how long a run takes."""
