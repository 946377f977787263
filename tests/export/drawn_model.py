"""Models of random weights, ready to be exported."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxunet.config import Config, DataConfig, ModelConfig
from jaxunet.learning.steps import init_state, make_recipe
from jaxunet.runs.loading import Member, TrainedModel

SIDE = 22  # which no pooling divides often


def model_of(config: ModelConfig, views: str = "none") -> TrainedModel:
    """Of weights that give probabilities from near 0 to near 1."""
    whole = Config(data=DataConfig(image_size=SIDE), model=config)
    recipe = replace(make_recipe(whole), views=views)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_state, recipe)).variables

    def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan = max(1, leaf.size // leaf.shape[-1]) if len(leaf.shape) > 1 else 9
        spread = 12 if path[-2].key == "head" else 2
        return rng.normal(0, (spread / fan) ** 0.5, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(drawn, shapes)
    member = Member(Path("run"), "latest", whole, 7, 1, "")
    return TrainedModel(recipe, variables, (member,))
