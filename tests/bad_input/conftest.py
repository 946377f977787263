from pathlib import Path

import pytest
from ground import World, copy_world, make_world


@pytest.fixture(scope="session")
def sound_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def world(sound_world: World, tmp_path: Path) -> World:
    """A sound world of the test's own."""
    return copy_world(sound_world, tmp_path / "world")
