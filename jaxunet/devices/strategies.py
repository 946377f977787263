"""How a step is spread over devices: `pmap`, or `jit` of `shard_map` over a mesh.

Both take a step written for one shard with the named axis `AXIS`, replicate its first
argument and split its second. Neither changes what is computed. Every array a strategy is
given or gives back on the host is this process's part: the whole for replicated values,
its own rows for split ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxunet.errors import ConfigError
from jaxunet.learning.steps import AXIS, Recipe

Step = Callable[..., Any]
Outputs = Literal["replicated", "split"]


@dataclass(frozen=True)
class Strategy(ABC):
    """A way to run steps on `devices`, those of all processes.

    Replicated arrays are whole on each device; the parts of split ones follow its order.
    """

    devices: Sequence[jax.Device]
    _compile: ClassVar[Callable[..., Step]]

    @abstractmethod
    def split(self, batch: Any) -> Any:
        """Place this process's rows of a global batch on its devices."""

    @abstractmethod
    def gather(self, tree: Any) -> Any:
        """This process's rows of split outputs, as NumPy arrays."""

    def compile(
        self, step: Step, *, outputs: Outputs, donate: bool = False, constants: int = 0
    ) -> Step:
        """A compiled `step(replicated, split, *constants)`.

        A `functools.partial` of the same function and recipe over the same devices is
        compiled once in a process, as a function under `jax.jit` is.

        Args:
            donate: give the step the memory of its first argument.
            constants: how many more replicated arguments there are; they are never donated.
        """
        options = (tuple(self.devices), outputs, (0,) if donate else (), constants)
        if isinstance(step, partial) and step.args and isinstance(step.args[0], Recipe):
            return _compiled_partial(self._compile, step.func, step.args, options)
        return self._compile(step, *options)

    @property
    def _local(self) -> list[jax.Device]:
        return [d for d in self.devices if d.process_index == jax.process_index()]

    def _assemble(
        self,
        spec: PartitionSpec,
        devices: Sequence[jax.Device],
        shape: tuple[int, ...],
        parts: Sequence[Any],
    ) -> jax.Array:
        """An array over `devices` of one part for each of this process's own.

        A put on devices of several processes would compare what they put, or be implicit.
        """
        placed = [
            jax.device_put(np.asarray(part), device, may_alias=False)
            for part, device in zip(parts, self._local, strict=True)
        ]
        sharding = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), spec)
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)

    def replicate(self, tree: Any) -> Any:
        """Copy host arrays to every device; never aliases them."""

        def copy(x: Any) -> jax.Array:
            parts = [x] * len(self._local)
            return self._assemble(PartitionSpec(), self.devices, np.shape(x), parts)

        return jax.tree.map(copy, tree)

    def fetch(self, tree: Any) -> Any:
        """Replicated outputs as NumPy arrays of their own memory."""
        return jax.tree.map(lambda x: _to_host(x.addressable_shards[0].data), tree)

    def outline(self, replicated: Any, batch: Any) -> tuple[Any, Any]:
        """Shapes and places of a step's arguments, to compile it where no device is.

        Args:
            replicated, batch: trees of arrays or shapes; the batch is the global one.

        Returns:
            What `replicate` and `split` would give if all devices were this process's.
        """
        mesh = Mesh(np.asarray(self.devices), (AXIS,))

        def at(spec: PartitionSpec, x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

        def rows(x: Any) -> jax.ShapeDtypeStruct:
            return at(PartitionSpec(AXIS), x, (*self._rows(x.shape[0]), *x.shape[1:]))

        return (
            jax.tree.map(lambda x: at(PartitionSpec(), x, x.shape), replicated),
            jax.tree.map(rows, batch),
        )

    def _rows(self, count: int) -> tuple[int, ...]:
        """The first axes of a batch of `count` rows."""
        return (count,)


class Pmap(Strategy):
    """`jax.pmap`: split arrays carry a leading axis of devices, replicated ones do not.

    JAX keeps pmap but develops it no further, and recommends `jax.shard_map`; since 0.10 pmap
    is itself `jit` of `shard_map` (see https://docs.jax.dev/en/latest/migrate_pmap.html). So
    the two strategies run the same program, on values that lie in the same places.
    """

    def split(self, batch: Any) -> Any:
        def rows(x: np.ndarray) -> jax.Array:
            # pmap is given the rows of this process, as an array over its own devices alone.
            own = x.reshape(len(self._local), -1, *x.shape[1:])
            parts = np.split(own, len(own))
            return self._assemble(PartitionSpec(AXIS), self._local, own.shape, parts)

        return jax.tree.map(rows, batch)

    @staticmethod
    def _compile(
        step: Step,
        devices: Sequence[jax.Device],
        outputs: Outputs,
        donated: tuple[int, ...],
        constants: int,
    ) -> Step:
        return jax.pmap(
            step,
            AXIS,
            in_axes=(None, 0, *[None] * constants),
            out_axes=None if outputs == "replicated" else 0,
            devices=devices,
            donate_argnums=donated,
        )

    def gather(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: _own_rows(x).reshape(-1, *x.shape[2:]), tree)

    def _rows(self, count: int) -> tuple[int, ...]:
        return len(self.devices), count // len(self.devices)


class ShardMap(Strategy):
    """`jax.jit` of `jax.shard_map` over a one-dimensional mesh."""

    def split(self, batch: Any) -> Any:
        def rows(x: np.ndarray) -> jax.Array:
            parts = np.split(x, len(self._local))
            shape = (len(parts[0]) * len(self.devices), *x.shape[1:])
            return self._assemble(PartitionSpec(AXIS), self.devices, shape, parts)

        return jax.tree.map(rows, batch)

    @staticmethod
    def _compile(
        step: Step,
        devices: Sequence[jax.Device],
        outputs: Outputs,
        donated: tuple[int, ...],
        constants: int,
    ) -> Step:
        # check_vma would insert the sum over devices into the gradient by itself, which
        # pmap does not; without it, one step serves both.
        mapped = jax.shard_map(
            step,
            mesh=Mesh(np.asarray(devices), (AXIS,)),
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), *[PartitionSpec()] * constants),
            out_specs=PartitionSpec() if outputs == "replicated" else PartitionSpec(AXIS),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)

    def gather(self, tree: Any) -> Any:
        return jax.tree.map(_own_rows, tree)


