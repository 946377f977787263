"""Every two options meet in one of some runs (`options_table`): the second half of these."""

import pytest
from options_table import check, described, prepared_discs, table


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return prepared_discs(tmp_path_factory.mktemp("discs"))


@pytest.mark.parametrize("row", table()[1::2], ids=described)
def test_a_run_learns_under_both_strategies_alike_and_survives_a_kill(row, discs, tmp_path):
    check(row, *discs, tmp_path)
