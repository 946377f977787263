"""The weights that a run's encoder starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxunet.config import ModelConfig
from jaxunet.pretrained.files import read_bytes, read_tensors
from jaxunet.pretrained.origin import check_origin
from jaxunet.pretrained.renaming import encoder_variables
from jaxunet.pretrained.sources import SOURCES, digest


@dataclass(frozen=True)
class StartingWeights:
    """What an encoder starts from.

    Attributes:
        variables: `params` and `batch_stats` of the encoder.
        record: source, SHA-256 and licence, for a run's config.json.
    """

    variables: dict[str, Any]
    record: dict[str, str]


def with_encoder(variables: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """A network's variables with those of `encoder` in the place of its own."""
    return {
        collection: {**values, "encoder": encoder[collection]}
        for collection, values in variables.items()
    }


def starting_weights(config: ModelConfig) -> StartingWeights | None:
    """What `config.weights` names; None for `none`.

    Raises:
        ConfigError: a package that is needed is not installed.
        DataError: the file can't be read, or doesn't hold this encoder's weights.
    """
    if config.weights == "none":
        return None
    if isinstance(config.weights, Path):
        origin, path, source = None, config.weights, config.weights.name
    else:
        origin = SOURCES[config.encoder]
        path, source = origin.find()
    contents = read_bytes(path)
    sha256 = digest(contents)
    if origin:
        origin.check(path, sha256)
    variables = encoder_variables(config.encoder, read_tensors(path, contents), str(path))
    if not origin:
        check_origin(config.encoder, variables, path, sha256)
    licence = origin.licence if origin else "not recorded in a file"
    return StartingWeights(variables, {"source": source, "sha256": sha256, "licence": licence})
