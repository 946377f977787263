"""A page that segments in the browser: `python experiments/make_demo.py RUN --out SITE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script

from jaxunet.export.site import make_site
from jaxunet.learning.views import Views


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py or import_pytorch.py."""
    out: Path
    """Folder to write the page to; an earlier page there is replaced."""
    runtime: Path | None = None
    """For use without a network: the folder dist/ of the npm package onnxruntime-web, whose
    files are copied. Without it the browser loads them from a CDN, and checks their hashes."""
    views: Views = "none"
    """Average over turned views of the picture, as in evaluate.py; it takes as many times as
    long."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Which checkpoint: the last one, or the best on the validation split."""


def main() -> None:
    arguments = parse(Arguments, "Write a page that segments pictures in the browser.")
    written = make_site(
        arguments.run,
        arguments.out,
        which=arguments.checkpoint,
        views=arguments.views,
        runtime=arguments.runtime,
    )
    size = sum(path.stat().st_size for path in written)
    print(f"Written: {len(written)} files, {size / 1e6:.1f} MB, to {arguments.out}")
    print("No picture leaves the browser. Put the folder on any web server, or try it here:")
    print(f"python -m http.server --bind 127.0.0.1 --directory {arguments.out}")


if __name__ == "__main__":
    run_script(main)
