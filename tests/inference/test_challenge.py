"""Against the challenge's own scorer: results of it kept here, and live where it is."""

import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from jaxunet.config import DataConfig
from jaxunet.data import prepare
from jaxunet.errors import DataError, RunError
from jaxunet.inference.challenge import LESION_ABOVE, evaluate_native, originals, zip_masks
from jaxunet.learning.metrics import count, per_image, scores

GOLDEN = Path(__file__).parent / "golden" / "isic_challenge_scoring.json"
NAMES = {"jaccard": "iou"}  # theirs: ours


def made_up_masks() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Truths and predictions with every edge case, values other than 0 and 255 included."""
    rng = np.random.default_rng(2018)

    def disc(height, width, row, column, radius):
        rows, columns = np.ogrid[:height, :width]
        inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        return np.where(inside, 255, 0).astype(np.uint8)

    empty, full = np.zeros((40, 50), np.uint8), np.full((40, 50), 255, np.uint8)
    half = disc(40, 50, 20, 25, 14)
    cases = [
        (disc(601, 803, 300, 400, 170), disc(601, 803, 310, 390, 180)),  # good
        (disc(97, 61, 50, 30, 25), disc(97, 61, 40, 30, 20)),  # middling
        (disc(97, 61, 20, 30, 15), disc(97, 61, 80, 30, 10)),  # missed
        (half, half),
        (half, empty),
        (half, full),
        (empty, empty),
        (empty, half),
        (empty, full),
        (full, full),
        (full, empty),
        (full, half),
        (np.full((40, 50), 128, np.uint8), half),  # 128 is background to the challenge
        (half, np.full((40, 50), 128, np.uint8)),
        (np.where(half, 129, 128).astype(np.uint8), half),
        (rng.integers(0, 256, (40, 50), np.uint8), rng.integers(0, 256, (40, 50), np.uint8)),
    ]
    return {f"ISIC_{number:07}": pair for number, pair in enumerate(cases)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("challenge")
    for index, name in enumerate(("truth", "prediction")):
        (root / name).mkdir()
        for key, pair in made_up_masks().items():
            Image.fromarray(pair[index]).save(root / name / f"{key}_segmentation.png")
    return root / "truth", root / "prediction"


def count_files(truth: Path, prediction: Path) -> np.ndarray:
    """As `evaluate_native` counts, of masks on disk: in the order of their names."""

    def lesion(path: Path) -> np.ndarray:
        with Image.open(path) as mask:
            return np.array(mask) > LESION_ABOVE

    paths = sorted(truth.iterdir())
    return np.stack([count(lesion(prediction / path.name), lesion(path)) for path in paths])


def assert_same_scores(macro_average, counts):
    ours = scores(counts)["per_image"]
    assert {NAMES.get(k, k): v for k, v in macro_average.items()} == pytest.approx(
        ours, rel=1e-12
    )


def test_all_six_scores_are_the_official_scorers(folders):
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == "isic-challenge-scoring 5.6.0"
    counts = count_files(*folders)
    assert_same_scores(golden["all"], counts)
    for key, row in zip(made_up_masks(), counts, strict=True):
        assert_same_scores(golden["each"][key], row[np.newaxis])


def test_live_scorer_agrees(folders):
    scorer = shutil.which("isic-challenge-scoring")
    if scorer is None:
        pytest.skip("isic-challenge-scoring is not installed; CI installs it")
    words = [scorer, "-o", "json", "segmentation", *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert_same_scores(json.loads(done.stdout)["macro_average"], count_files(*folders))


def test_counting_is_a_hand_count():
    prediction = np.array([[1, 1, 0], [0, 1, 0]], bool)
    truth = np.array([[1, 0, 0], [1, 1, 1]], bool)
    assert count(prediction, truth).tolist() == [2, 1, 2, 1]


def bright(images):
    """A model that takes bright pixels for lesion."""
    return images.mean(axis=-1, keepdims=True) / np.float32(255)


def test_native_evaluation_writes_and_scores_masks_at_each_images_own_size(tmp_path):
    images = tmp_path / "isic" / "ISIC2018_Task1-2_Test_Input"
    masks = tmp_path / "isic" / "ISIC2018_Task1_Test_GroundTruth"
    images.mkdir(parents=True)
    masks.mkdir()
    sizes = {"ISIC_0000001": (64, 96), "ISIC_0000002": (160, 64), "ISIC_0000003": (32, 32)}
    for key, (height, width) in sizes.items():
        lesion = np.zeros((height, width), np.uint8)
        lesion[height // 4 : height // 2, width // 4 : width // 2] = 255
        Image.fromarray(np.dstack([lesion] * 3)).save(images / f"{key}.png")
        Image.fromarray(lesion).save(masks / f"{key}_segmentation.png")
    config = DataConfig(name="isic2018", dir=tmp_path / "isic")
    pairs, dataset = originals(config, "test")
    assert dataset["count"] == 3
    assert dataset["official_count"] == 1000
    assert dataset["unofficial_splits"] == {"test": "3 of 1000"}
    counts, _ = evaluate_native(
        bright, pairs, tmp_path / "out", image_size=32, threshold=0.5, batch_size=2
    )
    for (key, (height, width)), row in zip(sizes.items(), counts, strict=True):
        with Image.open(tmp_path / "out" / f"{key}_segmentation.png") as mask:
            assert (mask.size, mask.mode) == ((width, height), "L")
        assert row.sum() == height * width
    assert per_image(counts)["dice"].min() > 0.9
    # What was returned is what the written files score.
    np.testing.assert_array_equal(count_files(masks, tmp_path / "out"), counts)
    zip_masks(sorted((tmp_path / "out").iterdir()), tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == [f"{key}_segmentation.png" for key in sizes]


def test_native_evaluation_names_what_it_needs(tmp_path):
    with pytest.raises(DataError, match=r"--data\.dir"):
        originals(DataConfig(), "test")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number in range(4):
        picture = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
        picture.save(tmp_path / "images" / f"{number}.png")
        picture.convert("L").save(tmp_path / "masks" / f"{number}.png")
    config = DataConfig(name="folder", dir=tmp_path)
    with pytest.raises(DataError, match="no split 'final', but train"):
        originals(config, "final")


def own_pairs(root: Path, *, masks: Callable[[Image.Image], Image.Image]) -> DataConfig:
    """Six pairs to be prepared and scored, whose masks are saved by way of `masks`."""
    for kind in ("images", "masks"):
        (root / "own" / kind).mkdir(parents=True)
    for number in range(6):
        lesion = np.zeros((16, 24), np.uint8)
        lesion[4:12, 2 + number : 10 + number] = 255
        image = Image.fromarray(np.dstack([np.where(lesion, 250, number).astype(np.uint8)] * 3))
        image.save(root / "own" / "images" / f"{number}.png")
        masks(Image.fromarray(lesion)).save(root / "own" / "masks" / f"{number}.png")
    return DataConfig(
        name="folder",
        dir=root / "own",
        prepared_dir=root / "prepared",
        image_size=16,
        stored_size=16,
    )


@pytest.mark.parametrize(
    ("masks", "binarize"),
    [
        (lambda mask: mask.convert("P"), False),
        (lambda mask: Image.fromarray(np.array(mask).astype(np.uint16)), False),
        (lambda mask: mask.convert("1"), False),
        (lambda mask: Image.fromarray(np.array(mask) // 255), True),
        (lambda mask: Image.fromarray(np.array(mask).astype(np.uint16) * 257), True),
        (lambda mask: mask.convert("RGBA"), True),
    ],
)
def test_native_scoring_takes_the_masks_that_preparing_takes(tmp_path, masks, binarize):
    config = replace(own_pairs(tmp_path, masks=masks), binarize=binarize)
    prepared = prepare(config, progress=False)
    pairs, dataset = originals(config, "train")
    assert dataset["fingerprint"] == prepared.fingerprint
    assert [pair.id for pair in pairs] == prepared.ids("train")
    counts, _ = evaluate_native(
        bright, pairs, tmp_path / "out", image_size=24, threshold=0.5, batch_size=2
    )
    assert counts[:, [0, 2]].sum(axis=1).tolist() == [8 * 8] * len(pairs)
    assert per_image(counts)["dice"].min() > 0.9
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{pair.id}_segmentation.png" for pair in pairs
    }


def test_native_scoring_leaves_out_pixels_that_do_not_count_and_boundaries(tmp_path):
    def rimmed(mask):
        values = np.array(mask)
        values[:, :3] = 77
        return Image.fromarray(values)

    config = replace(own_pairs(tmp_path, masks=rimmed), ignore_value=77)
    pairs, dataset = originals(config, "train")
    assert dataset["fingerprint"] == prepare(config, progress=False).fingerprint
    settings = {"image_size": 24, "threshold": 0.5, "batch_size": 2}
    counts, boundary = evaluate_native(bright, pairs, tmp_path / "out", **settings)
    assert boundary is None
    for pair, found in zip(pairs, counts, strict=True):
        with Image.open(tmp_path / "out" / f"{pair.id}_segmentation.png") as mask:
            p = np.array(mask)[:, 3:] > 0
        with Image.open(config.dir / "masks" / f"{pair.id}.png") as mask:
            y = np.array(mask)[:, 3:] == 255
        by_hand = [p & y, p & ~y, ~p & y, ~p & ~y]
        assert found.tolist() == [each.sum() for each in by_hand]


def test_native_scoring_has_the_limits_of_preparing(tmp_path):
    """An EPS, whatever it is called, would have Pillow start another program."""
    config = own_pairs(tmp_path, masks=lambda mask: mask)
    pairs, _ = originals(config, "train")
    postscript = io.BytesIO()
    Image.new("L", (24, 16)).save(postscript, "EPS")
    settings = {"image_size": 16, "threshold": 0.5, "batch_size": 2}
    for kind in ("images", "masks"):
        path = config.dir / kind / f"{pairs[0].id}.png"
        sound = path.read_bytes()
        path.write_bytes(postscript.getvalue())
        with (
            mock.patch("subprocess.check_call", side_effect=AssertionError),
            pytest.raises(DataError, match=rf"{path.name} is not an image of a kind read here"),
        ):
            evaluate_native(bright, pairs, tmp_path / "out", **settings)
        path.write_bytes(sound)
    large = [replace(pair, max_megapixels=0) for pair in pairs]
    with pytest.raises(DataError, match=r"24 x 16 = 384 pixels; the limit is 0\."):
        evaluate_native(bright, large, tmp_path / "out", **settings)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = config.dir / "images" / f"{pairs[0].id}.png"
    Image.open(path).save(path, exif=exif.tobytes())
    with pytest.raises(DataError, match="is 16 x 24 once it is turned upright as its EXIF"):
        evaluate_native(bright, pairs, tmp_path / "out", **settings)


def test_a_scoring_that_fails_leaves_no_masks_and_those_of_before(tmp_path):
    config = own_pairs(tmp_path, masks=lambda mask: mask)
    pairs, _ = originals(config, "train")
    damaged = config.dir / "images" / f"{pairs[-1].id}.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "out").mkdir()
    before = tmp_path / "out" / f"{pairs[0].id}_segmentation.png"
    before.write_bytes(b"of another scoring")
    for model, error in (
        (bright, DataError),
        (lambda images: bright(images) * np.nan, RunError),
    ):
        with pytest.raises(error, match=r"cannot be decoded|is not finite"):
            evaluate_native(
                model, pairs, tmp_path / "out", image_size=16, threshold=0.5, batch_size=1
            )
        assert list((tmp_path / "out").iterdir()) == [before]
        assert before.read_bytes() == b"of another scoring"


def test_many_problems_of_the_originals_are_counted_and_not_all_listed(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(60):
        Image.new("L", (2, 2)).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(DataError) as refusal:
        originals(DataConfig(name="folder", dir=tmp_path), "train")
    first, *listed, last = str(refusal.value).splitlines()
    assert re.fullmatch(rf"\d+ problems found in {tmp_path}; nothing was scored\.", first)
    assert 50 <= len(listed) < 55
    assert re.fullmatch(r"And \d+ more of the same kinds?\.", last)
