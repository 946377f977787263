"""Every broken input of the table gives what the documentation says, or one paragraph that
names the file or the argument, what was found and what to do; nothing is harmed by it."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import rows_datasets
import rows_options
import rows_pictures
import rows_runs
from ground import World, run
from rows import Refused, Row

ROWS = [*rows_pictures.ROWS, *rows_datasets.ROWS, *rows_options.ROWS, *rows_runs.ROWS]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input(
    row: Row, world: World, record_property: Callable[[str, object], None]
) -> None:
    record_property("input", row.name)
    words = row.command(world)
    before = world.snapshot()

    with row.circumstance(world):
        status, output = run(words)

    message = output[max(0, output.find("error: ")) :].split("For full helptext")[0].strip()
    paragraph = re.sub("-{4,}", "", message.replace(f"{world.path}/", ""))
    paragraph = " ".join(paragraph.split())
    after = world.snapshot()
    assert "Traceback" not in output
    assert {name: after.get(name) for name in before} == before
    if isinstance(row.outcome, Refused):
        assert status == row.outcome.status, output
        assert re.search(row.outcome.message, paragraph), message
        if status == 1:
            assert message.startswith("error: "), message
            assert "\n\n" not in message
        locks = (".lock", ".jaxunet-lock")  # of prepared data and of a run
        new = {name for name in after.keys() - before.keys() if Path(name).name not in locks}
        assert not {name for name in new if name.split("/")[0] != row.outcome.leaves}
        record_property("outcome", "refused")
        record_property("message", textwrap.shorten(paragraph, 200))
    else:
        assert status == row.outcome.status, output
        row.outcome.check(world, output)
        record_property("outcome", "taken as documented")


def test_the_table_is_whole() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names)) >= 40
