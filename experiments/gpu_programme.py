"""What only a GPU can show, part by part: `gpu_programme.py --out DIR [--data-dir ISIC2018]`.

The parts are independent, the most telling first. Each has a limit of its own, and writes into
a folder that is packed again every few seconds. So a cut keeps what there was: in DIR lie
`gpu-programme.json` (what ran, what failed and with which last line) and `gpu-results.tgz`
(results, figures and the log of each part).
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from command_line import parse, run_script
from gpu_parts import HERE, Name, Part, parts

from jaxunet.bench.card import card, share_memory
from jaxunet.devices.environment import command_line, environment
from jaxunet.errors import ConfigError
from jaxunet.files import check_writable, write_json
from jaxunet.ranges import require_positive

ROOT = HERE.parent
PACK_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Arguments:
    data_dir: Path | None = None
    """ISIC 2018 data, for the parts that train on them."""
    out: Path = field(default_factory=lambda: Path("gpu"))
    """Folder for gpu-programme.json and gpu-results.tgz."""
    only: tuple[Name, ...] = ()
    """Parts to run (all, if none is named)."""
    minutes: float = 9.0
    """What is not done by then is stopped; what was measured stays."""
    quick: bool = False
    """Tiny sizes, on any device: to try the programme itself."""

    def __post_init__(self) -> None:
        require_positive("--minutes", self.minutes)


def equal_bits(results: Path) -> dict[str, Any] | None:
    """Whether two runs with --deterministic had the same losses; None if there are no two."""
    paths = [results / f"gpu-deterministic{again}.json" for again in ("", "-again")]
    if not all(path.exists() for path in paths):
        return None
    first, second = (json.loads(path.read_text())["runs"][0]["jaxunet"] for path in paths)
    same = [a == b for a, b in zip(first["losses"], second["losses"], strict=True)]
    first_other = same.index(False) if False in same else None
    return {"steps": len(same), "first_that_differs": first_other}


def run_part(part: Part, seconds: float, log: Path, keep: Callable[[], None]) -> dict[str, Any]:
    """Run one command for at most `seconds`, with `keep` called every few of them.

    Returns:
        `outcome` ("done", "failed" or "cut"), `seconds`, `limit`, `exit_status` and the
        `last_line` of what it said.
    """
    print(f"== {part.name} (at most {seconds:.0f} s): {' '.join(part.command[1:])}", flush=True)
    start = time.perf_counter()
    status: int | None = None
    with log.open("w") as said:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while status is None and (left := start + seconds - time.perf_counter()) > 0:
                try:
                    status = process.wait(timeout=min(left, PACK_EVERY))
                except subprocess.TimeoutExpired:
                    keep()
        finally:
            if status is None:
                _end(process)
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    found = {
        "outcome": "cut" if status is None else "failed" if status else "done",
        "seconds": round(time.perf_counter() - start, 1),
        "limit": round(seconds, 1),
        "exit_status": status,
        "last_line": next((line for line in reversed(lines) if line.strip()), "")[:300],
    }
    print(f"   {found['outcome']} after {found['seconds']} s: {found['last_line']}", flush=True)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started, what outlives it too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def pack(folder: Path, archive: Path) -> None:
    """Everything in `folder`; the archive before it stays until the new one is whole.

    Raises:
        OSError: a file went, or was cut, while it was read.
    """
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(folder, arcname=".")
    part.replace(archive)


def run_programme(chosen: list[Part], arguments: Arguments, record: dict[str, Any]) -> bool:
    """Run the parts, one after the other; whether all were done.

    Args:
        record: the summary, which gets an entry for each part.
    """
    end = time.perf_counter() + 60 * arguments.minutes
    results = Path(record["folder"])
    done = record["parts"] = {part.name: {"outcome": "not begun"} for part in chosen}

    def keep() -> None:
        record["deterministic_runs"] = equal_bits(results)
        write_json(arguments.out / "gpu-programme.json", record)
        pack(results, arguments.out / "gpu-results.tgz")

    def keep_meanwhile() -> None:
        with suppress(OSError):  # a file went meanwhile; a few seconds later it is tried again
            keep()

    try:
        for part in chosen:
            left = end - time.perf_counter()
            if left < part.limit / 2:
                done[part.name] = {"outcome": f"not begun: {left:.0f} s were left"}
                continue
            done[part.name] = {"outcome": "cut with the programme"}  # unless it ends
            log = results / f"{part.name}.log"
            done[part.name] = run_part(part, min(left, part.limit), log, keep_meanwhile)
            keep()
    finally:
        keep()
    return all(each["outcome"] == "done" for each in done.values())


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    arguments = parse(Arguments, "All that only a GPU can show.")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise ConfigError(f"--data-dir is {arguments.data_dir}, which is not a folder.")
    check_writable(arguments.out, "--out")
    share_memory()  # with the parts, too
    record: dict[str, Any] = {"command": command_line(), "card": card(), **environment("torch")}
    if record["devices"]["platform"] != "gpu" and not arguments.quick:
        raise ConfigError(
            f"JAX sees no GPU but {record['devices']['kind']!r}. Install the extra [cuda], or "
            "try the programme itself with --quick."
        )
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.mkdir()
        found = parts(results, arguments.data_dir, quick=arguments.quick)
        missing = set(arguments.only) - {part.name for part in found}
        if missing:
            raise ConfigError(
                f"--only names {', '.join(sorted(missing))}, which trains on ISIC 2018: give "
                "--data-dir."
            )
        chosen = [p for p in found if not arguments.only or p.name in arguments.only]
        record["folder"] = str(results)
        complete = run_programme(chosen, arguments, record)
    for name, part in record["parts"].items():
        print(f"{name:19} {part['outcome']:8} {part.get('last_line', '')[:100]}")
    print(f"Written: {arguments.out}/gpu-programme.json and gpu-results.tgz")
    return 0 if complete else 1


if __name__ == "__main__":
    run_script(main)
