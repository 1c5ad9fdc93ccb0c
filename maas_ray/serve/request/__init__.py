"""An inference request between a protocol and a model: its head, its life, and its response. No socket, no bytes."""
