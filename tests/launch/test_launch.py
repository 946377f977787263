"""The files of `experiments/launch/`: checked by tools, and run with stand-ins for clusters."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest
import yaml
from scripts import FAST_COMPILE, SCRIPTS

from jaxunet.data import prepare
from jaxunet.devices.strategies import make_strategy
from jaxunet.runs import training
from jaxunet.runs.loading import load
from jaxunet.runs.record import load_config, read_metrics

LAUNCH = SCRIPTS / "launch"
SHELL = sorted(LAUNCH.glob("*.sh"))
SCHEMA = Path(__file__).with_name("jobset.schema.json")
TIMEOUT = 300  # seconds
LAST_PORTS = 2**12  # from the end of all, one of which JAX takes by the number of Slurm's job

SRUN = """\
# Two tasks on this machine, each with what Slurm would give it; the first time they are warned.
while [[ $1 == -* ]]; do shift; done
for id in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$id SLURM_LOCALID=$id \\
    "$@" >>"$HERE/task-$id.log" 2>&1 &
  tasks+=($!)
done
if [ ! -e "$HERE/warned" ]; then
  until [ -s "$HERE/run/metrics.jsonl" ] || ! kill -0 "${tasks[@]}"; do sleep 0.02; done
  touch "$HERE/warned"
  kill -USR1 "${tasks[@]}"
fi
highest=0
for task in "${tasks[@]}"; do
  wait "$task"
  status=$?
  if [ $status -gt $highest ]; then highest=$status; fi
done
exit $highest
"""


def edited(script: Path, folder: Path, **lines: str) -> Path:
    """A copy of which three lines, those that a user edits, are others."""
    text = script.read_text()
    for name, value in lines.items():
        text, count = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, name
    copy = folder / script.name
    copy.write_text(text)
    return copy


def command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_three_lines_are_to_be_edited(script):
    below = script.read_text().split("# Edit these three")[1].split("\n\n")[0]
    assert len(re.findall(r"^\w+=", below, flags=re.MULTILINE)) == 3


def test_under_slurm_a_run_is_warned_queued_again_and_ends_as_one_left_alone(
    tmp_path, monkeypatch
):
    bin_, run = tmp_path / "bin", tmp_path / "run"
    command(bin_, "python", f'exec {shlex.quote(sys.executable)} "$@"')
    command(bin_, "srun", SRUN)
    command(bin_, "scontrol", 'echo "$@" >>"$HERE/requeued"')
    # Before batch norm a bias has a gradient of rounding alone, which Adam makes steps of.
    script = edited(
        LAUNCH / "slurm.sh",
        tmp_path,
        data="(--data.image-size 16 --data.synthetic-train 37 --data.synthetic-validation 9 "
        f"--data.prepared-dir {tmp_path}/prepared)",
        run=str(run),
        options="(--model.width 2 --model.depth 2 --model.norm batch --model.no-conv-bias "
        "--train.epochs 6 --train.batch-size 8 --train.eval-batch-size 8 --train.log-every 1)",
    )
    with socket.socket() as probe:
        port = next(p for p in range(65535, 65535 - LAST_PORTS, -1) if _is_free(probe, p))
    job = str(7 * LAST_PORTS + port - (65535 - LAST_PORTS + 1))
    environment = os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPTS.parent),
        "HERE": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILE,
        "SLURM_JOB_ID": job,
        "SLURM_CPUS_PER_TASK": "1",
    }

    def submitted() -> int:
        with subprocess.Popen(
            ["bash", script], env=environment, cwd=SCRIPTS.parent, start_new_session=True
        ) as process:
            try:
                return process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise

    def said() -> str:
        return "\n".join(log.read_text() for log in sorted(tmp_path.glob("task-*.log")))

    assert submitted() == 128 + signal.SIGUSR1, said()
    assert "Stopped by SIGUSR1 after step" in said()
    assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
    before = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert submitted() == 0, said()
    assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
    assert 0 < before < 6 * 5

    config, alone = load_config(run), tmp_path / "alone"
    monkeypatch.setattr(
        training, "make_strategy", lambda name, _=None: make_strategy(name, jax.devices()[:2])
    )
    training.train(config, prepare(config.data, progress=False), alone, show_progress=False)
    assert _scores(run) == _scores(alone)
    found, wanted = (read_metrics(each / "metrics.jsonl") for each in (run, alone))
    assert [(x["step"], x["split"]) for x in found] == [(x["step"], x["split"]) for x in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-5)
    for a, b in zip(
        *(jax.tree.leaves(load(each).variables) for each in (run, alone)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _is_free(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind(("localhost", port))
    except OSError:
        return False
    return True


def _scores(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "summary.json").read_text())["scores"]


def test_every_worker_of_a_slice_is_given_the_same_command(tmp_path):
    command(tmp_path / "bin", "gcloud", 'printf "%s\\n" "$@" >"$HERE/asked"')
    script = edited(
        LAUNCH / "tpu_pod.sh",
        tmp_path,
        slice="(pod --zone here)",
        data="(--data.dir '/mnt/two words')",
        options="(reference --out runs/a)",
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", script], env=os.environ | {"PATH": path, "HERE": str(tmp_path)}, check=True
    )
    *words, last = (tmp_path / "asked").read_text().splitlines()
    assert " ".join(words) == ("compute tpus tpu-vm ssh pod --zone here --worker=all --command")
    there, training_ = last.split(" && ")
    assert there == "cd jaxunet"
    assert shlex.split(training_) == [
        *("python3", "experiments/train.py", "reference", "--out", "runs/a"),
        *("--data.dir", "/mnt/two words", "--distributed", "--resume"),
    ]


@pytest.fixture
def documents():
    return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))


@pytest.fixture
def validator():
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_jobset_is_one_by_its_published_schema(documents, validator):
    assert (LAUNCH / "jobset.yaml").read_text().count("# edit") == 3
    jobset = documents[0]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert [error.message for error in validator.iter_errors(jobset)] == []
    # The schema is closed down to the container.
    [workers] = jobset["spec"]["replicatedJobs"]
    [container] = workers["template"]["spec"]["template"]["spec"]["containers"]
    for part in (jobset["spec"], workers["template"]["spec"], container):
        part["nodes"] = "2"
        assert "'nodes' was unexpected" in next(validator.iter_errors(jobset)).message
        del part["nodes"]
    container["args"].append(16)
    assert "16 is not of type 'string'" in next(validator.iter_errors(jobset)).message


def test_the_jobset_has_what_jax_asks_kubernetes_for(documents):
    """As `jax._src.clusters.k8s_cluster` reads them."""
    jobset, account, role, binding = documents
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    assert workers["replicas"] == 1  # process 0 is the first pod of its own job
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": pod["serviceAccountName"]}
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    granted = {
        (verb, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    assert {("list", "pods"), ("get", "jobs"), ("list", "services")} <= granted
    assert {"--distributed", "--resume"} <= set(pod["containers"][0]["args"])
