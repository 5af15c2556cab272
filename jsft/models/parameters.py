"""One declaration per parameter, and what is derived from it: shapes, shardings, fresh weights, tensor names on disk.

A weight is stored as Hugging Face stores it, [out, in], so that the rows a device owns are one run of bytes in the
file, and a layer multiplies by contracting the last axis. Layers are stacked on a leading axis L.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jsft.hardware.mesh import parameter_sharding

Path = tuple[str, ...]  # of a parameter in the nested dict, e.g. ("layers", "query")


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """The rows of a fused tensor that belong to one parameter: `count` rows from `start` on in each of `groups` blocks.

    A block has `stride` rows. InternLM2's wqkv [K * (G + 2) * h, D] has K blocks of (G + 2) * h rows.
    """

    groups: int
    stride: int
    start: int
    count: int

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(parameter row, tensor row, number of rows) of each contiguous run within parameter rows [first, last)."""
        row = first
        while row < last:
            group, inside = divmod(row, self.count)
            rows = min(self.count - inside, last - row)
            yield row, group * self.stride + self.start + inside, rows
            row += rows


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """A parameter: what it is in jsft and where it is in a Hugging Face directory."""

    shape: tuple[int, ...]  # with the leading L where stacked
    axes: tuple[str | None, ...]  # logical name of each axis; jsft.hardware.mesh decides which one is sharded
    initializer: str  # "normal" (standard deviation: ModelConfig.initializer_range), "ones" or "zeros"
    tensor: str  # name of the tensor on disk; "{layer}" stands for the layer where stacked
    rows: RowBlocks | None = None  # set where the tensor on disk holds other parameters too

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def layers(self) -> int | None:
        return self.shape[0] if self.stacked else None

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape without the stacked axis."""
        return self.shape[1:] if self.stacked else self.shape


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter (of one layer) inside a tensor on disk."""

    path: Path
    layer: int | None
    rows: RowBlocks  # of the tensor


@dataclasses.dataclass
class DiskTensor:
    """A tensor of the Hugging Face directory and the parameters it holds."""

    shape: tuple[int, ...]
    parts: list[Part]


Table = dict[str, Any]  # nested dict with ParameterSpec leaves


def leaves(table: Table) -> Iterator[tuple[Path, ParameterSpec]]:
    """(path, spec) of every parameter, in the table's order."""
    for key, value in table.items():
        if isinstance(value, ParameterSpec):
            yield (key,), value
        else:
            for path, spec in leaves(value):
                yield (key, *path), spec


def tree_from(table: Table, make: Callable[[Path, ParameterSpec], Any]) -> dict[str, Any]:
    """The nested dict of `make(path, spec)`."""

    def build(node, prefix):
        return {
            key: make((*prefix, key), value) if isinstance(value, ParameterSpec) else build(value, (*prefix, key))
            for key, value in node.items()
        }

    return build(table, ())


def get_leaf(tree: dict[str, Any], path: Path) -> Any:
    """tree[path[0]][path[1]]..."""
    for key in path:
        tree = tree[key]
    return tree


def disk_tensors(table: Table) -> dict[str, DiskTensor]:
    """Name -> tensor of the Hugging Face directory: first those outside the layers, then layer by layer."""
    tensors: dict[str, DiskTensor] = {}

    def add(path: Path, spec: ParameterSpec, layer: int | None) -> None:
        name = spec.tensor.format(layer=layer)
        rows = spec.layer_shape[0]
        blocks = spec.rows or RowBlocks(groups=1, stride=rows, start=0, count=rows)
        shape = (blocks.groups * blocks.stride, *spec.layer_shape[1:])
        tensors.setdefault(name, DiskTensor(shape, [])).parts.append(Part(path, layer, blocks))

    specs = list(leaves(table))
    for path, spec in specs:
        if not spec.stacked:
            add(path, spec, None)
    depth = max((spec.layers or 0 for _, spec in specs), default=0)
    for layer in range(depth):
        for path, spec in specs:
            if spec.stacked:
                add(path, spec, layer)
    return tensors


def count_parameters(table: Table) -> int:
    """Number of weights; a tied embedding counts once."""
    total = 0
    for _, spec in leaves(table):
        size = 1
        for n in spec.shape:
            size *= n
        total += size
    return total


def abstract_from(table: Table, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Any]:
    """Nested dict of jax.ShapeDtypeStruct with the sharding of each parameter on `mesh`. Takes no memory."""
    return tree_from(
        table,
        lambda _, spec: jax.ShapeDtypeStruct(
            spec.shape, jnp.dtype(dtype), sharding=parameter_sharding(spec.axes, spec.shape, mesh)
        ),
    )


def initial_from(table: Table, mesh: Mesh, dtype: jnp.dtype, seed: int, std: float) -> dict[str, Any]:
    """Fresh weights, made on the devices and the same on every mesh: a parameter's random key comes from its name."""
    dtype = jnp.dtype(dtype)

    def make(path: Path, spec: ParameterSpec) -> jax.Array:
        def fresh():
            if spec.initializer == "ones":
                return jnp.ones(spec.shape, dtype)
            if spec.initializer == "zeros":
                return jnp.zeros(spec.shape, dtype)
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32("/".join(path).encode()))
            return (jax.random.normal(key, spec.shape, jnp.float32) * std).astype(dtype)

        return jax.jit(fresh, out_shardings=parameter_sharding(spec.axes, spec.shape, mesh))()

    return tree_from(table, make)
