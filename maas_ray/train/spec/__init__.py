"""The specs of a training run: fields and validation, without torch."""
