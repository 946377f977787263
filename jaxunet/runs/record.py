"""What a run has recorded, read back: its configuration, its data, its metrics."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxunet.config import Config, DataConfig
from jaxunet.config_json import from_dict, to_dict
from jaxunet.devices.distributed import on_main
from jaxunet.errors import ConfigError, RunError
from jaxunet.provenance import disagreement


def read_record(run: Path) -> dict[str, Any]:
    """All that a run's config.json holds; `run` may be such a file.

    Raises:
        RunError: `run` is no run directory.
        ConfigError: its config.json is damaged.
    """
    path = run if run.suffix == ".json" else run / "config.json"
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{run} is not a run directory: {path.name} is not there or not readable. "
            "Give the --out of an earlier experiments/train.py."
        ) from error
    try:
        record = json.loads(contents)
        if not isinstance(record, dict) or "config" not in record:
            raise ConfigError("There is no field 'config'.")
        return record
    except (ValueError, RecursionError) as error:
        raise _not_a_configuration(run, error) from error


def load_config(run: Path) -> Config:
    """The configuration a run was made with.

    Raises:
        RunError: `run` is no run directory.
        ConfigError: its config.json is damaged or was edited into something not allowed.
    """
    record = read_record(run)
    try:
        return from_dict(Config, _with_earlier_meaning(record["config"]))
    except (ValueError, OverflowError, RecursionError) as error:
        raise _not_a_configuration(run, error) from error


def _not_a_configuration(run: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{run / 'config.json'} is not a run's configuration: {str(error).rstrip('.')}. Undo "
        "what was changed in it; a copy is in progress/metadata of each "
        f"{run / 'checkpoints'}/STEP."
    )


def _with_earlier_meaning(config: Any) -> Any:
    """A recorded configuration with what it meant by fields that its version lacked."""
    data = config.get("data") if isinstance(config, dict) else None
    if isinstance(data, dict) and data.get("name") == "folder":
        return {**config, "data": {"folder_split": "permutation", **data}}
    return config


def config_of_main(read: Callable[[], Config]) -> Config:
    """The configuration that process 0 reads, on every process."""
    return from_dict(Config, on_main(lambda: to_dict(read()), "reading the configuration"))


def recorded_dataset(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's record says of its data: the last that it was trained on, or nothing."""
    accepted = record.get("accepted_data") or [{}]
    found = accepted[-1].get("dataset") or record.get("dataset")
    return found if isinstance(found, dict) else {}


def recorded_tuning(run: Path) -> dict[str, Any]:
    """How a GPU's algorithms were chosen for `run`; empty where nothing says it.

    It is asked for before the devices start, and so before processes know each other.
    """
    if not (run / "config.json").exists():
        return {}
    found = read_record(run).get("tuning")
    return found if isinstance(found, dict) else {}


def recorded_fingerprint(run: Path) -> str | None:
    """The fingerprint of the data that `run` was trained on; None where nothing says it.

    `jaxunet.data.prepare` finds the prepared data by it when their source is gone.
    """

    def read() -> str | None:
        if not (run / "config.json").exists():
            return None
        return recorded_dataset(read_record(run)).get("fingerprint")

    return on_main(read, "reading the run's record")


def other_data(run: Path, dataset: Mapping[str, Any], data: DataConfig) -> str | None:
    """None if `dataset` is what `run` was trained on, else a sentence that says what changed.

    Args:
        dataset: what `jaxunet.runs.evaluation.describe` gives, of any split.
        data: where it comes from.
    """
    record = read_record(run)
    recorded = recorded_dataset(record)
    known = dict(dataset)
    split = recorded.get("split")
    if "counts" not in recorded and split in known.get("counts", {}):
        # Records of version 0.1 have the training split's count alone.
        recorded = recorded | {"counts": {split: recorded["count"]}}
        known["counts"] = {split: known["counts"][split]}
    of_the_data = ("name", "fingerprint", "counts", "stored_size")
    return disagreement(
        {name: recorded.get(name) for name in of_the_data},
        {name: known.get(name) for name in of_the_data},
        recorded=f"{run}, which was trained on {_source(load_config(run).data)},",
        there=f"the data of {_source(data)}",
    )


def _source(data: DataConfig) -> str:
    return data.name if data.dir is None else f"{data.name} from {data.dir}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; one cut off by a kill is left out.

    Raises:
        RunError: a line is no JSON object.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(
                f"Line {number} of {path} is no JSON object: {error}. Undo what was changed in "
                "it, or move the file away, and the log starts anew."
            ) from error
    return lines
