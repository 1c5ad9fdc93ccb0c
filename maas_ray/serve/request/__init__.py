"""Inference requests between protocol and model: request head, life cycle, and response. Independent of sockets."""
