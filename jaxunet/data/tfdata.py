"""The tf.data pipeline; the one file that imports TensorFlow."""

from collections.abc import Iterator

import numpy as np

from jaxunet.data.reader import PREFETCHED_BATCHES, THREADS, BatchReader, HostBatch
from jaxunet.errors import ConfigError

try:
    import tensorflow as tf
except ImportError as error:
    raise ConfigError(
        "data.loader is 'tfdata', which needs TensorFlow: "
        "python -m pip install -e '.[tf]', or use --data.loader grain."
    ) from error


def iterate(reader: BatchReader, start: int, stop: int) -> Iterator[HostBatch]:
    """Batches `start` to `stop`, read in parallel, yielded in order."""
    # TensorFlow would take the accelerator's memory, which is JAX's.
    tf.config.set_visible_devices([], "GPU")
    side = reader.image_size
    shapes = {"image": (None, side, side, 3), "mask": (None, side, side, 1), "weight": (None,)}

    failed: list[Exception] = []

    def read(batch: np.integer) -> list[np.ndarray]:
        try:
            arrays = reader(int(batch))
        except Exception as error:  # TensorFlow would make another one of it
            failed.append(error)
            raise
        return [arrays[name] for name in shapes]

    @tf.autograph.experimental.do_not_convert
    def load(batch: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        arrays = tf.numpy_function(read, [batch], [tf.uint8] * len(shapes))
        return {
            name: tf.ensure_shape(array, shape)
            for (name, shape), array in zip(shapes.items(), arrays, strict=True)
        }

    batches = tf.data.Dataset.range(start, stop).map(
        load, num_parallel_calls=THREADS, deterministic=True
    )
    try:
        yield from batches.prefetch(PREFETCHED_BATCHES).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise (failed[0] if failed else error) from None
