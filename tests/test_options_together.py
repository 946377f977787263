"""Every two options meet in one of some runs (`options_table`).

All of them take a quarter of an hour (`JAXUNET_ALL_OPTIONS=1`, and pytest on this file). The
suite has two.
"""

import os

import pytest
from options_table import check, described, prepared_discs, table

ROWS = table() if os.environ.get("JAXUNET_ALL_OPTIONS") else table()[2:4]


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return prepared_discs(tmp_path_factory.mktemp("discs"))


@pytest.mark.parametrize("row", ROWS, ids=described)
def test_a_run_learns_under_both_strategies_alike_and_survives_a_kill(row, discs, tmp_path):
    check(row, discs, tmp_path)
