import sys

import any_torchvision  # noqa: F401  before timm, which asks for it
import jax
import numpy as np
import pytest
import torch

from jaxunet.config import ModelConfig
from jaxunet.errors import ConfigError
from jaxunet.interop.pytorch_encoders import load_variables, make_pytorch_model
from jaxunet.model.unet import make_unet

CONFIG = ModelConfig(encoder="efficientnet_lite0", norm="batch", decoder_width=2, init="he")


def test_the_same_weights_give_the_same_logits() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 33, 20, 3)).astype(np.float32)  # padded inside
    unet = make_unet(CONFIG)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), x)

    def drawn(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(size=leaf.shape, scale=fan_in**-0.5).astype(np.float32)
        low = 0.5 if name in ("scale", "var") else -0.2
        return rng.uniform(low, low + 1, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(drawn, shapes)
    model = make_pytorch_model(CONFIG)
    load_variables(model, CONFIG, variables)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    program = jax.jit(unet.apply).lower(variables, x)
    quickly = program.compile({"xla_backend_optimization_level": 0})
    found = np.asarray(quickly(variables, x)).transpose(0, 3, 1, 2)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * np.abs(found).max())


def test_where_timm_is_missing_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"is timm's, .* pip install timm"):
        make_pytorch_model(CONFIG)


def test_a_decoder_without_a_pytorch_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="only a decoder of any width"):
        make_pytorch_model(ModelConfig(encoder="resnet18", norm="group"))
