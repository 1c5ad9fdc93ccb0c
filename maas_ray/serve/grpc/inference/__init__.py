"""Inference over gRPC: messages and tensors, one request in progress, and streams of requests."""
