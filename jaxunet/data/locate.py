"""From a `DataConfig` to the source files that it speaks of, and their fingerprint."""

from jaxunet.config import DataConfig
from jaxunet.data import folder, isic2018
from jaxunet.data.sources import SourcePairs
from jaxunet.errors import DataError


def locate(config: DataConfig) -> tuple[SourcePairs, str]:
    """The source files in `data.dir`, and the fingerprint of what is prepared from them.

    The fingerprint is the same wherever the files lie, zipped or not, and changes with their
    contents, their splits, `data.binarize` and `data.ignore_value`.

    Raises:
        SourceGone: nothing of the dataset is there.
        DataError: the source cannot be read, or not in one way only.
    """
    assert config.dir is not None
    root = config.dir.expanduser()
    try:
        source = isic2018.find(root) if config.name == "isic2018" else folder.find(root, config)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    ignores = () if config.ignore_value is None else ("ignore_value", config.ignore_value)
    return source.read_as(config), source.fingerprint(config.binarize, *ignores)
