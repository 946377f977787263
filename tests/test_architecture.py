"""The architecture, read off the imports: wings import downwards, and no file meets itself."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = (
    *("front", "inference", "bench", "interop", "export", "runs", "devices", "learning"),
    *("data", "pretrained", "model", "ground"),
)
"""From the top down: the front door is `jaxunet/__init__.py`, the ground the files beside."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "jaxunet").rglob("*.py"))}


def wing_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "front"
    return parts[1] if (ROOT / "jaxunet" / parts[1]).is_dir() else "ground"


def imports_of(module: str) -> set[str]:
    """The project's modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return {name for name in found if name in MODULES and name != module}


IMPORTS = {module: imports_of(module) for module in MODULES}


def test_every_folder_is_a_wing_that_says_what_lives_there() -> None:
    folders = {p.name for p in (ROOT / "jaxunet").iterdir() if (p / "__init__.py").exists()}
    assert folders == set(WINGS) - {"front", "ground"}
    for folder in folders:
        text = ast.get_docstring(
            ast.parse((ROOT / "jaxunet" / folder / "__init__.py").read_text())
        )
        assert text is not None
        assert "May import" in text, folder


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    here = WINGS.index(wing_of(module))
    up = {other for other in IMPORTS[module] if WINGS.index(wing_of(other)) < here}
    assert not up, f"{module} ({WINGS[here]}) imports what stands above it: {sorted(up)}"


def test_no_circle() -> None:
    # A wing's `__init__` may give its own files, which import nothing of it.
    graph = {
        module: {o for o in others if o.count(".") > 1 or wing_of(o) == "ground"}
        for module, others in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"A circle of imports: {' -> '.join(error.args[1])}")


def test_a_file_is_read_in_one_sitting() -> None:
    scripts = sorted((ROOT / "experiments").glob("*.py"))
    lines = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for p in (*MODULES.values(), *scripts)
    }
    assert not {name: count for name, count in lines.items() if count > 320}


def arrows() -> Counter[tuple[str, str]]:
    """How many imports go from wing to wing."""
    return Counter(
        (wing_of(module), wing_of(other))
        for module, others in IMPORTS.items()
        for other in others
        if wing_of(module) != wing_of(other)
    )


if __name__ == "__main__":
    for (upper, lower), count in sorted(
        arrows().items(), key=lambda x: (WINGS.index(x[0][0]), WINGS.index(x[0][1]))
    ):
        print(f"{upper:>10} -> {lower:<10} {count}")
