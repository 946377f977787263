"""PyTorch's pickles, `.pth` and `.pt`, from strangers.

They run no code: `torch.load(weights_only=True)` makes tensors and plain containers and refuses
everything else. What is asked of it is looked at before, for it makes as much memory as a
number in the file says.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxunet.errors import ConfigError, DataError, shown

# What a pickle of tensors and plain containers asks for. `torch.load` allows more, of which
# some make as much memory as a number says: bytearray, or a stretched tensor cast to a type.
_PLAIN_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|(__builtin__|builtins) set"
    r"|torch\._utils _rebuild_(tensor(_v[23])?|parameter)|torch(\.storage)? \w+(?<!Tensor)"
)
_LEGACY_PICKLES = 5  # before torch 1.6: magic, protocol, system, the object, storage keys


def torch_module() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            "PyTorch is not installed, and these weights need it. Install the extra [torch]: "
            "python -m pip install -e '.[torch]'."
        ) from error
    return torch


def read_pickle(path: Path, contents: bytes) -> Mapping[Any, Any]:
    """The dictionary that a file holds, with tensors of PyTorch's in it.

    Raises:
        DataError: it is no such file, damaged, would run code, or would unpack to more than
            its length.
        ConfigError: the extra `[torch]` is not installed.
    """
    torch = torch_module()
    try:
        reason = _unfit(contents)
        if not reason:
            found = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can make it raise anything
        # Not PyTorch's own message, which says how to load the file in spite of it.
        raise _not_loaded(path, "it is none, or damaged") from error
    if reason:
        raise _not_loaded(path, reason)
    if not isinstance(found, Mapping):
        raise DataError(f"{path} holds a {type(found).__name__}, not a state_dict.")
    return found


def _not_loaded(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} was not loaded as a PyTorch weight file: {reason}. Ask for a "
        ".safetensors, or, if you trust it, save its weights alone with "
        "torch.save(model.state_dict(), FILE)."
    )


def _unfit(contents: bytes) -> str:
    """Why `torch.load` is not to have this file; nothing if it may.

    Raises:
        ValueError, zipfile.BadZipFile: it is no such file, or damaged.
    """
    pickles: list[io.BytesIO] = []
    if contents.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(io.BytesIO(contents))
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > len(contents):
            return (
                f"its {len(contents)} bytes would unpack to {unpacked}, and torch.save "
                "compresses nothing"
            )
        # PyTorch's reader of archives looks names up without regard to case.
        names = [member.filename.lower() for member in members]
        if any(name.endswith("/constants.pkl") for name in names):
            return "it is a TorchScript archive"
        pickles = [
            io.BytesIO(archive.read(member))
            for name, member in zip(names, members, strict=True)
            if name.endswith("data.pkl")
        ]
    else:
        pickles = [io.BytesIO(contents)] * _LEGACY_PICKLES  # each read on from the one before
    for pickled in pickles:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and not _PLAIN_GLOBALS.fullmatch(str(argument)):
                wanted = shown(str(argument).replace(" ", "."))
                if wanted.startswith("torch."):
                    return f"it holds more than plain tensors ({wanted})"
                return f"it would run code ({wanted})"
    return ""
