"""Wire formats: bytes to tensors and back. Know no model, no batcher and no HTTP server."""
