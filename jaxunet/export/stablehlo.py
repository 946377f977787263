"""A trained model as StableHLO, by `jax.export`: for a CPU, a CUDA GPU and a TPU at once."""

import dataclasses
import json
from collections.abc import Mapping

import jax

from jaxunet.export.program import image_shape, program_of
from jaxunet.model.portable import portable
from jaxunet.runs.loading import TrainedModel

PLATFORMS = ("cpu", "cuda", "tpu")


def make_stablehlo(model: TrainedModel, metadata: Mapping[str, str]) -> bytes:
    """The model's probabilities as a file that JAX alone reads:

        program = jax.export.deserialize(bytearray(Path("unet.stablehlo").read_bytes()))
        probabilities = program.call(images)  # uint8 [batch, size, size, 3], any batch
        json.loads(program.fun_name)          # `metadata`

    JAX promises to read it for six months: https://docs.jax.dev/en/latest/export/export.html
    """
    with portable():
        exported = jax.export.export(jax.jit(program_of(model)), platforms=PLATFORMS)(
            image_shape(model, "batch")
        )
    named = dataclasses.replace(exported, fun_name=json.dumps(dict(metadata)))
    return bytes(named.serialize())
