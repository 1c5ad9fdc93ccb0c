"""The device mesh: data, tensor and pipeline parallelism of one model."""
