"""Real processes on the loopback interface: CPU devices, Gloo collectives.

Two groups of processes have four devices in all: one process with four, two with two. What
they train, and each other's half-finished runs that they take up, must agree.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from scripts import FAST_COMPILE

from jaxunet.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxunet.config_json import to_dict
from jaxunet.data import prepare
from jaxunet.devices import distributed
from jaxunet.errors import ConfigError
from jaxunet.runs.record import read_metrics

REPOSITORY = Path(__file__).parents[2]
GROUPS = {"one": (1, 4), "two": (2, 2)}  # processes, devices of each
STRATEGIES = ("pmap", "jit")
EPOCHS, STEPS_PER_EPOCH, EXAMPLES = 2, 5, 37
STOP_BEFORE = 6  # in the middle of the second epoch
HEARTBEAT_TIMEOUT = 10  # seconds, in place of 30
PATIENCE = 300


def environment(devices: int, processes: int = 1) -> list[dict[str, str]]:
    """What to start each process of a group with."""
    base = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}",
        "PYTHONPATH": str(REPOSITORY),
    }
    if processes == 1:
        return [base]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        base
        | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        for index in range(processes)
    ]


class Group:
    """Processes that run one command together."""

    started: "list[Group]" = []  # noqa: RUF012 -- shared on purpose: `leftovers` ends them

    def __init__(self, folder: Path, processes: int, devices: int, *command: str):
        folder.mkdir(parents=True)
        self.folder, self.asked, self.size = folder, 0, processes
        Group.started.append(self)
        self.logs = [folder / f"log-{index}.txt" for index in range(processes)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env=env,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                text=True,
            )
            for env, log in zip(environment(devices, processes), self.logs, strict=True)
        ]

    def said(self, process: int) -> str:
        return self.logs[process].read_text()

    def send(self, **job: object) -> Path:
        """Give every process a job; what `answers` then waits for."""
        self.asked += 1
        answer = self.folder / f"answer-{self.asked}"
        for process in self.processes:
            process.stdin.write(json.dumps({**job, "answer": str(answer)}) + "\n")
            process.stdin.flush()
        return answer

    def answers(self, answer: Path) -> list[dict]:
        paths = [answer.with_name(f"{answer.name}.{index}") for index in range(self.size)]
        self.wait_until(lambda: all(path.exists() for path in paths), alive=True)
        return [json.loads(path.read_text()) for path in paths]

    def ask(self, **job: object) -> list[dict]:
        return self.answers(self.send(**job))

    def wait_until(self, condition, *, alive: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = alive and any(p.poll() is not None for p in self.processes)
            if ended or time.monotonic() > deadline:
                logs = [f"--- {i}\n{self.said(i)[-3000:]}" for i in range(self.size)]
                pytest.fail("\n".join(["ended" if ended else "too slow", *logs]))
            time.sleep(0.05)

    def statuses(self, within: float) -> list[int]:
        """Exit statuses, when all have ended."""
        deadline = time.monotonic() + within
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()


def worker(
    folder: Path, processes: int, devices: int, heartbeat: int = HEARTBEAT_TIMEOUT
) -> Group:
    script = str(Path(__file__).with_name("distributed_worker.py"))
    return Group(folder, processes, devices, script, str(heartbeat))


@pytest.fixture(scope="module", autouse=True)
def leftovers():
    yield
    for group in Group.started:
        group.kill()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """37 examples in batches of 8: the last one of an epoch is padded."""
    config = Config(
        data=DataConfig(
            image_size=16,
            prepared_dir=tmp_path_factory.mktemp("prepared"),
            synthetic_train=EXAMPLES,
            synthetic_validation=9,
        ),
        model=ModelConfig(width=2, depth=2, init="he", norm="batch", conv_bias=False),
        optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9),
        train=TrainConfig(epochs=EPOCHS, batch_size=8, eval_batch_size=8, log_every=1),
    )
    prepare(config.data, progress=False)
    return config


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> dict[str, Group]:
    folder = tmp_path_factory.mktemp("groups")
    return {name: worker(folder / name, *shape) for name, shape in GROUPS.items()}


@pytest.fixture(scope="module")
def runs(groups, config, tmp_path_factory):
    """Run directories and answers: unbroken by group and strategy, and stopped ones."""
    folder = tmp_path_factory.mktemp("runs")
    sent = {}
    for name, group in groups.items():
        for parallel in (*STRATEGIES, "stopped"):
            out = folder / f"{name}-{parallel}"
            job = {"do": "train", "config": to_dict(config), "out": str(out), "resume": False}
            if parallel == "stopped":
                last = group.size - 1
                job["interrupt"] = {"what": "SIGTERM", "process": last, "batch": STOP_BEFORE}
                job |= {"parallel": "jit", "may_fail": True}
            else:
                job["parallel"] = parallel
            sent[name, parallel] = out, group.send(**job)
    return {
        (name, parallel): (out, groups[name].answers(answer))
        for (name, parallel), (out, answer) in sent.items()
    }


def state(run: Path) -> list[np.ndarray]:
    with np.load(run / "state.npz") as arrays:
        return list(arrays.values())


def assert_same_training(run: Path, expected: Path) -> None:
    """The same loss at every step, scores at every epoch and parameters at the end."""
    found, wanted = (read_metrics(path / "metrics.jsonl") for path in (run, expected))
    assert [(line["step"], line["split"]) for line in found] == [
        (line["step"], line["split"]) for line in wanted
    ]
    for a, b in zip(found, wanted, strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-5)
    for a, b in zip(state(run), state(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_several_processes_train_as_one_with_as_many_devices(runs, parallel):
    out, answers = runs["two", parallel]
    assert_same_training(out, runs["one", parallel][0])
    assert len({answer["digest"] for answer in answers}) == 1
    assert all(answer["scores"] == answers[0]["scores"] for answer in answers)
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("name", GROUPS)
def test_every_example_is_read_once_an_epoch_by_one_process(runs, name):
    _, answers = runs[name, "jit"]
    read = [index for answer in answers for index in answer["read"]]
    assert sorted(read) == sorted(EPOCHS * list(range(EXAMPLES)))
    most = EPOCHS * STEPS_PER_EPOCH * 8 // GROUPS[name][0]
    assert all(len(answer["read"]) <= most for answer in answers)


@pytest.mark.parametrize("name", GROUPS)
def test_a_signal_to_one_process_stops_all_at_the_same_step(runs, name):
    _, answers = runs[name, "stopped"]
    assert {kind for kind, _ in (answer["error"] for answer in answers)} == {"Stopped"}
    assert len({message for _, message in (answer["error"] for answer in answers)}) == 1
    step = int(answers[0]["error"][1].split("after step ")[1].split()[0])
    assert STEPS_PER_EPOCH < step < EPOCHS * STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("before", "after", "parallel"),
    [("two", "one", "jit"), ("one", "two", "pmap")],
)
def test_a_run_goes_on_with_another_number_of_processes(
    groups, runs, config, tmp_path, before, after, parallel
):
    out = tmp_path / "run"
    shutil.copytree(runs[before, "stopped"][0], out)
    answers = groups[after].ask(
        do="train", config=to_dict(config), out=str(out), parallel=parallel, resume=True
    )
    assert all(answer["first_step"] > STEPS_PER_EPOCH for answer in answers)
    assert len({answer["digest"] for answer in answers}) == 1
    assert_same_training(out, runs["one", parallel][0])


def test_several_processes_score_as_one(groups, runs):
    run = str(runs["one", "jit"][0])
    strategies = {"one": "jit", "two": "pmap"}
    sent = {
        name: group.send(do="score", run=run, parallel=strategies[name])
        for name, group in groups.items()
    }
    found = {name: groups[name].answers(answer) for name, answer in sent.items()}
    for answer in found["two"]:
        assert answer["counts"] == found["one"][0]["counts"]
        assert answer["loss"] == pytest.approx(found["one"][0]["loss"], rel=1e-6)


def test_a_refused_run_directory_is_refused_on_every_process(groups, runs, config):
    out, _ = runs["two", "jit"]
    answers = groups["two"].ask(
        do="train",
        config=to_dict(config),
        out=str(out),
        parallel="jit",
        resume=False,
        may_fail=True,
    )
    for answer in answers:
        kind, message = answer["error"]
        assert kind == "RunError"
        assert "already holds a complete run" in message


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"data": {"synthetic_train": EXAMPLES - 7}}, r"data\.counts\.train: 37 -> 30"),
        ({"data": {"synthetic_seed": 5}}, r"Differing: data\.fingerprint: '\w+' -> '\w+'\."),
        ({"train": {"seed": 5}}, r"Differing: config\.train\.seed: 0 -> 5\."),
        ({"weights": "abc"}, r"Differing: sha256\.--init-from: 'none' -> 'abc'\."),
    ],
)
def test_a_host_that_differs_is_named_before_anything_hangs(
    groups, config, tmp_path, differs, said
):
    answers = groups["two"].ask(
        do="train",
        config=to_dict(config),
        out=str(tmp_path / "run"),
        parallel="jit",
        resume=False,
        may_fail=True,
        differs={"process": 1, **differs},
    )
    for answer in answers:
        kind, message = answer["error"]
        assert kind == "RunError"
        assert re.search(rf"Process 0 \(on .*\) does not fit process 1 \(on .*{said}", message)
    assert not (tmp_path / "run" / "config.json").exists()


def test_data_are_prepared_by_process_0_while_the_others_wait(groups, config, tmp_path):
    record = to_dict(config)
    record["data"]["prepared_dir"] = str(tmp_path / "prepared")
    answers = groups["two"].ask(do="prepare", config=record)
    assert [answer["found"] for answer in answers] == [[False], [True]]
    assert all(answer["counts"]["train"] == EXAMPLES for answer in answers)


def test_unusable_data_stop_every_process(groups, config, tmp_path):
    record = to_dict(config)
    record["data"] |= {"name": "folder", "dir": str(tmp_path / "nowhere")}
    answers = groups["two"].ask(do="prepare", config=record, may_fail=True)
    assert {answer["error"][0] for answer in answers} == {"SourceGone"}
    assert len({answer["error"][1] for answer in answers}) == 1


def test_arrays_of_process_0_arrive_bit_for_bit(groups):
    expected = np.array([-0.0, np.nan, 0], np.float32).tobytes().hex()
    assert groups["two"].ask(do="bits") == 2 * [{"a": expected, "b": 3}]


def test_a_failure_of_one_process_stops_all_with_its_message(config, tmp_path):
    # Process 0 leaves last; on a busy machine 10 s may pass until it does.
    group = worker(tmp_path / "group", 3, 1, heartbeat=60)
    sizes = replace(config.train, batch_size=3, eval_batch_size=3)
    plain = replace(config, model=ModelConfig(width=2, depth=2), train=sizes)
    group.send(
        do="train",
        config=to_dict(plain),
        out=str(tmp_path / "run"),
        parallel="pmap",
        resume=False,
        interrupt={"what": "fail", "process": 1, "batch": 3},
    )
    assert group.statuses(PATIENCE) == [1, 1, 1]
    assert "process 1 of 3 error: a row that only this process reads" in group.said(1)
    for index in (0, 2):
        said = group.said(index)
        assert f"process {index} of 3 stops, because process 1 failed: a row" in said


def test_a_frozen_process_is_noticed_by_its_missing_heartbeat(groups, config, tmp_path):
    """Last for the group of two, which it ends."""
    group = groups["two"]
    group.send(
        do="train",
        config=to_dict(config),
        out=str(tmp_path / "run"),
        parallel="jit",
        resume=False,
        interrupt={"what": "SIGSTOP", "process": 1, "batch": 3},
    )
    main, frozen = group.processes
    assert main.wait(PATIENCE)
    assert "heartbeat" in group.said(0)
    # Process 0 served all others: one that comes back finds it gone, and ends too.
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(30)
    assert "another task died" in group.said(1)


def test_a_killed_process_ends_the_others_and_a_restart_completes(config, tmp_path):
    """By the script that people run."""
    out = tmp_path / "run"
    script = str(REPOSITORY / "experiments" / "train.py")
    options = {
        "data.prepared-dir": config.data.prepared_dir,
        "data.image-size": 16,
        "data.synthetic-train": EXAMPLES,
        "data.synthetic-validation": 9,
        "model.width": 2,
        "model.depth": 2,
        "optimizer.schedule": "constant",  # a cosine would have to be told of other epochs
        "optimizer.warmup-fraction": 0,
        "train.batch-size": 8,
        "train.eval-batch-size": 8,
        "out": out,
    }
    command = [script, "--distributed", "--resume"]
    command += [f"--{name}={value}" for name, value in options.items()]

    def latest() -> int:
        names = [path.name for path in (out / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    group = Group(tmp_path / "first", 2, 1, *command, "--train.epochs=1000")
    group.wait_until(latest, alive=True)
    group.processes[1].kill()
    assert group.processes[0].wait(30) == 1
    assert "one of them was killed or cannot be reached" in group.said(0)

    epochs = -(-latest() // STEPS_PER_EPOCH) + 1
    group = Group(tmp_path / "second", 2, 1, *command, f"--train.epochs={epochs}")
    assert group.statuses(PATIENCE) == [0, 0], group.said(0)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["epoch"] == epochs
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert "Checkpoint:" in group.said(0)
    assert "Checkpoint:" not in group.said(1)
    assert {p.name for p in (out / "figures").iterdir()} == {"curves.png", "predictions.png"}


def test_a_lost_process_is_known_by_every_error_that_jax_has_for_it():
    """Which one a kill gives depends on the moment; the test above meets either."""
    text = (
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
        "Connection closed by peer [127.0.0.1]:58081"
    )
    for error in (jax.errors.JaxRuntimeError(text), ValueError(text)):
        assert distributed._is_loss(error)
    for other in (
        ValueError("the connection of skips needs equal sizes"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        OSError(text),
    ):
        assert not distributed._is_loss(other)


def test_a_malformed_environment_is_named(monkeypatch):
    monkeypatch.setenv(distributed.COUNT, "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES is 'two'"):
        distributed.initialize()
    monkeypatch.setenv(distributed.COUNT, "2")
    monkeypatch.setenv(distributed.ADDRESS, "somewhere")
    with pytest.raises(ConfigError, match="'somewhere', but must be host:port"):
        distributed.initialize()


def test_without_others_in_the_environment_it_says_what_to_set(tmp_path):
    script = str(REPOSITORY / "experiments" / "train.py")
    group = Group(tmp_path / "group", 1, 1, script, "--distributed")
    assert group.statuses(PATIENCE) == [1]
    assert group.said(0).startswith("error: --distributed could not join the other processes")
    assert "set JAX_COORDINATOR_ADDRESS (host:port of process 0)" in group.said(0)
