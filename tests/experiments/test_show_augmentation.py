"""`show_augmentation.py`: what it draws is what training makes of the pictures."""

import numpy as np
import pytest
from bad_input.ground import run
from PIL import Image

SIDE, GAP = 16, 4
SMALL = ("--data.image-size", SIDE, "--data.stored-size", SIDE, "--data.synthetic-train", 3)
SMALL += ("--data.synthetic-validation", 2, "--pictures", 4, "--draws", 5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return "--data.prepared-dir", tmp_path_factory.mktemp("prepared")


def tiles(out, *words):
    """What the script draws: [pictures, 1 + draws, side, side, 3]."""
    status, output = run(["show_augmentation.py", *SMALL, *words, "--out", out])
    assert status == 0, output
    sheet = np.asarray(Image.open(out))
    assert (sheet[SIDE : SIDE + GAP] == 255).all()
    rows, columns = ((n + GAP) // (SIDE + GAP) for n in sheet.shape[:2])
    places = [slice(n * (SIDE + GAP), n * (SIDE + GAP) + SIDE) for n in range(columns)]
    return np.array([[sheet[row, column] for column in places] for row in places[:rows]])


def test_a_row_is_a_picture_as_it_is_and_as_it_is_varied(prepared, tmp_path):
    found = tiles(tmp_path / "new" / "a.png", *prepared, "--train.augment", "flip")
    assert found.shape == (3, 6, SIDE, SIDE, 3)  # there are no more than three
    for first, *others in found:
        kinds = [
            (np.array_equal(each, first), np.array_equal(each, first[:, ::-1]))
            for each in others
        ]
        assert {(True, False), (False, True)} == set(kinds)
    words = (*prepared, "--split", "validation", "--train.augmentation.rotation", 170)
    turned = tiles(tmp_path / "b.png", *words)
    assert turned.shape[0] == 2
    assert len({each.tobytes() for each in turned[0]}) == 6
