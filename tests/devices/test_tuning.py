"""What is asked of XLA on a GPU, and what is kept of its search.

No card is needed: where JAX starts is pretended, and so is what XLA leaves behind.
"""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scripts import SMALL
from scripts import run as run_script

from jaxunet.config import TrainConfig
from jaxunet.devices import algorithms, tuning
from jaxunet.devices.tuning import DUMP, LEVEL, LOAD, Tuning
from jaxunet.runs.loading import load
from jaxunet.runs.record import recorded_tuning


def results(**chosen: int) -> str:
    """As XLA writes what it chose for each operation."""
    entries = (
        f'results {{\n  device: "CUDA: 9.0, \\"Cores\\": 132"\n  hlo: "{{\\n  {name} }}"\n'
        f"  result {{\n    algorithm {{\n      algo_id: {algorithm}\n    }}\n"
        "    other {\n      [type.googleapis.com/xla.Of] {\n        a: -1.5e-05\n      }\n"
        "    }\n  }\n}\n"
        for name, algorithm in chosen.items()
    )
    return "version: 3\n" + "".join(entries)


@pytest.fixture
def process(monkeypatch, tmp_path):
    """As a process on a machine with a GPU: what it begins with, and finds; see below."""
    monkeypatch.setattr(tuning, "on_gpu", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "")
    caches = jax.config.jax_persistent_cache_enable_xla_caches

    def whole(run=None, found=None, *, given="", recorded=None, several=False, **options):
        """XLA's flags, and what it is to load; `found` is what it leaves."""
        ends = []
        register = lambda *words, **more: ends.append(partial(*words, **more))  # noqa: E731
        monkeypatch.setattr(tuning.atexit, "register", register)
        monkeypatch.setattr(tuning, "_search", None)
        monkeypatch.setenv("XLA_FLAGS", given)
        tuning.use(Tuning(**options), run and tmp_path / run, recorded, several=several)
        flags = dict(flag.partition("=")[::2] for flag in os.environ["XLA_FLAGS"].split())
        loaded = Path(flags[LOAD]).read_text() if LOAD in flags else None
        if found is not None:
            Path(flags[DUMP]).write_text(found)
        if run is not None:
            tuning.keep(tmp_path / run)
        for end in reversed(ends):
            end()
        return flags, loaded

    yield whole
    if any(tmp_path.glob("cache/*")):
        os.close(tuning._NUMBER)
    jax.config.update("jax_persistent_cache_enable_xla_caches", caches)


def kept(tmp_path, run):
    [path] = (tmp_path / run / "tuning").iterdir()
    return path.read_text()


@pytest.mark.parametrize(
    ("asked", "recorded", "level", "deterministic"),
    [
        ({}, None, None, False),
        ({"tune": "quick"}, None, "2", False),
        ({"tune": "none"}, None, "0", False),
        ({"tune": "quick", "deterministic": True}, None, None, True),
        ({}, {"tune": "quick"}, "2", False),
        ({"tune": "full"}, {"tune": "quick"}, None, False),
        ({"tune": "full"}, {"tune": "none", "deterministic": True}, None, True),
        ({}, {"tune": "level 3"}, None, False),
    ],
)
def test_xla_is_told_what_is_asked_for_or_was_when_the_run_began(
    asked, recorded, level, deterministic, process
):
    flags, _ = process(recorded=recorded, **asked)
    assert flags.get(LEVEL) == level
    exact = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    assert [flags.get(name) for name in exact] == ["true" if deterministic else None] * 2
    assert (DUMP in flags) == (level != "0" and not deterministic)
    # Only a full search shares XLA's files by fusion, which don't say how they were found.
    caches = jax.config.jax_persistent_cache_enable_xla_caches
    assert (caches == "none") == (deterministic or level is not None)


def test_without_a_gpu_nothing_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "on_gpu", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    tuning.use(Tuning(tune="none", deterministic=True), tmp_path)
    tuning.keep(tmp_path)
    assert os.environ["XLA_FLAGS"] == "--mine"
    assert not list(tmp_path.iterdir())


