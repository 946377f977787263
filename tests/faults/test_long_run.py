import sys

import long_run
import pytest

from jaxunet.runs.record import read_metrics


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_memory_files_and_checkpoints_stay_flat(tmp_path):
    """A short one; `experiments/results/long-run.json` holds one of 10,000 steps."""
    found = long_run.watch(1200, tmp_path, interval=0.1, progress=False)
    assert found["flat"]["memory"], found["resident_bytes"]
    assert found["flat"]["open_files"], found["open_files"]
    assert found["flat"]["checkpoints"], found["checkpoints"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "validation"] == list(
        range(100, 1201, 100)
    )


def test_growth_is_seen():
    samples = [
        {
            "step": n,
            "resident_bytes": 40_000 * n,
            "threads": 9,
            "open_files": n,
            "checkpoints": 3,
        }
        for n in range(1000)
    ]
    flat = long_run.describe(samples)["flat"]
    assert not flat["memory"]
    assert flat["memory_grown_mb"] == 20.0
    assert not flat["open_files"]
    assert flat["checkpoints"]
