"""Figures: which rows are shown, where outlines lie, what the pictures contain."""

import os
import subprocess
import sys
import tracemalloc

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from jaxunet.config import IGNORED, Config, DataConfig, TrainConfig
from jaxunet.runs import figures
from jaxunet.runs.canvas import BLUE, GREEN, SKY, VERMILLION, YELLOW
from jaxunet.runs.reporting import write_figures


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def places(picture, colour):
    """Where a picture has exactly this colour, as booleans."""
    return (picture == np.round(np.array(to_rgb(colour)) * 255)).all(axis=-1)


def metrics_lines(epochs):
    lines = []
    for epoch in range(1, epochs + 1):
        for step in (4 * epoch - 2, 4 * epoch):
            values = {"loss": 1 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
            lines.append({"step": step, "epoch": epoch, "split": "train", "values": values})
        values = {"loss": 0.9 / epoch, "dice": 1 - 0.5 / epoch, "iou": 1 - 0.6 / epoch}
        lines.append(
            {"step": 4 * epoch, "epoch": epoch, "split": "validation", "values": values}
        )
    return lines


def blob(rows, columns):
    mask = np.zeros((32, 32), np.uint8)
    mask[rows, columns] = 255
    return mask


def row(truth, prediction, label="best"):
    grey = np.full((32, 32, 3), 120, np.uint8)
    return figures.PredictionRow("ISIC_0000001", label, 0.5, grey, truth, prediction)


# Rows


def test_rows_run_from_best_over_median_to_worst():
    dice = np.random.default_rng(0).permutation(np.arange(101) / 100)
    rows = figures.select_rows(dice)
    assert [(round(float(dice[i]), 2), label) for i, label in rows] == [
        (1.00, "best"),
        (0.75, "percentile 75"),
        (0.50, "median"),
        (0.33, "percentile 33"),
        (0.17, "percentile 17"),
        (0.00, "worst"),
    ]


@pytest.mark.parametrize("images", range(13))
def test_rows_are_distinct_and_as_many_as_can_be(images):
    dice = np.random.default_rng(images).random(images)
    rows = figures.select_rows(dice)
    shown = [float(dice[index]) for index, _ in rows]
    assert len({index for index, _ in rows}) == len(rows) == min(images, 6)
    assert shown == sorted(shown, reverse=True)
    labels = [label for _, label in rows]
    if images >= 2:
        assert shown[0] == dice.max()
        assert shown[-1] == dice.min()
        assert labels[0] == "best"
        assert labels[-1] == "worst"
    if images >= 3:
        # Half of the others are better and half worse, give or take one.
        median = shown[labels.index("median")]
        assert abs(int((dice > median).sum()) - int((dice < median).sum())) <= 1


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        figures.select_rows(np.array([0.5, np.nan, 0.7]))


# Outlines


def test_outline_lies_on_the_edge_and_nowhere_else():
    image = np.full((12, 14, 3), 100, np.uint8)
    mask = np.zeros((12, 14), bool)
    mask[3:9, 4:11] = True
    drawn = figures.overlay(image, mask, YELLOW)
    expected = np.zeros((12, 14), bool)
    expected[2:10, 3:12] = True  # one pixel outside
    expected[4:8, 5:10] = False  # and one inside
    np.testing.assert_array_equal(places(drawn, YELLOW), expected)
    assert (drawn[~expected] == 100).all()
    assert (image == 100).all()


def test_outline_is_closed_where_the_mask_touches_the_border():
    drawn = figures.overlay(np.zeros((6, 8, 3), np.uint8), np.full((6, 8), 255, np.uint8))
    expected = np.ones((6, 8), bool)
    expected[1:-1, 1:-1] = False
    np.testing.assert_array_equal(drawn.any(axis=-1), expected)


def test_outline_widens_with_the_picture():
    def width(side):
        mask = np.zeros((side, side), np.uint8)
        mask[:, : side // 2] = 255
        drawn = figures.overlay(np.zeros((side, side, 3), np.uint8), mask)
        return int(drawn[side // 4, side // 4 :].any(axis=-1).sum())

    assert [width(side) for side in (256, 1024, 3072)] == [2, 4, 12]


def test_an_empty_mask_and_a_single_pixel_have_outlines_too():
    image = np.full((5, 5, 3), 9, np.uint8)
    np.testing.assert_array_equal(figures.overlay(image, np.zeros((5, 5), bool)), image)
    one = figures.overlay(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), bool))
    assert places(one, YELLOW).all()


# Pictures


def test_predictions_show_both_outlines_in_the_overlay_only(tmp_path):
    path = tmp_path / "figures" / "predictions.png"
    left, right = blob(slice(4, 28), slice(2, 12)), blob(slice(4, 28), slice(20, 30))
    figures.predictions([row(left, right)], path, "title")
    picture = pixels(path)
    table = picture[: int(picture.shape[0] * 0.8)]  # the legend is below
    truth = np.flatnonzero(places(table, figures.TRUTH).any(axis=0))
    prediction = np.flatnonzero(places(table, figures.PREDICTION).any(axis=0))
    assert truth.min() > 0.75 * picture.shape[1]
    assert truth.max() < prediction.min()


def test_pixels_that_do_not_count_are_grey_in_the_truth_and_have_no_outline(tmp_path):
    truth = blob(slice(8, 24), slice(8, 24))
    ignored = np.where(truth > 0, np.uint8(IGNORED), truth)
    for name, shown in (("lesion", truth), ("ignored", ignored)):
        path = tmp_path / f"{name}.png"
        figures.predictions([row(shown, 0 * truth)], path, "Test")
        picture = pixels(path)
        table = picture[: int(picture.shape[0] * 0.7)]  # the legend is below
        grey = (np.abs(table.astype(int) - 127.5) < 1).all(axis=-1)
        assert (grey.sum() > 1000) == (name == "ignored")
        assert places(table, figures.TRUTH).any() == (name == "lesion")


def test_predictions_grow_by_the_row_and_take_empty_and_full_masks(tmp_path):
    empty, full = np.zeros((32, 32), np.uint8), np.full((32, 32), 255, np.uint8)
    heights = []
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        figures.predictions([row(empty, full, "worst")] * count, path, "title")
        heights.append(pixels(path).shape[0])
    assert heights[1] > 2 * heights[0]
    with pytest.raises(ValueError, match="rows is empty"):
        figures.predictions([], tmp_path / "none.png", "title")


@pytest.mark.parametrize("epochs", [1, 5, 200])
def test_curves_draw_losses_left_and_scores_right(tmp_path, epochs):
    path = tmp_path / "curves.png"
    figures.curves(metrics_lines(epochs), path)
    picture = pixels(path)
    half = picture.shape[1] // 2
    for colour, drawn_left in ((BLUE, True), (VERMILLION, True), (GREEN, False)):
        found = places(picture, colour)
        assert found[:, :half].any() == drawn_left
        assert found[:, half:].any() != drawn_left


def test_curves_of_a_run_without_validation_yet(tmp_path):
    training = [line for line in metrics_lines(1) if line["split"] == "train"]
    figures.curves(training, tmp_path / "some.png")
    figures.curves([], tmp_path / "none.png")
    assert places(pixels(tmp_path / "some.png"), BLUE).any()
    assert not places(pixels(tmp_path / "some.png"), VERMILLION).any()
    assert not places(pixels(tmp_path / "none.png"), BLUE).any()


def test_loss_curves_that_coincide_can_both_be_seen(tmp_path):
    losses = list(np.linspace(1, 0.1, 60))
    path = tmp_path / "loss.png"
    figures.loss_comparison({"PyTorch": losses, "jaxunet": losses}, path, "title")
    picture = pixels(path)
    plotted = picture[picture.shape[0] // 3 :]  # below the legend
    assert places(plotted, SKY).sum() > 100
    assert places(plotted, VERMILLION).sum() > 100


# Whatever the user's settings are


def test_a_backend_that_is_not_there_keeps_no_figure_from_being_drawn(tmp_path):
    backend = "module://matplotlib_inline.backend_inline"
    path = tmp_path / "curves.png"
    code = "import pathlib, sys; from jaxunet.runs import figures\n"
    code += "figures.curves([], pathlib.Path(sys.argv[1]))"
    variables = os.environ | {"MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", code, path], check=True, env=variables)
    assert pixels(path).shape[2] == 3


def test_the_users_settings_neither_change_figures_nor_are_changed(tmp_path):
    figures.curves(metrics_lines(3), tmp_path / "usual.png")
    users = {"text.usetex": True, "axes.facecolor": "black", "savefig.bbox": "tight"}
    with matplotlib.rc_context(users):
        figures.curves(metrics_lines(3), tmp_path / "own.png")
        assert matplotlib.rcParams["text.usetex"]
    np.testing.assert_array_equal(pixels(tmp_path / "own.png"), pixels(tmp_path / "usual.png"))


def test_curves_of_many_epochs_take_memory_by_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_: None)

    def peak(epochs):
        lines = metrics_lines(epochs)
        tracemalloc.start()
        figures.curves(lines, tmp_path / "curves.png")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # fonts and the like
    assert peak(3000) - peak(1500) < 8e6  # a place for each pair would add 13.5 MB


def test_each_epochs_mean_is_drawn_where_its_steps_are(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures, "_plot", lambda _a, x, y, _c, label: drawn.update({label: (x, y)})
    )
    figures.curves(metrics_lines(3), tmp_path / "curves.png")
    steps, losses = drawn["training, mean of epoch"]
    np.testing.assert_allclose(steps, [3, 7, 11])
    np.testing.assert_allclose(losses, [(1 / 2 + 1 / 4) / 2, (1 / 6 + 1 / 8) / 2, 11 / 120])


def test_a_figure_that_fails_costs_a_line_not_the_run(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no fonts\nat all")

    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(figures, "curves", fails)
    examples = [
        {
            "id": "a",
            "image": np.zeros((8, 8, 3), np.uint8),
            "mask": np.zeros((8, 8, 1), np.uint8),
        }
    ]
    written = write_figures(
        tmp_path,
        lambda images: np.zeros(images.shape[:3], bool),
        np.array([[0, 0, 0, 64]]),
        examples,
        Config(DataConfig(image_size=16), train=TrainConfig(eval_batch_size=2)),
        {
            "dataset": {"name": "synthetic", "split": "validation"},
            "epoch": 1,
            "scores": {"per_image": {"dice": 0.5}},
        },
    )
    assert written == [tmp_path / "figures" / "predictions.png"]
    said = capsys.readouterr().err
    assert f"{tmp_path / 'figures' / 'curves.png'} is not drawn: RuntimeError: no fonts" in said
    assert said.count("\n") == 1