def test_a_users_own_flags_stay_and_an_option_comes_after_them(process):
    own = {LEVEL: "1", "--mine": ""}
    flags, _ = process(given=f"{LEVEL}=1 --mine")
    assert {name: flags[name] for name in own} == own
    assert tuning.record()["tune"] == "level 1"
    process(given=f"{LEVEL}=1 --mine", tune="quick")
    assert tuning.record()["tune"] == "quick"
    flags, _ = process(given=f"{DUMP}=/here.textproto")
    assert flags == {DUMP: "/here.textproto"}
    # Those of the process that started this one name its folder, which is not here.
    flags, _ = process(given=f"{LOAD}={tuning._FOLDER}/0.textproto --mine")
    assert LOAD not in flags
    assert "--mine" in flags


def test_several_processes_search_together_and_keep_nothing(process, tmp_path):
    process("a", results(conv=1))
    flags, _ = process("a", several=True, tune="quick")
    assert flags == {LEVEL: "2"}


def test_a_run_goes_on_with_the_algorithms_it_began_with(process, tmp_path):
    first, loaded = process("a", results(conv=1))
    assert loaded is None
    second, loaded = process("b", results(conv=1, other=2))
    assert loaded == results(conv=1)
    # Resumed or evaluated, at whatever level, with its own; others with all that is known.
    own, loaded = process("a", tune="quick")
    assert loaded == results(conv=1)
    third, loaded = process("c")
    assert loaded == results(conv=1, other=2) == kept(tmp_path, "c")  # nothing was compiled
    _, loaded = process("q", tune="quick")
    assert loaded == results(conv=1)
    # JAX finds a program by the flags: those of other results are another's.
    assert own[LOAD] == second[LOAD] != third[LOAD]
    assert first[DUMP] == third[DUMP]


def test_what_is_found_later_is_added_and_changes_nothing(process, tmp_path):
    process("a", results(conv=1))
    before, _ = process("a", results(conv=1, evaluation=2))
    assert kept(tmp_path, "a") == results(conv=1, evaluation=2)
    after, loaded = process("a")
    assert loaded == results(conv=1, evaluation=2)
    assert before[LOAD] != after[LOAD]
    # Of a process that began before, and found another algorithm.
    [path] = (tmp_path / "a" / "tuning").iterdir()
    algorithms.add(path, results(conv=7, evaluation=7, third=3))
    assert path.read_text() == results(conv=1, evaluation=2, third=3)


def test_what_is_torn_is_neither_kept_nor_loaded(process, tmp_path):
    process("a", results(conv=1))
    whole = results(conv=1, other=2)
    torn = [whole[:-1], whole[:-2], whole[: len(whole) // 2], whole + "}\n", "", whole[1:]]
    torn += [whole.replace('"CUDA', "CUDA", 1), results(a=1) + whole, whole[:-40] + whole]
    for each in torn:
        process("a", each)
        assert kept(tmp_path, "a") == results(conv=1)
    [path] = (tmp_path / "a" / "tuning").iterdir()
    path.write_text(torn[0])
    assert process("a", whole)[1] == results(conv=1)  # from the user's cache folder
    assert kept(tmp_path, "a") == whole


def test_several_writers_lose_nothing(tmp_path):
    """Threads: a lock belongs to an opened file, as that of another process does."""
    names = [f"conv_{n}" for n in range(12)]
    path = tmp_path / "results.textproto"
    threads = [
        threading.Thread(target=algorithms.add, args=(path, results(**{name: n})))
        for n, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = algorithms.read(path)
    assert found is not None
    assert all(found.count(f"  {name} ") == 1 for name in names)
    assert found.count("results {") == len(names)
    assert len(list(tmp_path.iterdir())) == 1


def test_in_a_process_xla_takes_the_flags_and_what_was_found_is_kept_at_its_end(tmp_path):
    code = """
import os, sys
from pathlib import Path
from jaxunet.devices import tuning
tuning.on_gpu = lambda: True
tuning.use(tuning.Tuning(tune="quick"))
os.environ["XLA_FLAGS"] += " " + " ".join(tuning.EXACT)
import jax
print(jax.jit(lambda x: x + 1)(1))  # an unknown flag would end the process
Path(tuning._DUMPED).write_text(sys.argv[1])
"""
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, results(conv=1)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **variables},
    )
    assert done.stdout == "2\n", done.stderr
    [shared] = (tmp_path / "cache" / "jaxunet" / "tuning").iterdir()
    assert shared.name.startswith("quick-")
    assert shared.read_text() == results(conv=1)
    assert not list(tmp_path.glob("jaxunet-tuning-*"))


def test_a_record_says_how_algorithms_were_chosen_and_what_may_differ(process, tmp_path):
    process()
    assert "differ in rounding" in tuning.record()["equal_runs"]
    process(deterministic=True)
    found = json.loads(json.dumps(tuning.record()))
    assert (found["tune"], found["deterministic"]) == ("none", True)
    assert found["equal_runs"].startswith("the same bits")
    path = tmp_path / "config.json"
    assert recorded_tuning(tmp_path) == {}
    for recorded, expected in [({"tuning": found}, found), ({"tuning": "not on a GPU"}, {})]:
        path.write_text(json.dumps({"config": {}, **recorded}))
        assert recorded_tuning(tmp_path) == expected


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train", ["--resume", "--out", "RUN"]),
        ("evaluate", ["RUN"]),
        ("predict", ["RUN", "picture.png", "--out", "masks"]),
    ],
)
def test_scripts_go_on_as_the_run_began(script, words, monkeypatch, tmp_path):
    from jaxunet.config import Config
    from jaxunet.config_json import to_dict

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    main = __import__(script).main
    record = {"tune": "quick", "deterministic": True}
    contents = json.dumps({"config": to_dict(Config()), "tuning": record})
    (tmp_path / "config.json").write_text(contents)
    argv = [script, *(word.replace("RUN", str(tmp_path)) for word in words), "--tune", "none"]
    monkeypatch.setattr(sys, "argv", argv)
    used = []

    def use(options, run, recorded, *, several=False):
        used.append((options.tune, run, recorded, several))
        raise InterruptedError

    monkeypatch.setattr(tuning, "use", use)
    with pytest.raises(InterruptedError):
        main()
    assert used == [("none", tmp_path, record, False)]


