"""Files that are links to each other, and names that some file systems take for one."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxunet.errors import DataError
from jaxunet.inference.pictures import MASK_SUFFIX, plan


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)
    return path


def planned(inputs, out, **options):
    found = plan(inputs, out, suffixes=(MASK_SUFFIX,), **options).pictures
    return {(each.source.name, each.result(MASK_SUFFIX).relative_to(out)) for each in found}


def test_links_of_other_names_get_masks_of_their_own_and_the_same_file_one(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "a.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "below").mkdir()
    (folder / "below" / "a.png").symlink_to("../a.png")
    (tmp_path / "same").symlink_to(folder)
    a, b = ("a.png", Path("a_segmentation.png")), ("b.png", Path("b_segmentation.png"))
    below = ("a.png", Path("below/a_segmentation.png"))
    assert planned([folder], out) == {a, b}
    assert planned([folder], out, recursive=True) == {a, b, below}
    assert planned([folder, tmp_path / "same", folder / "b.png"], out) == {a, b}
    assert planned([folder / "below" / "a.png", folder / "a.png"], out) == {a}
    assert len(plan([folder, folder], out, suffixes=()).pictures) == 2


ALIKE = {
    "case": ["A.png", "a.png"],
    "case of a folder": ["X/a.png", "x/a.png"],
    "accents": [unicodedata.normalize(form, "\u00e9.png") for form in ("NFC", "NFD")],
}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("folds", [False, True])
def test_names_that_are_one_where_masks_are_written_are_refused_there_alone(
    kind, folds, tmp_path, monkeypatch
):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ALIKE[kind]:
        save(folder / name)
    if len({path.stat().st_ino for path in folder.rglob("*.png")}) < 2:
        pytest.skip("the file system of the tests cannot hold both")
    if folds:  # as those of macOS and Windows do
        real = Path.touch

        def touch(path, **options):
            place, mark, name = str(path).partition(".jaxunet-")
            folded = Path(place + mark + unicodedata.normalize("NFC", name.lower()))
            folded.parent.mkdir(parents=True, exist_ok=True)
            real(folded, **options)

        monkeypatch.setattr(Path, "touch", touch)
        with pytest.raises(DataError, match="would be written to the same file") as refusal:
            planned([folder], out, recursive=True)
        assert all(str(folder / name) in str(refusal.value) for name in ALIKE[kind])
    else:
        assert len(planned([folder], out, recursive=True)) == 2
    assert not out.exists() or not list(out.iterdir())
