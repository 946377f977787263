"""What one sees of a run while it trains: its log's lines, wandb, a trace of its steps."""

import contextlib
import csv
import importlib
import importlib.util
import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import pytest

from jaxunet.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxunet.data import Prepared, prepare
from jaxunet.errors import ConfigError, Stopped
from jaxunet.runs import throughput, wandb_log
from jaxunet.runs.metrics_table import COLUMNS, flat
from jaxunet.runs.profiling import Trace, steps_of
from jaxunet.runs.record import read_metrics
from jaxunet.runs.training import train
from jaxunet.runs.watching import Watch

MISSING = importlib.util.find_spec("wandb") is None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two steps an epoch, two epochs."""
    return Config(
        data=DataConfig(
            image_size=16,
            synthetic_train=16,
            synthetic_validation=8,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
        ),
        model=ModelConfig(width=2, depth=2),
        train=TrainConfig(epochs=2, batch_size=8, eval_batch_size=8, log_every=1),
    )


@pytest.fixture(scope="module")
def data(config: Config) -> Prepared:
    return prepare(config.data, progress=False)


@pytest.fixture(scope="module")
def run(config: Config, data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trace of its second and third step, between which an epoch ends."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config, data, out, show_progress=False, watch=Watch(profile_steps=(1, 3)))
    return out


def test_lines_tell_rate_gradient_speed_and_memory_and_so_does_the_table(run):
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "grad_norm" in line["values"]]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    status = Path("/proc/self/status").read_text()
    resident = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    for line in steps:
        assert set(line["values"]) == {"loss", "grad_norm", "learning_rate"}
        assert set(line["measured"]) == {"examples_per_second", "peak_process_bytes"}
        assert 0.3 * resident < line["measured"]["peak_process_bytes"] <= 1.01 * resident
    with (run / "metrics.csv").open(newline="") as table:
        reader = csv.DictReader(table)
        rows = [{name: cell for name, cell in row.items() if cell} for row in reader]
    assert tuple(reader.fieldnames) == COLUMNS
    assert rows == [{k: str(v) for k, v in flat(line).items()} for line in lines]


def test_pace_is_of_training_alone_and_memory_of_the_fullest_device(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    told = [None, {"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, {}]
    devices = [
        mock.Mock(spec=jax.Device, memory_stats=lambda stats=stats: stats) for stats in told
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    counted = throughput.Throughput()
    clock.now = 100.0  # of an evaluation
    counted.begin()
    counted.add(8)
    counted.add(4)
    clock.now = 103.0
    found = counted.measured()
    assert (found["examples_per_second"], found["peak_device_bytes"]) == (4, 7)
    counted.add(4)
    clock.now = 104.0
    assert counted.measured()["examples_per_second"] == 4
    assert "examples_per_second" not in counted.measured()  # in no time


def events(trace: Path) -> Iterator[tuple[str, dict]]:
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                yield event.name, dict(event.stats)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a type of JAX's has no module
def test_a_trace_has_the_steps_that_were_asked_for_where_tensorboard_looks(run):
    (trace,) = (run / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    found = list(events(trace))
    assert [stats["step_num"] for name, stats in found if name == "train"] == [2, 3]
    programs, executions = defaultdict(set), defaultdict(set)
    for _, stats in found:
        if "hlo_op" in stats:
            programs[stats["program_id"]].add(stats["hlo_op"])
            executions[stats["program_id"]].add(stats["run_id"])
    train_step = max(programs, key=lambda program: len(programs[program]))
    assert len(executions[train_step]) == 2  # whole, and neither the first nor the fourth


def test_a_trace_that_cannot_be_is_refused_before_anything_is_compiled(
    config, data, run, tmp_path, monkeypatch, capfd
):
    for text in ("3", "3:3", "4:3", "-1:3", "a:b"):
        with pytest.raises(ConfigError, match=rf"--profile-steps is '{text}', but must be A:B"):
            steps_of(text)
    assert steps_of("10:13") == (10, 13)

    longer = replace(config, train=replace(config.train, epochs=3))
    for steps, said in (
        ((3, 3), r"is '3:3', but must be A:B"),
        ((4, 7), r"is 4:7, but the run is over after 6 steps"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(longer, data, run, resume=True, watch=Watch(profile_steps=steps))

    # A queue that starts the same command again may be past them.
    past = Trace((1, 3), tmp_path, 2, 4, True)
    assert "no trace: --profile-steps is 1:3, but the run has done 2" in capfd.readouterr().err
    with past.step(2, lambda: None):
        pass
    past.close()
    assert not list(tmp_path.iterdir())

    Trace((2, 3), tmp_path, 0, 4, True).close()
    assert "no trace: the run ended before step 3" in capfd.readouterr().err


def records(file: Path) -> Iterator:
    """What wandb keeps for a later sync: LevelDB's log of protocol buffers, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    contents, place, parts = file.read_bytes(), 7, b""
    while place < len(contents):
        left = -place % 32768
        if left < 7:  # too short for a header
            place += left
            continue
        length, kind = struct.unpack_from("<HB", contents, place + 4)
        parts += contents[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


@pytest.mark.skipif(MISSING, reason="wandb is not installed: jaxunet's extra [wandb]")
def test_a_run_and_its_continuation_are_one_run_of_wandb(config, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = importlib.import_module("wandb")
    wandb_log.check()
    out, watch = tmp_path / "run", Watch(log="wandb")
    train(config, data, out, show_progress=False, watch=watch)
    longer = replace(config, train=replace(config.train, epochs=3))
    train(longer, data, out, resume=True, show_progress=False, watch=watch)

    wandb.teardown()  # waits for what it writes in a process of its own, as an exit does
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found, runs = {}, []
    for file in files:
        for record in records(file):
            if record.HasField("run"):
                runs.append(record.run)
            for item in record.history.item:
                name = item.key or ".".join(item.nested_key)
                found.setdefault(record.history.step.num, {})[name] = item.value_json
    number = (out / wandb_log.ID).read_text().strip()
    assert {(each.run_id, each.project, each.display_name) for each in runs} == {
        (number, "jaxunet", "run")
    }
    wanted: dict[int, dict[str, float]] = {}
    for line in read_metrics(out / "metrics.jsonl"):
        for name, value in (line["values"] | line.get("measured", {})).items():
            wanted.setdefault(line["step"], {})[f"{line['split']}/{name}"] = value
    for step, values in wanted.items():
        told = {name: json.loads(value) for name, value in found[step].items()}
        assert {name: told[name] for name in values} == values
    assert set(found) == set(wanted) == {1, 2, 3, 4, 5, 6}


def test_wandb_that_is_missing_or_knows_nobody_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the package wandb.*jaxunet\[wandb\]"):
        wandb_log.check()

    class Refused(Exception):
        pass

    settings = SimpleNamespace(mode="online")
    login = mock.Mock(side_effect=[False, Refused("The key is of nobody.\nMore.")])
    fake = SimpleNamespace(
        Error=Refused, setup=lambda: SimpleNamespace(settings=settings), login=login
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for said in ("no key was found", "The key is of nobody"):
        with pytest.raises(ConfigError, match=rf"can't log in \({said}\).*WANDB_MODE=offline"):
            wandb_log.check()
    settings.mode = "offline"
    wandb_log.check()
    assert login.mock_calls == 2 * [mock.call(prompt=False, verify=True)]  # asks nobody


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (Stopped("", 15), 0), (Stopped("", None), 0), (OSError(), 1)]
)
def test_wandb_takes_a_stop_for_no_failure(error: Exception | None, code: int):
    log = object.__new__(wandb_log.WandbLog)
    log._run, log._works = mock.Mock(), True
    with contextlib.suppress(Exception), contextlib.closing(log):
        if error:
            raise error
    log._run.finish.assert_called_once_with(exit_code=code)
