"""How the decoder runs: one frozen object, built once and static under jit. What it computes is `ModelConfig`."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from jsft.models.remat import parse_remat, saves

ATTENTION_LINEARS = ("query", "key", "value", "output")
MLP_LINEARS = ("gate", "up", "down")
# Linears that multiply `compute_dtype` in the forward pass, by the value of `float8_forward`.
WIDE_FORWARD = {"all": (), "mlp": ATTENTION_LINEARS, "none": (*ATTENTION_LINEARS, *MLP_LINEARS)}


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """Options of `hidden_states`. Raises ConfigError for an unknown name in `remat`."""

    mesh: Mesh  # axes ('replica', 'fsdp')
    compute_dtype: jnp.dtype  # of activations and matrix products, whose sums are float32; norms and rotary are float32
    reduce_dtype: jnp.dtype = jnp.dtype("float32")  # for the sums of weight gradients over tokens and devices
    matmul: str = "bfloat16"  # of the layers' linears: in compute_dtype, or "float8" (`jsft.models.float8`)
    float8_forward: str = "mlp"  # linears whose forward product is float8 too: a key of WIDE_FORWARD
    attention: str = "auto"  # implementation of `packed_attention`
    attention_backward: str = "auto"  # backward of `packed_attention`
    norms: str = "auto"  # implementation of `rms_norm` and `rms_norm_rotate`
    # What a layer saves for the backward pass: "full" (its input alone; everything is recomputed), "none" (everything;
    # nothing is recomputed), or names of REMAT_NAMES.
    remat: str | tuple[str, ...] = "full"
    unroll: bool = False  # write the layers out instead of looping over them (`run_layers`)
    deterministic: bool = False  # sum the embedding's gradient in a fixed order
    defer_reduce: bool = False  # gradients of gathered weights stay unreduced (mesh.reduce=step)

    def __post_init__(self):
        for name, value in (
            ("compute_dtype", jnp.dtype(self.compute_dtype)),
            ("reduce_dtype", jnp.dtype(self.reduce_dtype)),
            ("remat", parse_remat(self.remat)),
        ):
            object.__setattr__(self, name, value)

    @property
    def fsdp(self) -> int:
        """Devices that share one copy of the parameters."""
        return self.mesh.shape["fsdp"]

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes values of a layer."""
        return self.remat != "none"

    @property
    def float8(self) -> bool:
        """Whether the layers' linears multiply float8."""
        return self.matmul == "float8"

    def wide_forward(self, name: str) -> bool:
        """Whether the float8 linear `name` multiplies `compute_dtype` in the forward pass."""
        return name in WIDE_FORWARD[self.float8_forward]

    def saves(self, *names: str) -> bool:
        """Whether all these values of a layer are saved for the backward pass, on the device or on the host."""
        return all(saves(self.remat, name) for name in names)
