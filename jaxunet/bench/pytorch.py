"""PyTorch's side of the benchmark: the same work in each of PyTorch's good forms."""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from jaxunet.bench.products import random_convolution
from jaxunet.bench.rounds import Contestant
from jaxunet.bench.setting import Form
from jaxunet.bench.steps import Mode, random_batch
from jaxunet.config import Config
from jaxunet.errors import ConfigError
from jaxunet.interop.pytorch_encoders import load_variables, make_pytorch_model
from jaxunet.interop.pytorch_unet import counts_and_losses
from jaxunet.model.encoders.registry import ENCODERS, PerChannel

T = TypeVar("T")


@dataclass
class PytorchContestant:
    """One form of PyTorch, warm, with its batch on the device.

    Attributes:
        warm_up_seconds: the first three steps, with what they compile.
        loss: of the first training step.
        held_bytes: of the GPU by PyTorch, before this form came.
    """

    step: Callable[[], torch.Tensor]
    device: torch.device
    warm_up_seconds: float
    loss: float | None
    held_bytes: int

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        _wait(self.device)

    def peak_bytes(self) -> int | None:
        """Most that it held of a GPU at once up to now; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() - self.held_bytes


def check_followed(config: Config) -> None:
    """Raise `ConfigError` where the steps have no PyTorch side."""
    if config.optimizer.name != "adam" or config.train.loss != "bce":
        raise ConfigError("The benchmark against PyTorch has optimizer adam and loss bce only.")
    if config.data.ignore_value is not None:
        raise ConfigError("The benchmark against PyTorch has no data.ignore_value.")


def with_form(
    form: Form,
    config: Config,
    mode: Mode,
    host_state: Any,
    batch_size: int,
    race: Callable[[PytorchContestant], T],
) -> T | str:
    """What `race` gives of a form of PyTorch, or the reason why that form doesn't run here.

    With `model.dtype` bfloat16 it runs under autocast. On a GPU cuDNN's algorithms are chosen
    by trial, as XLA chooses them. Afterwards nothing is held of the form.

    Args:
        host_state: jaxunet's `TrainState`, for the same weights.

    Raises:
        ConfigError: the configuration has no PyTorch side.
    """
    check_followed(config)
    if form == "graphs" and not torch.cuda.is_available():
        return "CUDA graphs are a GPU's"
    try:
        run = _make(form, config, mode, host_state, batch_size)
    except ConfigError:
        raise
    except Exception as error:  # torch.compile fails in many ways, mostly for a compiler
        reason = _reason(error)
    else:
        try:
            return race(run)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = _reason(error)
        finally:
            del run
            _release()
    _release()  # now that no traceback holds on to it
    return reason


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    before = "out of memory: " if _is_out_of_memory(error) else ""
    return f"{before}{type(error).__name__}: {lines[0][:200]}"


def _release() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _make(
    form: Form, config: Config, mode: Mode, host_state: Any, batch_size: int
) -> PytorchContestant:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held = 0
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    plain = replace(config.model, dtype="float32", remat=False)
    model: Any = make_pytorch_model(plain)
    load_variables(model, plain, host_state.variables)
    model.to(device)
    memory_format = torch.contiguous_format
    if form not in ("compile", "eager"):
        memory_format = torch.channels_last
    model = model.to(memory_format=memory_format)
    optimizer = torch.optim.Adam(
        model.parameters(), config.optimizer.learning_rate, fused=device.type == "cuda"
    )
    batch = random_batch(config, batch_size)

    def tensor(array: np.ndarray) -> torch.Tensor:
        placed = torch.from_numpy(array).to(device).permute(0, 3, 1, 2)
        return placed.contiguous(memory_format=memory_format)

    images, masks = tensor(batch["image"]), tensor(batch["mask"])

    def of_channels(value: PerChannel) -> torch.Tensor:
        return torch.tensor(value, device=device).reshape(1, -1, 1, 1)

    encoder = ENCODERS[plain.encoder]
    scale, offset = of_channels(encoder.scale), of_channels(encoder.offset)

    def autocast() -> Any:
        if config.model.dtype == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with autocast():
            logits = model(images.float() * scale - offset)
        return logits.float()

    def loss(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(forward(images), (masks > 0).float())

    def scored(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        found = counts_and_losses(forward(images), masks > 0, config.train.threshold)
        return torch.column_stack(found)

    def probabilities(images: torch.Tensor) -> torch.Tensor:
        return forward(images).sigmoid()

    if form not in ("channels_last", "eager"):
        compiled = partial(torch.compile, mode="reduce-overhead" if form == "graphs" else None)
        loss, scored, probabilities = map(compiled, (loss, scored, probabilities))

    def train_once() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(images, masks)
        value.backward()
        optimizer.step()
        return value.detach()

    @torch.no_grad()
    def eval_once() -> torch.Tensor:
        return scored(images, masks)

    @torch.no_grad()
    def predict_once() -> torch.Tensor:
        return probabilities(images)

    once = {"train": train_once, "eval": eval_once, "predict": predict_once}[mode]

    def step() -> torch.Tensor:
        if form == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        return once()

    model.train(mode == "train")
    start = time.perf_counter()
    first = step()
    # At once: a graph's next run writes over what this one gave.
    first_loss = first.item() if mode == "train" else None
    for _ in range(2):  # the second one records a graph
        step()
    _wait(device)
    return PytorchContestant(step, device, time.perf_counter() - start, first_loss, held)


def make_pytorch_products(shape: tuple[int, ...], dtype: str) -> dict[str, Contestant]:
    """PyTorch's convolution of one shape and its two gradients, channels last."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrays = random_convolution(shape)

    def tensor(array: np.ndarray, axes: tuple[int, ...]) -> torch.Tensor:
        placed = torch.from_numpy(array).to(device, getattr(torch, dtype)).permute(axes)
        return placed.contiguous(memory_format=torch.channels_last)

    x, dy = (tensor(array, (0, 3, 1, 2)) for array in (arrays[0], arrays[2]))
    kernel = tensor(arrays[1], (3, 2, 0, 1))

    def gradient(mask: list[bool]) -> Callable[[], Any]:
        size, stride = [shape[4]], [1, 1]
        return lambda: torch.ops.aten.convolution_backward(
            dy, x, kernel, size, stride, [1, 1], [1, 1], False, [0, 0], 1, mask
        )

    def contestant(function: Callable[[], Any]) -> Contestant:
        def run(steps: int) -> None:
            for _ in range(steps):
                function()
            _wait(device)

        run(1)
        return run

    return {
        "forward": contestant(lambda: F.conv2d(x, kernel, padding=1)),
        "input_gradient": contestant(gradient([True, False, False])),
        "kernel_gradient": contestant(gradient([False, True, False])),
    }