@pytest.mark.parametrize(
    ("platforms", "gpu"), [("cpu", False), ("tpu,cpu", False), ("cuda", True), ("gpu", True)]
)
def test_a_platform_that_is_asked_for_is_taken_at_its_word(monkeypatch, platforms, gpu):
    monkeypatch.setattr(
        tuning, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms))
    )
    assert tuning.on_gpu() is gpu


def test_else_it_takes_a_card_and_what_drives_it(monkeypatch, tmp_path):
    monkeypatch.setattr(
        tuning, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=None))
    )
    card = tmp_path / "nvidia0"
    monkeypatch.setattr(tuning, "DEVICE_FILES", (str(card),))
    monkeypatch.setattr(tuning, "PLUGINS", ("json",))  # is there
    assert not tuning.on_gpu()
    card.touch()
    assert tuning.on_gpu()
    monkeypatch.setattr(tuning, "PLUGINS", ("not_a_plugin",))
    assert not tuning.on_gpu()


@pytest.mark.parametrize(("platform", "expected"), [("cpu", 4), ("tpu", 4), ("gpu", 32)])
def test_only_a_gpu_evaluates_in_training_batches_unless_asked_otherwise(
    monkeypatch, platform, expected
):
    monkeypatch.setattr(tuning.jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    assert tuning.eval_batch_size(TrainConfig(batch_size=32)) == expected
    assert tuning.eval_batch_size(TrainConfig(batch_size=32, eval_batch_size=6)) == 6


@pytest.mark.skipif(
    jax.devices()[0].platform != "gpu",
    reason="takes a GPU: on a CPU all runs are equal bit for bit, as test_training.py shows",
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_equal_runs_and_a_resumed_one_on_a_gpu(deterministic, tmp_path, monkeypatch):
    """With --deterministic they are equal bit for bit, without it to rounding."""
    # Else the second process would find the programs of the first.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    words = ["train.py", *SMALL, "--optimizer.schedule", "constant"]
    words += ["--data.prepared-dir", tmp_path / "data"]
    words += ["--deterministic"] * deterministic
    for run in ("a", "b"):
        run_script(*words, "--out", tmp_path / run)
    run_script(*words, "--train.epochs", 1, "--out", tmp_path / "resumed")
    run_script(*words, "--out", tmp_path / "resumed", "--resume")
    assert recorded_tuning(tmp_path / "resumed")["deterministic"] == deterministic
    a, b, resumed = (load(tmp_path / run) for run in ("a", "b", "resumed"))
    assert a.step == b.step == resumed.step > 1
    tolerance = {} if deterministic else {"rtol": 1e-2, "atol": 1e-3}
    same = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    for other in (b, resumed):
        jax.tree.map(partial(same, **tolerance), a.variables, other.variables)
