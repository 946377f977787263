"""Checkpoints under what file systems, kills and other processes do to them."""

import errno
import json
import os
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxunet.config import Config, ModelConfig
from jaxunet.errors import RunError
from jaxunet.learning.steps import init_state, make_recipe
from jaxunet.runs import checkpoint
from jaxunet.runs.checkpoint import Checkpoints
from jaxunet.runs.integrity import checksum_of

LIKE = jax.eval_shape(
    partial(init_state, make_recipe(Config(model=ModelConfig(width=2, depth=2)), 1))
)


def state(step, value=0.5):
    """A training state of made-up numbers."""
    made = jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), LIKE)
    return replace(made, step=np.int32(step))


def saved(folder, *steps):
    """A directory with a checkpoint without scores at each of `steps`."""
    checkpoints = Checkpoints(folder, "dice")
    for step in steps:
        checkpoints.save(state(step), {"at": step})
        checkpoints.wait()
    return checkpoints


def latest(folder):
    checkpoints = Checkpoints(folder, "dice", read_only=True)
    try:
        step, found, progress = checkpoints.restore("latest", LIKE)
        np.testing.assert_array_equal(jax.tree.leaves(found.params)[0], 0.5)
        return step, progress["at"]
    finally:
        checkpoints.close()


def test_scores_that_come_later_are_added_to_the_checkpoint_of_their_step(tmp_path):
    checkpoints = saved(tmp_path, 2)
    for step, dice in ((3, 0.5), (4, 0.7), (5, 0.2)):
        checkpoints.save(state(step), {"at": step})
        checkpoints.save(state(step), {"at": -step}, {"dice": dice})
    assert checkpoints.steps() == [4, 5]  # the latest two, of which one is the best
    assert checkpoints.step_of("best") == 4
    assert checkpoints.restore("latest", LIKE)[2] == {"at": -5}
    checkpoints.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_save_that_fails_leaves_the_checkpoint_that_stood_there(
    number, writes, tmp_path, monkeypatch
):
    """On a full disk, or killed: a kill is a write after which nothing comes."""
    checkpoints = saved(tmp_path, 3)
    real, left = os.fsync, [writes]

    def fail(*_args, **_options):
        left[0] -= 1
        if left[0] >= 0:
            return real(*_args)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(RunError, match=os.strerror(number)) as raised:
        checkpoints.save(state(3), {"at": -3}, {"dice": 0.5})
    assert ("Make space" in str(raised.value)) == (number == errno.ENOSPC)
    assert ("permissions" in str(raised.value)) == (number == errno.EACCES)
    monkeypatch.undo()
    assert latest(tmp_path) == (3, 3)

    checkpoints = Checkpoints(tmp_path, "dice")
    checkpoints.save(state(3), {"at": -3}, {"dice": 0.5})
    assert checkpoints.step_of("best") == 3
    checkpoints.close()
    assert latest(tmp_path) == (3, -3)


def test_another_state_is_never_put_in_place_of_one_that_was_saved(tmp_path):
    checkpoints = saved(tmp_path, 3)
    with pytest.raises(RunError, match=r"step 3 .* is of another state"):
        checkpoints.save(state(3, 0.25), {"at": 3})
    checkpoints.close()
    assert latest(tmp_path) == (3, 3)


def test_an_error_of_our_own_is_not_called_one_of_the_disk(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "checksum_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(state(4), {"at": 4})


def test_every_array_is_in_the_checksum():
    whole = checksum_of(state(3), {})
    leaves, structure = jax.tree.flatten(state(3))
    for place, leaf in enumerate(leaves):
        changed = np.array(leaf)
        changed.reshape(-1).view(np.uint8)[-1] ^= 1
        other = structure.unflatten([*leaves[:place], changed, *leaves[place + 1 :]])
        assert checksum_of(other, {}) != whole
    assert checksum_of(state(3), {"at": 1}) != whole


@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_looked_for_again(
    which, tmp_path, monkeypatch
):
    saved(tmp_path, 3).close()
    reader = Checkpoints(tmp_path, "dice", read_only=True)
    real = reader._manager.restore

    def removed(step, **options):
        if step == 3:
            (tmp_path / "3").rename(tmp_path / "5")  # as if 5 were saved and 3 removed
        return real(step, **options)

    monkeypatch.setattr(reader._manager, "restore", removed)
    assert reader.restore(which, LIKE)[0] == 5
    reader.close()


def test_a_listing_that_its_run_overtakes_is_made_again(tmp_path, monkeypatch):
    saved(tmp_path, 3, 4).close()
    real = ocp.CheckpointManager._load_checkpoint_infos
    failures = [FileNotFoundError("4/metrics"), FileNotFoundError("3")]

    def overtaken(self, *args, **options):
        if failures:
            raise failures.pop()
        return real(self, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "_load_checkpoint_infos", overtaken)
    reader = Checkpoints(tmp_path, "dice", read_only=True)
    failures.append(FileNotFoundError("3"))
    assert reader.steps() == [3, 4]
    reader.close()


def test_scores_in_a_half_made_checkpoint_are_nobodys_trouble(tmp_path):
    """Empty after a power cut."""
    saved(tmp_path, 3).close()
    half = tmp_path / "5.orbax-checkpoint-tmp" / "metrics"
    half.mkdir(parents=True)
    (half / "metrics").touch()
    assert latest(tmp_path) == (3, 3)
    Checkpoints(tmp_path, "dice").close()


def test_a_place_that_cannot_be_written_is_found_when_it_is_opened(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"cannot be written to: Read-only.* choose another"):
        Checkpoints(tmp_path / "checkpoints", "dice")


def test_orbax_is_asked_for_nothing_that_it_calls_deprecated(tmp_path, monkeypatch):
    from absl import logging

    said = []
    for name in ("warning", "warn"):
        monkeypatch.setattr(logging, name, lambda text, *_: said.append(str(text)))
    checkpoints = saved(tmp_path, 3)
    assert checkpoints.steps() == [3]
    assert checkpoints.restore("latest", LIKE)[0] == 3
    checkpoints.close()
    assert not [text for text in said if "deprecated" in text]
    assert json.loads((tmp_path / "3" / "progress" / "metadata").read_text())["at"] == 3
