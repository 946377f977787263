"""The benchmark's preset beside a published figure."""

from dataclasses import replace

import jax
import pytest
from scripts import SCRIPTS

from jaxunet.bench import tables
from jaxunet.bench.flops import forward_flops
from jaxunet.bench.neighbours import NVIDIA
from jaxunet.errors import ConfigError


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import benchmark

    return benchmark


def operations_of_nvidias(size: int = 572, width: int = 64) -> tuple[int, int]:
    """Of a forward pass of one image, by hand from its layers; and the side of its output."""
    count, channels = 0, 1

    def convolve(outputs: int) -> None:
        nonlocal count, channels, size
        size -= 2  # without padding
        count += 2 * 9 * channels * outputs * size**2
        channels = outputs

    for level in range(5):
        size = size // 2 if level else size
        convolve(width * 2**level)
        convolve(width * 2**level)
    for level in (3, 2, 1, 0):
        outputs = width * 2**level
        count += 2 * 9 * channels * outputs * size**2  # 3x3, transposed, stride 2
        size *= 2
        channels = 2 * outputs  # with the skip's
        convolve(outputs)
        convolve(outputs)
    return count + 2 * channels * 2 * size**2, size


def test_the_preset_is_near_nvidias_in_what_is_computed(benchmark, monkeypatch):
    count, side = operations_of_nvidias()
    assert side == 388
    assert NVIDIA.gflops_per_image == pytest.approx(count / 1e9, abs=0.05)
    arguments, neighbour = benchmark.read_arguments(["nvidia"])
    assert neighbour is NVIDIA
    ours = forward_flops(arguments.model, 576, 576)
    assert f"{ours / count:.1f} times the operations" in NVIDIA.differs[0]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    points = benchmark.settings(arguments)
    assert [NVIDIA.beside(point) for point in points] == [141, 63]
    point = points[0]
    for change in ({"width": 32}, {"depth": 4}, {"encoder": "resnet18", "norm": "batch"}):
        config = replace(point.config, model=replace(point.config.model, **change))
        assert NVIDIA.beside(replace(point, config=config)) is None
    assert NVIDIA.beside(replace(point, devices=8)) is None


def test_the_published_figure_stands_in_the_table(capsys):
    setting = {
        "network": "width 64",
        "image_size": 576,
        "batch_size": 8,
        "dtype": "bfloat16",
        "remat": False,
        "parallel": "pmap",
    }
    tables.show(
        {
            "points": [{"setting": setting, "neighbour_images_per_second": 141}],
            "neighbour": NVIDIA.record(),
            "fits": {},
            "versions": {},
            "devices": {"platform": "gpu", "kind": "a card"},
        }
    )
    said = capsys.readouterr().out
    [row] = [line for line in said.splitlines() if "(published)" in line]
    assert "NVIDIA's U-Net on one NVIDIA A100" in row
    # 8 images in 56.7 ms, three passes of 314.9 GFLOP each.
    assert [cell for cell in ("56.7", "141.0", "133203") if cell not in row] == []
    assert all(f"- {each}" in said for each in NVIDIA.differs)


def test_another_preset_is_refused_by_name(benchmark):
    with pytest.raises(ConfigError, match="no preset 'laptop', but nvidia"):
        benchmark.read_arguments(["laptop"])
