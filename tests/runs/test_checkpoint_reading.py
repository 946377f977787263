"""What the reader of checkpoints makes of good, damaged and missing ones of a few numbers."""

import errno
import json
import os
import shutil
import time
import zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from jaxunet.errors import RunError
from jaxunet.learning.steps import TrainState
from jaxunet.runs import orbax
from jaxunet.runs.checkpoint import LOOKS, REMOVAL, Checkpoints
from jaxunet.runs.integrity import checksum_of, json_damage, other_arrays


def state(step, shape=(2, 3)):
    w = np.full(shape, step + 0.5, np.float32)
    trace = optax.TraceState(np.full(2, step, np.float32))
    return TrainState(np.int32(step), {"w": w, "v": w[0]}, {}, (trace,), None)


LIKE = state(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints 1 (of the best scores), 3 and 4, after 2 was removed."""
    folder = tmp_path_factory.mktemp("made") / "checkpoints"
    checkpoints = Checkpoints(folder, "dice")
    for step, scores in ((1, {"dice": 0.7}), (2, {"iou": 1.0}), (3, None), (4, {"dice": 0.2})):
        checkpoints.save(state(step), {"at": step, "list": [step]}, scores)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3, 4]
    checkpoints.close()
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "checkpoints"))


@pytest.fixture
def opened():
    """Opens checkpoints that are closed at the end."""
    made = []

    def open_(folder, read_only=True):
        made.append(Checkpoints(folder, "dice", read_only=read_only))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def edit(folder, step, change):
    path = folder / str(step) / "progress" / "metadata"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def damage(folder, *steps):
    for step in steps:
        edit(folder, step, lambda record: record | {"at": -1})


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_was_saved_is_read_on_the_host(folder, opened):
    reader = opened(folder)
    for which, expected in (("latest", 4), ("best", 1)):
        assert reader.step_of(which) == expected
        step, found, progress = reader.restore(which, LIKE)
        assert (step, progress) == (expected, {"at": expected, "list": [expected]})
        assert jax.tree.structure(found) == jax.tree.structure(LIKE)
        for a, b in zip(*map(jax.tree.leaves, (found, state(expected))), strict=True):
            assert type(a) is np.ndarray
            np.testing.assert_array_equal(a, b)
    assert LIKE.params["w"][0, 0] == 0.5


def test_a_reader_sees_what_its_run_saves_meanwhile(folder, opened):
    readers = [opened(folder) for _ in range(3)]
    writer = opened(folder, read_only=False)
    writer.save(state(5), {"at": 5}, {"dice": 0.9})
    writer.wait()
    assert readers[0].steps() == [4, 5]
    assert readers[1].step_of("latest") == readers[1].step_of("best") == 5
    assert readers[2].restore("best", LIKE)[0] == 5


def test_without_scores_the_best_is_the_latest_and_without_checkpoints_there_is_none(
    tmp_path, opened
):
    writer = opened(tmp_path, read_only=False)
    for call in (lambda: writer.step_of("latest"), lambda: writer.restore("best", LIKE)):
        with pytest.raises(RunError, match=r"holds no finished checkpoint; train first"):
            call()
    writer.save(state(2), {})
    writer.save(state(3), {}, {"iou": 0.5})
    writer.wait()
    assert writer.step_of("latest") == 3
    assert writer.restore("best", LIKE)[0] == 3


def test_a_damaged_one_is_moved_away_and_the_one_before_is_used(folder, opened, capsys):
    damage(folder, 3, 4)
    aside = folder.with_name("damaged-4")
    aside.mkdir()
    (aside / "of an earlier time").touch()
    before = tree(folder / "4")
    writer = opened(folder, read_only=False)
    step, found, progress = writer.restore("latest", LIKE)
    assert (step, found.step, progress["at"]) == (1, 1, 1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"warning: The checkpoint of step 4 in {folder} is damaged: its contents are not those "
        f"of its checksum. Step 1 is used instead. It was moved to {aside}."
    )
    assert second.startswith("warning: The checkpoint of step 3 ")
    assert tree(aside) == before
    assert folder.with_name("damaged-3").is_dir()
    assert writer._manager.all_steps() == [1]  # without another look
    writer.save(state(4), {"at": 4})
    writer.wait()
    assert writer.restore("latest", LIKE)[0] == 4


def test_a_reader_moves_nothing(folder, opened, capsys):
    damage(folder, 4)
    before = tree(folder.parent)
    assert opened(folder).restore("latest", LIKE)[0] == 3
    said = capsys.readouterr().err
    assert said.endswith("not those of its checksum. Step 3 is used instead.\n")
    assert tree(folder.parent) == before


def test_a_reader_removes_nothing_and_a_run_what_is_half_made(folder, opened):
    half = folder / "5.orbax-checkpoint-tmp"  # a run may be writing it
    half.mkdir()
    before = tree(folder)
    reader = opened(folder)
    reader._manager.delete(3)
    assert reader.steps() == [1, 3, 4]
    assert tree(folder) == before
    writer = opened(folder, read_only=False)
    writer.save(state(6), {})  # waits until half-made ones are gone
    writer.wait()
    assert not half.exists()


def test_what_is_to_be_saved_is_saved_whatever_came_after_it(folder, opened):
    writer = opened(folder, read_only=False)
    writer.save(state(2), {"at": 2}, {"dice": 0.9})
    writer.wait()
    assert writer.restore("best", LIKE)[0] == 2


def test_a_folder_that_cannot_be_made_is_not_waited_for(folder, opened, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = opened(folder, read_only=False)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(RunError, match="No space left"):
        writer.save(state(5), {})  # in this thread


def test_of_several_processes_the_first_waits_for_no_other(tmp_path, monkeypatch):
    made = mock.create_autospec(orbax.Manager)
    monkeypatch.setattr(orbax, "Manager", made)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    orbax.open_manager(tmp_path, "dice", read_only=False)
    options = made.call_args.kwargs["options"]
    assert not options.create
    assert options.multiprocessing_options.active_processes == {0}
    assert options.multiprocessing_options.barrier_sync_key_prefix


def test_the_best_is_read_or_nothing(folder, opened):
    damage(folder, 1)
    with pytest.raises(RunError, match=r"^The checkpoint of step 1 .*its checksum\.$"):
        opened(folder).restore("best", LIKE)


def test_when_none_is_good_the_newest_is_named_first_and_all_stay(folder, opened):
    damage(folder, 1, 3, 4)
    before = tree(folder.parent)
    with pytest.raises(RunError) as raised:
        opened(folder, read_only=False).restore("latest", LIKE)
    text = str(raised.value)
    assert text.startswith(f"The checkpoint of step 4 in {folder} is damaged: ")
    assert text.endswith(". Nor can those before it: 3, 1.")
    assert "step 4" in str(raised.value.__cause__)
    assert tree(folder.parent) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda record: {k: v for k, v in record.items() if k != "checksum"},
        lambda record: record | {"checksum": record["checksum"] ^ 1},
        lambda record: record | {"checksum": None},
        lambda record: [record],
    ],
)
def test_a_record_without_its_own_checksum_is_damaged(change, folder, opened):
    edit(folder, 1, change)
    with pytest.raises(RunError, match=r"step 1 .* is damaged: its contents are not those"):
        opened(folder).restore("best", LIKE)


@pytest.mark.parametrize(
    ("like", "said"),
    [
        (state(0, (2, 4)), r"params\.v is float32\[3\], expected float32\[4\], and 1 more\."),
        (
            replace(LIKE, params={"w": LIKE.params["w"]}),
            r"read with this configuration: it is of",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_arrays(like, said, folder, opened):
    with pytest.raises(RunError, match=said):
        opened(folder).restore("best", like)


@pytest.mark.parametrize("read_only", [True, False])
def test_what_orbax_cannot_read_is_named(read_only, folder, opened, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    shutil.rmtree(folder / "1" / "state")
    with pytest.raises(
        RunError, match=rf"^The checkpoint of step 1 in {folder} cannot be read with this conf"
    ) as raised:
        opened(folder, read_only).restore("best", LIKE)
    assert raised.value.__cause__ is not None
    assert waited.count(REMOVAL) == read_only  # in case that it is being removed


def test_what_was_best_on_other_data_is_not_the_best_any_more(folder, opened):
    checkpoints = opened(folder, read_only=False)
    assert checkpoints.step_of("best") == 1
    checkpoints.forget_scores()
    assert checkpoints.steps() == [1, 3, 4]
    checkpoints.save(state(5), {"at": 5}, {"dice": 0.1})
    checkpoints.save(state(6), {"at": 6}, {"dice": 0.05})
    checkpoints.wait()
    for each in (checkpoints, opened(folder)):
        assert each.step_of("best") == 5


def test_scores_that_cannot_be_read(folder, opened, capsys):
    (folder / "4" / "metrics" / "metrics").write_text("[]")
    before = tree(folder.parent)
    with pytest.raises(RunError) as raised:
        opened(folder)
    assert str(raised.value) == (
        f"The checkpoint of step 4 in {folder} is damaged: metrics holds no JSON object. Move "
        "it away, and the one before it is used."
    )
    assert tree(folder.parent) == before
    writer = opened(folder, read_only=False)
    assert writer.steps() == [1, 3]
    assert folder.with_name("damaged-4").is_dir()
    said = capsys.readouterr().err
    assert f"no JSON object. It was moved to {folder.with_name('damaged-4')}." in said
    # Of all of them: none is moved.
    for step in (1, 3):
        (folder / str(step) / "metrics").mkdir(exist_ok=True)
        (folder / str(step) / "metrics" / "metrics").write_text("{")
    with pytest.raises(RunError, match=r"step 1 in .* metrics cannot be read \(.*Move it"):
        opened(folder, read_only=False)
    assert (folder / "1").exists()


def failing(manager, times):
    """`manager.reload` doesn't find its files that many times; the times it was called."""
    real, calls = manager.reload, []

    def reload():
        calls.append(1)
        if len(calls) <= times:
            raise FileNotFoundError("4")
        real()

    return mock.patch.object(manager, "reload", reload), calls


def test_a_reader_looks_again_for_a_while_and_a_writer_does_not(folder, opened):
    reader, writer = opened(folder), opened(folder, read_only=False)
    for checkpoints, times, good in (
        (reader, 20, True),
        (reader, 21, False),
        (writer, 1, False),
    ):
        for call in (checkpoints.steps, lambda c=checkpoints: c.step_of("latest")):
            patch, calls = failing(checkpoints._manager, times)
            with patch:
                if good:
                    call()
                else:
                    with pytest.raises(FileNotFoundError):
                        call()
            assert len(calls) == (times + good)
    patch, calls = failing(reader._manager, 1)
    folder.rename(folder.with_name("elsewhere"))
    with patch, pytest.raises(FileNotFoundError):
        reader.steps()
    assert len(calls) == 1
    folder.with_name("elsewhere").rename(folder)
    assert LOOKS == 20


def test_arrays_differ_in_shape_or_type():
    like = replace(LIKE, params={"v": np.zeros(3, np.int8), "w": np.zeros((3, 2), np.float32)})
    assert other_arrays(LIKE, like) == [
        "params.v is float32[3], expected int8[3]",
        "params.w is float32[2, 3], expected float32[3, 2]",
    ]
    assert other_arrays(LIKE, state(5)) == []
    with pytest.raises(ValueError, match="argument 2"):
        other_arrays(LIKE, replace(LIKE, params={}))


def test_the_checksum_is_crc_32_of_the_sorted_record_and_the_arrays_bytes():
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = TrainState(np.int32(7), {"w": w.T.copy().T}, {"m": np.float32(2)}, (), None)
    contents = b'{"a": 1, "b": 2}' + b"\7\0\0\0" + w.tobytes() + np.float32(2).tobytes()
    assert checksum_of(made, {"b": 2, "a": 1}) == zlib.crc32(contents)


def test_a_json_file_is_an_object_or_damaged(tmp_path):
    path = tmp_path / "scores"
    assert json_damage(path) == ""
    for text, said in (
        ('{"dice": 1}', ""),
        ("[1]", "scores holds no JSON object"),
        ("{", "scores cannot be read ("),
        ("[" * 100_000, "scores cannot be read ("),
    ):
        path.write_text(text)
        assert json_damage(path).startswith(said)
        assert bool(json_damage(path)) == bool(said)


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ([KeyError("first"), ValueError("second")], "first"),
        ([ValueError("trees do not match"), OSError("short")], "short"),
        ([ValueError("do not match: 1"), ValueError("do not match: 2")], "do not match: 1"),
    ],
)
def test_of_the_forms_of_a_checkpoint_that_which_fits_says_why_it_is_not_read(errors, raised):
    manager = mock.create_autospec(orbax.Manager, instance=True)
    manager.restore.side_effect = errors
    with pytest.raises(orbax.NOT_READ, match=raised):
        orbax.read(manager, 3, LIKE)
    assert [call.args for call in manager.restore.call_args_list] == [(3,), (3,)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "ValueError"),
        ("  ONE.\ntwo", "ONE"),
        ("IN X.", "IN X"),
        ("x" * 400, "x" * 300),
        (
            "PyTree tree structures do not match:\nparams.X:\n  more",
            "it is of another model, with a difference in params.X",
        ),
    ],
)
def test_the_first_that_orbax_says_is_the_reason(text, said):
    assert orbax.reason(ValueError(text)) == said


def test_a_place_that_orbax_cannot_list_is_named(folder, opened, monkeypatch):
    def refuse(*_args, **_options):
        raise ValueError("no order.\nmore")

    monkeypatch.setattr(orbax, "open_manager", refuse)
    with pytest.raises(
        RunError, match=rf"^The checkpoints in {folder} cannot be .*: no order\.$"
    ):
        opened(folder)
