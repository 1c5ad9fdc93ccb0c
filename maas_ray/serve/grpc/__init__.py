"""The Open Inference Protocol v2 over gRPC, with the same request handler as HTTP."""
