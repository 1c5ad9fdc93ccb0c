"""A Keras 3 model for jobs/specs/keras.yaml; `pip install keras` first. It runs on Keras' torch backend."""

import keras


class KerasConvnet(keras.Sequential):
    """Two convolutions on images [1, height, width].

    Args:
        input_shape: shape of one row; passed by maas-ray.
        num_outputs: logits per row; passed by maas-ray.
        width: channels of the first convolution.
        dropout: share of values zeroed before the last layer.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, width: int = 16, dropout: float = 0.1) -> None:
        layers = keras.layers
        super().__init__(
            [
                layers.Input(input_shape),
                layers.Permute((2, 3, 1)),  # Keras has channels last
                layers.Conv2D(width, 3, padding="same", use_bias=False),
                layers.BatchNormalization(momentum=0.9),  # the default of 0.99 needs hundreds of steps
                layers.ReLU(),
                layers.Conv2D(2 * width, 3, strides=2, activation="relu"),
                layers.Flatten(),
                layers.Dropout(dropout, seed=0),  # seeded, so that every checkpoint contains its state
                layers.Dense(num_outputs),
            ]
        )
