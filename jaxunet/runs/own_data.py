"""The data that a model was trained on, found again."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxunet.config import DataConfig
from jaxunet.data import Prepared, prepare
from jaxunet.devices import distributed
from jaxunet.errors import DataError
from jaxunet.runs.evaluation import describe_split
from jaxunet.runs.loading import TrainedModel
from jaxunet.runs.record import other_data, recorded_fingerprint


def own_split(
    model: TrainedModel,
    split: str,
    *,
    advice: str,
    given: DataConfig | None = None,
    show_progress: bool = True,
) -> tuple[Prepared, dict[str, Any]]:
    """The data of a model's runs, and what describes a split of them.

    Args:
        advice: a sentence that ends the error.
        given: where a user says that data are now: taken if they are those that the first run
            was trained on, else looked for where it had them.

    Raises:
        DataError: they have changed, are others for one of the runs, or have no such split.
    """
    own, runs = model.config.data, [member.run for member in model.members]
    recorded = recorded_fingerprint(runs[0])

    def prepared(place: DataConfig) -> Prepared:
        return distributed.main_first(
            lambda: prepare(place, progress=show_progress, recorded=recorded),
            "preparing the data",
        )

    place = own
    if given:  # at another size the same data would be others
        place = replace(given, image_size=own.image_size, stored_size=own.stored_size)
    data = prepared(place)
    if place != own and data.fingerprint != recorded:
        place, data = own, prepared(own)
    dataset = describe_split(data, split, place.image_size)

    def differing(run: Path) -> str | None:
        return other_data(run, dataset, place)

    for run in runs:
        if said := distributed.on_main(partial(differing, run), "comparing the data"):
            raise DataError(f"{said} {advice}")
    return data, dataset
