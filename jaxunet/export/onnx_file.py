"""A trained model as an ONNX file."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

from jaxunet.errors import ConfigError
from jaxunet.export.conversion import add_program
from jaxunet.export.graph import IR_VERSION, OPSET, Graph, Name, Value
from jaxunet.export.program import image_shape, program_of
from jaxunet.files import write_atomically
from jaxunet.model.portable import portable
from jaxunet.runs.loading import TrainedModel

UINT8, FLOAT = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
LARGEST = 2**31 - 1  # bytes of a protocol buffer


def make_onnx(
    model: TrainedModel, metadata: Mapping[str, str], *, native: bool = False
) -> onnx.ModelProto:
    """The model's probabilities as an ONNX model, computed in float32.

    It takes `images`, uint8 `[batch, size, size, 3]`, and gives `probabilities`, float32
    `[batch, size, size, 1]`. With `native` it takes one picture of any size, `image`, uint8
    `[height, width, 3]`, and gives `probability`, float32 `[height, width]`: it is resized as
    `experiments/predict.py` does, both ways.

    Raises:
        ConfigError: the model has an operation without a form in ONNX, or is too large.
    """
    graph = Graph()
    side = model.config.data.image_size
    images = _resized(graph, side) if native else Name("images")
    with portable():
        program = jax.make_jaxpr(program_of(model, "float32"))(
            image_shape(model, 1 if native else "batch")
        )
    (result,) = add_program(graph, program, [images])
    if native:
        result = _at_size(graph, result)
        given = _value("image", UINT8, "height", "width", 3)
        gives = _value("probability", FLOAT, "height", "width")
    else:
        given = _value("images", UINT8, "batch", side, side, 3)
        gives = _value("probabilities", FLOAT, "batch", side, side, 1)
    graph.nodes.append(helper.make_node("Identity", [graph.name_of(result)], [gives.name]))
    graph.prune([gives.name])
    made = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "jaxunet",
            [given],
            [gives],
            [numpy_helper.from_array(array, key) for key, array in graph.arrays.items()],
        ),
        producer_name="jaxunet",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(made, dict(metadata))
    if made.ByteSize() > LARGEST:
        raise ConfigError(
            f"This model is {made.ByteSize() / 1e9:.1f} GB, but an ONNX file holds 2.1. "
            "--format stablehlo has no such limit."
        )
    return made


def _value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def write_onnx(made: onnx.ModelProto, path: Path) -> None:
    """Checked by ONNX itself, and written atomically."""
    onnx.checker.check_model(made, full_check=True)
    write_atomically(path, made.SerializeToString())


def _resized(graph: Graph, side: int) -> Name:
    """The picture as the model sees it: bilinear with antialiasing, rounded, as Pillow does."""
    picture = graph.add("Unsqueeze", Name("image"), np.array([0], np.int64))
    channels_first = graph.add("Transpose", picture, perm=(0, 3, 1, 2))
    sizes = np.array([1, 3, side, side], np.int64)
    return graph.add("Transpose", _resize(graph, channels_first, sizes), perm=(0, 2, 3, 1))


def _at_size(graph: Graph, probabilities: Value) -> Name:
    """[1, side, side, 1] at the picture's own size, [height, width]."""
    channels_first = graph.add("Transpose", probabilities, perm=(0, 3, 1, 2))
    own = graph.add("Shape", Name("image"), end=2)
    sizes = graph.add("Concat", np.array([1, 1], np.int64), own, axis=0)
    return graph.add("Reshape", _resize(graph, channels_first, sizes), own)


def _resize(graph: Graph, x: Name, sizes: Name | np.ndarray) -> Name:
    nothing = Name("")  # no region of interest, no scales
    return graph.add(
        "Resize", x, nothing, nothing, sizes, mode="linear", antialias=1, exclude_outside=1
    )
