"""A page that segments in the browser: `python experiments/make_demo.py RUN --out SITE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

import tyro
from command_line import parse, run_script
from model_options import ModelOptions

from jaxunet.export.site import make_site


@dataclass(frozen=True)
class Arguments(ModelOptions):
    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of experiments/train.py or import_pytorch.py."""
    out: Path
    """Folder to write the page to; an earlier page there is replaced."""
    runtime: Path | None = None
    """For use without a network: the folder dist/ of the npm package onnxruntime-web, whose
    files are copied. Without it the browser loads them from a CDN, and checks their hashes."""


def main() -> None:
    arguments = parse(Arguments, "Write a page that segments pictures in the browser.")
    written = make_site(
        lambda: arguments.load_to_export(arguments.run),
        arguments.out,
        runtime=arguments.runtime,
    )
    size = sum(path.stat().st_size for path in written)
    print(f"Written: {len(written)} files, {size / 1e6:.1f} MB, to {arguments.out}")
    print("No picture leaves the browser. Put the folder on any web server, or try it here:")
    print(f"python -m http.server --bind 127.0.0.1 --directory {arguments.out}")


if __name__ == "__main__":
    run_script(main)
