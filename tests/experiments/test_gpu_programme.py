"""The programme of measurements: what is kept when a part fails, or the whole is cut."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import get_args

import pytest
from bad_input.ground import run


@pytest.fixture
def programme(scripts, monkeypatch):
    for name in ("gpu_programme", "gpu_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu_programme

    monkeypatch.setattr(gpu_programme, "PACK_EVERY", 0.2)
    return gpu_programme


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", 0], "--minutes is 0.0, but must be a positive number"),
        (["--data-dir", "nowhere"], "--data-dir is nowhere, which is not a folder"),
        (["--out", "/proc/x"], "--out /proc/x cannot be written to"),
    ],
)
def test_it_says_what_is_wrong_before_it_measures(words, message):
    status, output = run(["gpu_programme.py", *words, "--quick"])
    assert status in (1, 2)
    assert message in " ".join(output.split())


def test_parts_find_their_folders_from_where_they_run(programme, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = programme.parts(tmp_path / "results", Path("isic"))
    assert [part.name for part in made] == list(get_args(programme.Name))
    [reproduction] = [part.command for part in made if part.name == "reproduction"]
    assert reproduction[reproduction.index("--data.dir") + 1] == str(tmp_path / "isic")
    for part in made:
        assert part.name == "tests" or str(tmp_path / "results") in part.command
    without = programme.parts(tmp_path / "results")
    gone = {part.name for part in made} - {part.name for part in without}
    assert gone == {"reproduction", "tf32-off"}


def test_a_first_start_finds_nothing_and_a_second_what_the_first_found(programme, tmp_path):
    made = {part.name: part for part in programme.parts(tmp_path)}
    caches = {name: part.environment["XDG_CACHE_HOME"] for name, part in made.items()}
    alone = ("start-full", "start-quick", "start-none", "deterministic", "deterministic-again")
    assert len({caches[name] for name in alone} | {caches["race"]}) == 6
    assert caches["start-again"] == caches["start-full"]
    assert made["start-again"].command[:-1] == made["start-full"].command[:-1]
    for name in ("full", "quick", "none"):
        assert f"--tune {name}" in " ".join(made[f"start-{name}"].command)


@pytest.mark.parametrize(
    ("again", "found"),
    [([0.7, 0.5, 0.3], None), ([0.7, 0.5000001, 0.3], 1)],
)
def test_runs_with_equal_bits_are_told_from_others(programme, tmp_path, again, found):
    assert programme.equal_bits(tmp_path) is None
    for name, losses in (("", [0.7, 0.5, 0.3]), ("-again", again)):
        record = {"runs": [{"jaxunet": {"losses": losses}}]}
        (tmp_path / f"gpu-deterministic{name}.json").write_text(json.dumps(record))
    expected = {"steps": 3, "first_that_differs": found}
    assert programme.equal_bits(tmp_path) == expected


def stand_in(programme, results, name, code, limit=30.0):
    text = f"from pathlib import Path; out = Path({str(results)!r}); {code}"
    return programme.Part(name, limit, [sys.executable, "-c", text])


def files(archive):
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar if m.isfile()}


@pytest.fixture
def whole(programme, tmp_path):
    """Runs parts in `tmp_path`: the summary and the files of the archive."""
    results = tmp_path / "results"
    results.mkdir()

    def run_all(*named, minutes=1.0):
        chosen = [stand_in(programme, results, *each) for each in named]
        arguments = programme.Arguments(out=tmp_path / "out", minutes=minutes)
        programme.run_programme(chosen, arguments, {"folder": str(results)})
        summary = json.loads((tmp_path / "out" / "gpu-programme.json").read_text())
        assert len(list((tmp_path / "out").iterdir())) <= 8
        return summary["parts"], files(tmp_path / "out" / "gpu-results.tgz")

    (tmp_path / "out").mkdir()
    return run_all


def test_a_part_that_fails_or_is_cut_leaves_the_others_and_what_it_wrote(whole):
    slow = "(out / 'half.json').write_text('half'); print('at it', flush=True)"
    found, kept = whole(
        ("race", f"{slow}; import time; time.sleep(60)", 3.0),
        ("tests", "print('one'); raise SystemExit('the last line')"),
        ("training", "(out / 'whole.json').write_text('whole'); print('well')"),
    )
    assert [each["outcome"] for each in found.values()] == ["cut", "failed", "done"]
    assert [each["last_line"] for each in found.values()] == ["at it", "the last line", "well"]
    assert found["race"]["seconds"] < 10
    assert (kept["./half.json"], kept["./whole.json"]) == ("half", "whole")
    assert kept["./tests.log"] == "one\nthe last line\n"


def test_a_part_that_half_its_time_is_not_left_for_is_not_begun(whole):
    found, _ = whole(("race", "print(1)"), ("training", "print(1)", 200.0))
    assert found["race"]["outcome"] == "done"
    assert found["training"]["outcome"].startswith("not begun: ")


def test_results_are_packed_while_a_part_runs(programme, tmp_path):
    seen = []

    def keep():
        programme.pack(tmp_path, tmp_path.parent / "packed.tgz")
        seen.append(files(tmp_path.parent / "packed.tgz"))

    code = "(out / 'first').write_text('1'); import time; time.sleep(2)"
    part = stand_in(programme, tmp_path, "race", code)
    assert programme.run_part(part, 30, tmp_path / "race.log", keep)["outcome"] == "done"
    assert seen[-1]["./first"] == "1"


def test_a_part_takes_what_it_started_along(programme, tmp_path):
    code = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    part = stand_in(programme, tmp_path, "race", code)
    found = programme.run_part(part, 3, tmp_path / "race.log", lambda: None)
    assert found["outcome"] == "cut"
    for _ in range(100):  # a signal takes a moment to arrive
        if not is_alive(int(found["last_line"])):
            return
        time.sleep(0.05)
    pytest.fail("what the part started outlives it")


def is_alive(process):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True)
    return state.stdout.strip()[:1] not in (b"", b"Z")
