"""How `experiments/tutorial.ipynb` is committed: its text, its code, and its figures alone.

    python tests/notebooks.py            run it here, and keep what of it is committed
    python tests/notebooks.py --as-it-is only drop the rest, from one that was run by hand

What cells print is dropped, with all that says where and when they ran: paths, versions, times,
the kernel's name. Figures are made small: a few colours, and no wider than a page.
"""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

TUTORIAL = Path(__file__).parents[1] / "experiments" / "tutorial.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDEST, COLOURS = 860, 128


def committed(notebook: dict[str, Any]) -> dict[str, Any]:
    """`notebook` without what is not committed."""
    return {
        "cells": [_cell(cell) for cell in notebook["cells"]],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,  # the first in which cells have ids
    }


def text_of(notebook: dict[str, Any]) -> str:
    """As Jupyter itself writes it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    kept = {name: cell[name] for name in ("cell_type", "id")}
    source = cell["source"]
    kept["source"] = source if isinstance(source, list) else source.splitlines(keepends=True)
    kept["metadata"] = {}
    if cell["cell_type"] == "code":
        pictures = [each["data"]["image/png"] for each in cell["outputs"] if _is_figure(each)]
        kept |= {"execution_count": None, "outputs": list(map(_figure, pictures))}
    return kept


def _is_figure(output: dict[str, Any]) -> bool:
    return "image/png" in output.get("data", {})


def _figure(encoded: str) -> dict[str, Any]:
    return {
        "output_type": "display_data",
        "data": {"image/png": _small(encoded)},
        "metadata": {},
    }


def _small(encoded: str) -> str:
    """The PNG in few colours; one that is so already stays as it is."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        if image.mode == "P" and image.width <= WIDEST:
            return encoded.replace("\n", "")
        picture = image.convert("RGB")
    if picture.width > WIDEST:
        size = (WIDEST, round(picture.height * WIDEST / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def executed(path: Path) -> dict[str, Any]:
    """The notebook after all its cells ran, in the folder that it lies in."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}).execute()
    return dict(notebook)


def main() -> None:
    if sys.argv[1:] not in ([], ["--as-it-is"]):
        sys.exit(__doc__)
    as_it_is = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    found = as_it_is if sys.argv[1:] else executed(TUTORIAL)
    TUTORIAL.write_text(text_of(committed(found)), encoding="utf-8")
    print(f"{TUTORIAL}: {TUTORIAL.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
