import inspect

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxunet.bench.flops import layers
from jaxunet.config import ModelConfig
from jaxunet.model.encoders.registry import ENCODERS


def test_the_help_lists_every_encoder_with_its_size() -> None:
    text = inspect.getsource(ModelConfig)
    for encoder in ENCODERS:
        found = layers(ModelConfig(encoder=encoder), 256, 256)
        variables = jax.eval_shape(
            ENCODERS[encoder].make(ModelConfig(encoder=encoder), None, False).init,
            *(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.ones(1, bool)),
        )
        leaves = traverse_util.flatten_dict(variables["params"]).values()
        millions = sum(leaf.size for leaf in leaves) / 1e6
        flops = sum(v.flops for k, v in found.items() if k.startswith("encoder")) / 1e9
        line = f"{encoder}: {millions:.1f} M, {flops:.1f};"
        assert line in text, line