@lru_cache(maxsize=64)
def _compiled_partial(
    compile_: Callable[..., Step], function: Step, fixed: tuple[Any, ...], options: Any
) -> Step:
    return compile_(partial(function, *fixed), *options)


def _to_host(array: jax.Array) -> np.ndarray:
    """A copy by an explicit transfer, which `jax.transfer_guard("disallow")` lets pass."""
    return np.array(jax.device_get(array))


def _own_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a split array, in their order."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([_to_host(shard.data) for shard in shards])


STRATEGIES: dict[str, Callable[[Sequence[jax.Device]], Strategy]] = {
    "pmap": Pmap,
    "jit": ShardMap,
}


def make_strategy(
    name: Literal["pmap", "jit"], devices: Sequence[jax.Device] | None = None
) -> Strategy:
    """The strategy `name` over `devices` (none: all, those of process 0 first)."""
    if devices is None:
        # JAX orders a TPU's by their place; the rows of a batch follow the processes.
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return STRATEGIES[name](devices)


def check_divisible(name: str, batch_size: int, devices: int) -> None:
    """Raise `ConfigError` unless the devices divide the global batch evenly."""
    if batch_size % devices:
        low = batch_size - batch_size % devices
        near = [str(n) for n in (low, low + devices) if n]
        raise ConfigError(
            f"{name} is {batch_size}, which the {devices} devices do not divide evenly; "
            f"use {' or '.join(near)}, or fewer devices."
        )
