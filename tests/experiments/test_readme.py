"""Every command that the README pages show is run as it stands there, on small data.

Sizes are shortened by one rule, `shortened`. What can't be run here is in `NOT_HERE` with the
reason; a command that is in neither place fails.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from bad_input.ground import SCRIPTS, run
from PIL import Image
from pytorch_designs import ReferenceUNet
from small_data import encoded

from jaxunet.interop.weight_files import save_weights

ROOT = SCRIPTS.parent
PAGES = [page for page in (ROOT / "README.md", SCRIPTS / "README.md") if page.exists()]
SIDE = 32

NOT_HERE = {
    r"python -m pip |pip |uv ": "installs packages; .ci/run does it",
    r"python -m pytest": "these tests",
    r"python tests/faults/kills\.py": "an hour of kills; tests/faults/test_kills.py has fewer",
    r"python tests/faults/long_run\.py": "long; tests/faults/test_long_run.py is short",
    r"python tests/bad_input/record\.py": "minutes; tests/bad_input/test_table.py",
    r"python -m http\.server": "serves until it is stopped; tests/export/test_page.py serves",
    r"tensorboard ": "serves until it is stopped; tests/runs/test_followed.py reads its files",
    r"mpirun ": "needs Open MPI and several hosts",
    r"(\w+=\S+ )*JAX_COORDINATOR_ADDRESS=": "needs peers; tests/devices/test_distributed.py",
    r"python experiments/gpu_programme\.py": "minutes; .ci/run tries it with --quick",
    r"python experiments/benchmark\.py": "wants one device; tests/bench/test_benchmark.py",
    r"python experiments/compile_ahead\.py": "needs libtpu; tests/bench/test_estimate.py",
}


@dataclass(frozen=True)
class Command:
    text: str
    """As it stands on the page, in one line."""
    words: tuple[str, ...]

    @property
    def reason_not_here(self) -> str | None:
        return next(
            (why for start, why in NOT_HERE.items() if re.match(start, self.text)), None
        )


def commands(page: str) -> list[Command]:
    """The commands of all code blocks of shells and of inline code, each once, in order.

    Lines that end in a backslash go on; `&&` joins commands; what follows `#` is a comment.
    A block of something else says so after its fence (```text).
    """
    lines: list[str] = []
    fence: str | None = None
    for line in page.splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().strip("`").lower() if fence is None else None
        elif fence is not None:
            lines += [line] if fence in ("", "bash", "sh", "shell", "console") else []
        else:
            lines += re.findall(r"`((?:\w+=\S+ )*python [\w/]+\.py[^`]*)`", line)
    found: dict[str, Command] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            part, words = words[:end], words[end + 1 :]
            text = shlex.join(part).replace("'", "")
            found.setdefault(text, Command(text, tuple(part)))
    return list(found.values())


FOUND = list({c.text: c for page in PAGES for c in commands(page.read_text())}.values())
HERE = [command for command in FOUND if command.reason_not_here is None]
SMALL = [
    "--data.image-size",
    SIDE,
    "--data.stored-size",
    SIDE,
    "--data.prepared-dir",
    "prepared",
]
TINY = ["--model.width", 4, "--model.depth", 2]
FEW = ["--data.train-split", "train[:20%]"]
ONE_EPOCH = ["--train.epochs", 1, "--train.eval-batch-size", 8, "--optimizer.warmup-steps", 0]
SHORT = {
    "prepare_data.py": SMALL,
    "train.py": [*SMALL, *FEW, *TINY, *ONE_EPOCH, "--data.synthetic-train", 64],
    "evaluate.py": [],
    "gains.py": [],
    "compare.py": [],
    "predict.py": [],
    "show_augmentation.py": [*SMALL, "--pictures", 2, "--draws", 2],
    "reproduce.py": [*SMALL, *FEW, *TINY, *ONE_EPOCH],
    "import_pytorch.py": [*SMALL, "--train.eval-batch-size", 8],
    "export_pytorch.py": [],
    "export.py": [],
    "make_demo.py": [],
}


def shortened(command: Command) -> list[str]:
    """The rule: a script's options for small sizes are added at the end, where they win.

    Epochs that a command asks for are a tenth of it; a run without --out gets a new one.
    """
    words = [w for w in command.words if not re.fullmatch(r"\w+=.*", w)]
    assert words[0] == "python", command.text
    script = Path(words[1]).name
    more = list(map(str, SHORT[script]))
    if "--train.epochs" in words:
        place = words.index("--train.epochs") + 1
        words[place] = str(max(1, int(words[place]) // 10))
        more = [*more, "--train.epochs", words[place]] if more else more
    if script == "train.py" and "--out" not in words:
        preset = words[2] if len(words) > 2 and words[2][0] != "-" else "demo"
        more += ["--out", f"runs/{preset}"]
    return [script, *words[2:], *more]


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A dark disc on skin and its mask, `SIDE` pixels square: easy to learn."""
    rng = np.random.default_rng(seed)
    row, column = rng.uniform(0.35, 0.65, 2) * SIDE
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (y - row) ** 2 + (x - column) ** 2 < (rng.uniform(0.15, 0.3) * SIDE) ** 2
    image = np.where(inside[..., None], (110, 60, 50), (220, 180, 160))
    image = (image + rng.normal(0, 8, image.shape)).clip(0, 255)
    return image.astype(np.uint8), np.where(inside, 255, 0).astype(np.uint8)


def make_isic(folder: Path) -> None:
    """The challenge's zips, of few and small pictures."""
    folder.mkdir()
    for part, first, count in (("Training", 0, 192), ("Validation", 200, 8), ("Test", 300, 3)):
        names = f"ISIC2018_Task1-2_{part}_Input", f"ISIC2018_Task1_{part}_GroundTruth"
        with contextlib.ExitStack() as stack:
            zips = [
                stack.enter_context(zipfile.ZipFile(folder / f"{name}.zip", "w"))
                for name in names
            ]
            for number in range(first, first + count):
                image, mask = pair(number)
                key = f"ISIC_{number:07}"
                zips[0].writestr(f"{names[0]}/{key}.jpg", encoded(image, "JPEG"))
                zips[1].writestr(f"{names[1]}/{key}_segmentation.png", encoded(mask))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the pages' commands name."""
    path = tmp_path_factory.mktemp("readme")
    make_isic(path / "ISIC2018")
    for folder in ("images", "masks"):
        (path / "PICTURES" / folder).mkdir(parents=True)
    (path / "folder").mkdir()
    for number in range(400, 412):
        image, mask = pair(number)
        Image.fromarray(image).save(path / "PICTURES" / "images" / f"{number}.png")
        Image.fromarray(mask).save(path / "PICTURES" / "masks" / f"{number}.png")
        Image.fromarray(image).save(path / "folder" / f"{number}.jpg")
    Image.fromarray(pair(420)[0]).save(path / "photo.jpg")
    weights = {name: value.numpy() for name, value in ReferenceUNet(2).state_dict().items()}
    save_weights(path / "unet.pth", weights)
    return path


def call(place: Path, command: Command, words: list[str]) -> str:
    """Run it in `place`, in this process."""
    given = dict(w.split("=", 1) for w in command.words if re.fullmatch(r"[A-Z]\w*=.*", w))
    out = place / words[words.index("--out") + 1] if "--out" in words else None
    if words[0] in ("train.py", "import_pytorch.py") and "--resume" not in words and out:
        shutil.rmtree(out, ignore_errors=True)  # of another command of the page
    with contextlib.chdir(place), mock.patch.dict(os.environ, given):
        status, output = run(words)
    assert status == 0, f"{command.text}\n{' '.join(words)}\n{output}"
    return output


@pytest.mark.parametrize("command", HERE, ids=lambda command: command.text)
def test_a_command_of_the_readme_works_as_it_stands(place, command):
    assert call(place, command, shortened(command))


def test_the_example_with_an_average_scores_as_the_same_run_without_it(place):
    [command] = [command for command in HERE if "--optimizer.ema-decay" in command.words]
    words = [*shortened(command), "--data.train-split", "train", "--train.epochs", "3"]
    words += ["--train.batch-size", "8", "--data.image-size", "16", "--model.dtype", "float32"]
    words += ["--optimizer.learning-rate", "0.02"]
    at = words.index("--optimizer.ema-decay")
    dice = []
    for number, asked in enumerate([words, words[:at] + words[at + 2 :]]):
        asked[asked.index("--out") + 1] = f"runs/average-{number}"
        call(place, command, asked)
        summary = json.loads((place / f"runs/average-{number}/summary.json").read_text())
        dice.append(summary["scores"]["per_image"]["dice"])
    averaged, plain = dice
    assert plain > 0.8
    assert averaged > plain - 0.01, dice


def test_commands_are_found_as_a_reader_sees_them():
    page = """
Text with `python -P` and `python experiments/a.py RUN --x` inline.

| train | `A=1 python experiments/b.py --y` |

```
python -m pip install -e '.[x]' && python experiments/c.py \\
    --z 1   # comment
gcloud ssh --command "cd x && \\
    python d.py"
#SBATCH --time=1
```

```json
{"python": 1}
```

```bash
python experiments/c.py --z 1
```
"""
    assert [command.text for command in commands(page)] == [
        "python experiments/a.py RUN --x",
        "A=1 python experiments/b.py --y",
        "python -m pip install -e .[x]",
        "python experiments/c.py --z 1",
        "gcloud ssh --command cd x &&      python d.py",
    ]
    assert Command("sudo rm", ("sudo", "rm")).reason_not_here is None  # and then it is run
