"""The tutorial as it is committed; that it runs, `.ci/run` shows."""

import ast
import base64
import importlib
import io
import itertools
import json
import re
import runpy

import numpy as np
import pytest
from notebooks import TUTORIAL, WIDEST, committed, text_of
from PIL import Image
from scripts import SCRIPTS

import jaxunet

TEXT = TUTORIAL.read_text(encoding="utf-8")
NOTEBOOK = json.loads(TEXT)
CODE = {
    cell["id"]: "".join(cell["source"])
    for cell in NOTEBOOK["cells"]
    if cell["cell_type"] == "code"
}
OUTPUTS = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])]


def python_of(source):
    """A cell's Python, without what is IPython's own."""
    lines = re.sub(r"\\\n *", "", source).split("\n")
    return "\n".join(
        re.sub(r"^( *)!.*", r"\1pass", line) for line in lines if not line.startswith("%%")
    )


def test_only_figures_are_kept_of_what_the_cells_gave():
    assert text_of(committed(NOTEBOOK)) == TEXT
    assert {name for each in OUTPUTS for name in each["data"]} == {"image/png"}
    assert {each["output_type"] for each in OUTPUTS} == {"display_data"}
    assert len(TEXT) < 500_000


def test_it_says_nothing_of_the_machine_that_it_ran_on():
    assert NOTEBOOK["metadata"]["kernelspec"]["display_name"] == "Python 3"
    pictures = [base64.b64decode(each["data"]["image/png"]) for each in OUTPUTS]
    assert pictures
    for each in pictures:
        with Image.open(io.BytesIO(each)) as image:
            assert image.format == "PNG"
            assert set(image.info) <= {"dpi", "transparency"}  # no text
    shown = json.dumps({**NOTEBOOK, "cells": [c | {"outputs": []} for c in NOTEBOOK["cells"]]})
    assert not re.search(r"/(tmp|home|root|Users|work|usr)\b", shown)


def test_each_cell_has_an_id_and_each_of_code_is_explained():
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    assert ("code", "code") not in itertools.pairwise(kinds)  # each is explained


@pytest.mark.parametrize("cell", CODE)
def test_a_cell_uses_what_is_public_and_explained(cell):
    for node in ast.walk(ast.parse(python_of(CODE[cell]))):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("jaxunet"):
            module = importlib.import_module(str(node.module))
            assert module.__doc__
            for alias in node.names:
                assert not alias.name.startswith("_")
                assert getattr(module, alias.name).__doc__, alias.name
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "jaxunet"
        ):
            assert node.attr in jaxunet.__all__


def test_its_configuration_is_the_preset_that_it_names():
    names = {"jaxunet": jaxunet}
    for cell, name in (("prepare", "source"), ("configure", "config")):
        (value,) = (
            node.value
            for node in ast.parse(CODE[cell]).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets) == name
        )
        names[name] = eval(ast.unparse(value), {}, names)
    presets = runpy.run_path(str(SCRIPTS / "presets.py"))
    assert names["config"] == presets["demo"]()


def test_a_notebook_that_was_run_is_committed_without_what_only_this_machine_gives():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 2 * WIDEST, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    figure = base64.b64encode(file.getvalue()).decode()
    ran = {
        "cells": [
            {"cell_type": "markdown", "id": "a", "metadata": {"x": 1}, "source": "one\ntwo"},
            {
                "cell_type": "code",
                "id": "b",
                "metadata": {"execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"}},
                "execution_count": 7,
                "source": ["print(1)"],
                "outputs": [
                    {"output_type": "stream", "name": "stdout", "text": "/home/me/run\n"},
                    {"output_type": "execute_result", "data": {"text/plain": "1"}},
                    {
                        "output_type": "display_data",
                        "data": {"image/png": figure, "text/plain": "<Figure>"},
                        "metadata": {"image/png": {"width": 3}},
                    },
                ],
            },
        ],
        "metadata": {"kernelspec": {"display_name": "me (/home/me/venv)", "name": "me"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    kept = committed(ran)
    assert kept["metadata"]["kernelspec"]["name"] == "python3"
    words, code = kept["cells"]
    assert words == {
        "cell_type": "markdown",
        "id": "a",
        "metadata": {},
        "source": ["one\n", "two"],
    }
    assert (code["execution_count"], code["metadata"], len(code["outputs"])) == (None, {}, 1)
    (output,) = code["outputs"]
    assert set(output) == {"output_type", "data", "metadata"}
    assert set(output["data"]) == {"image/png"}
    with Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))) as image:
        assert image.size == (WIDEST, 5)
        assert image.mode == "P"
    assert committed(kept) == kept
