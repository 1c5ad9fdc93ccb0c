"""Running a graph with onnxruntime, and knowing how long a run takes."""
