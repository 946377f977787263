"""Try every bad input and write what came of each: `python tests/bad_input/record.py`.

Writes `experiments/results/bad-inputs.json`. Exits with 1, and writes nothing, unless every
input gave what the table says.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "experiments" / "results" / "bad-inputs.json"


class Recorder:
    """Collects what the tests recorded of their inputs."""

    def __init__(self) -> None:
        self.table: list[dict[str, str]] = []
        self.fuzzed: dict[str, dict[str, int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        properties: dict[str, Any] = dict(report.user_properties)
        if "input" in properties:
            self.table.append(properties)
        if "fuzzed" in properties:
            self.fuzzed[properties["reader"]] = properties["fuzzed"]


def main() -> int:
    recorder = Recorder()
    status = pytest.main([str(HERE)], plugins=[recorder])
    if status:
        return int(status)
    from jaxunet.devices.environment import environment
    from jaxunet.files import write_json

    outcomes = [row["outcome"] for row in recorder.table]
    fuzzed = sum(sum(found.values()) for found in recorder.fuzzed.values())
    record = {
        "table": {
            "inputs": len(outcomes),
            "as_expected": len(outcomes),
            **{outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
        },
        "fuzzed": {"inputs": fuzzed, **recorder.fuzzed},
        "rows": recorder.table,
        "command": "python tests/bad_input/record.py",
        **environment("pillow", "tensorflow-datasets", "array-record", "torch", "safetensors"),
    }
    write_json(OUT, record)
    print(f"{len(outcomes)} inputs and {fuzzed} fuzzed files: {OUT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
