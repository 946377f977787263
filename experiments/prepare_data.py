"""Check a dataset and store it for training: `prepare_data.py DATASET --data.dir DIR`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import parse, run_script

from jaxunet.config import DataConfig
from jaxunet.data import prepare
from jaxunet.errors import ConfigError

DATASETS = get_args(get_type_hints(DataConfig)["name"])


@dataclass(frozen=True)
class Arguments:
    data: DataConfig


def main() -> None:
    words = sys.argv[1:]
    name = words.pop(0) if words and not words[0].startswith("-") else None
    if name is not None and name not in DATASETS:
        raise ConfigError(f"DATASET is {name!r}, but must be one of {', '.join(DATASETS)}.")
    chosen = ["--data.name", name] if name else []
    described = f"Check and prepare a dataset. DATASET is one of {', '.join(DATASETS)}."
    arguments = parse(Arguments, described, args=[*chosen, *words])
    data = prepare(arguments.data)
    for split, count in data.counts.items():
        official = data.official_counts.get(split)
        note = f" (not the official {official})" if official not in (None, count) else ""
        print(f"{split}: {count} images{note}")
    print(f"Prepared: {data.directory} (fingerprint {data.fingerprint})")


if __name__ == "__main__":
    run_script(main)
