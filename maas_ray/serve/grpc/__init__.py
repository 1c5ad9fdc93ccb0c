"""The Open Inference Protocol v2 over gRPC: the same handler as over HTTP, another wire."""
