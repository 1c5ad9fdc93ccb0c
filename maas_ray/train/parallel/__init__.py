"""Data, tensor and pipeline parallelism of one model on a device mesh."""
