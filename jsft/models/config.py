"""What a decoder is: every number and switch of its architecture, read from a Hugging Face config.json."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jsft.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling of the rotary frequencies: rope_type `llama3` of config.json."""

    factor: float  # what long wavelengths are stretched by
    low_freq_factor: float  # wavelengths beyond original_positions / this are stretched in full
    high_freq_factor: float  # those below original_positions / this are left as they are
    original_positions: int  # longest sequence before the scaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model. Hashable: it may be a static argument of a jitted function."""

    family: str  # a key of jsft.models.families.FAMILIES
    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K; divides H
    head_dim: int  # h
    intermediate_size: int  # F
    max_positions: int  # longest sequence the base model was made for
    rope_theta: float  # base of the rotary frequencies
    rope_dynamic_factor: float | None  # dynamic NTK beyond max_positions, or None
    rms_eps: float
    tied_embeddings: bool  # the embedding is also the unembedding
    qkv_bias: bool
    qk_norm: bool  # RMSNorm over each query and key head
    initializer_range: float  # standard deviation of fresh weights
    dtype: str  # of the weights, as config.json states it
    output_bias: bool = False  # bias on attention's output
    rope_llama3: Llama3Rope | None = None

    @property
    def query_size(self) -> int:
        """H * h."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """K * h."""
        return self.num_kv_heads * self.head_dim


# Keys that would change the decoder, the one value of each that it has, and why.
_FIXED = (
    ("hidden_act", "silu", "the feed-forward block is SwiGLU with silu"),
    ("mlp_bias", False, "the feed-forward block has no biases"),
    ("attention_dropout", 0, "training has no dropout; set it to 0"),
    ("partial_rotary_factor", 1, "all of a head is rotated"),
    ("rope_interleaved", False, "the two halves of a head are rotated, not neighbours"),
    ("dual_chunk_attention_config", None, "attention over chunks is another computation"),
)


class ConfigJson:
    """A parsed config.json whose every wrong or missing key becomes one line with the file's name.

    Reads the keys of transformers 4 (`torch_dtype`, top-level `rope_theta`, `rope_scaling`) and of transformers 5
    (`dtype`, `rope_parameters`).
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self.raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{file.parent} has no config.json; model.path must name a Hugging Face model directory"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
        if not isinstance(self.raw, dict):
            raise ModelError(f"{file} holds a {type(self.raw).__name__}, not an object; take the base model's file")

    def wrong(self, message: str) -> ModelError:
        return ModelError(f"{self.file}: {message}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = dataclasses.MISSING) -> Any:
        """raw[key], checked to be a `kind`; `default` where the key is absent or null. Raises ModelError."""
        value = self.raw.get(key)
        if value is None:
            if default is dataclasses.MISSING:
                raise self.wrong(f"key {key!r} is missing; copy the base model's config.json again")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(f"{key} is {value!r}, want {' or '.join(k.__name__ for k in kinds)}")
        return value

    def size(self, key: str, default: Any = dataclasses.MISSING, most: int = 2**31 - 1) -> int:
        value = self.get(key, int, default)
        if value is not None and not 1 <= value <= most:
            raise self.wrong(f"{key} is {value}, want a positive whole number of at most {most:,}")
        return value

    def number(self, key: str, default: Any = dataclasses.MISSING) -> float:
        value = self.get(key, (int, float), default)
        if not 0 <= value < math.inf:  # no NaN either
            raise self.wrong(f"{key} is {value!r}, want a finite number that is not negative")
        return float(value)

    def expect(self, key: str, allowed: Any, default: Any, why: str) -> None:
        """Raises ModelError unless raw[key] (or `default`) equals `allowed`."""
        value = self.raw.get(key, default)
        if value is not None and value != allowed:
            raise self.wrong(f"{key} is {value!r}, which is not supported: {why}")

    def rope(self, default_theta: float | None = None) -> dict[str, Any]:
        """The fields of ModelConfig that say how positions are encoded. Raises ModelError for an unknown scaling."""
        parameters = self.get("rope_parameters", dict, {})
        scaling = parameters or self.get("rope_scaling", dict, {})
        theta = parameters.get("rope_theta", self.raw.get("rope_theta", default_theta))
        if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta < math.inf:
            raise self.wrong(f"rope_theta is {theta!r}, want a positive number")
        fields = dict(rope_theta=float(theta), rope_dynamic_factor=None, rope_llama3=None)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "dynamic":
            return fields | {"rope_dynamic_factor": self._rope_numbers(scaling, "factor")["factor"]}
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            *factors, original = self._rope_numbers(scaling, *names).values()
            if factors[2] <= factors[1]:
                raise self.wrong(f"rope scaling has high_freq_factor={factors[2]:g}, want more than low_freq_factor")
            return fields | {"rope_llama3": Llama3Rope(*factors, int(original))}
        if kind != "default":
            raise self.wrong(f"rope type {kind!r} is not supported (supported: default, dynamic, llama3)")
        self._rope_numbers(scaling)
        return fields

    def _rope_numbers(self, scaling: dict[str, Any], *names: str) -> dict[str, float]:
        """These numbers of a rope scaling, each at least 1. Raises ModelError for one that is wrong, or another key."""
        if scaling.get("partial_rotary_factor", 1) != 1:
            raise self.wrong("partial_rotary_factor is not 1, which is not supported: all of a head is rotated")
        if unknown := sorted(set(scaling) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names}):
            keys = ", ".join(("type", *names))
            raise self.wrong(f"rope scaling has unsupported keys {', '.join(unknown)} (supported: {keys})")
        for name in names:
            value = scaling.get(name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value < math.inf:
                raise self.wrong(f"rope scaling {name} is {value!r}, want a number >= 1")
        return {name: float(scaling[name]) for name in names}

    def dtype(self) -> str:
        """'bfloat16', 'float32' or 'float16'; 'float32' where the file says nothing, as transformers has it."""
        value = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if value not in ("bfloat16", "float32", "float16"):
            raise self.wrong(f"dtype {value!r} is not supported (supported: bfloat16, float32, float16)")
        return value

    def model_config(self, family: str, default_theta: float | None = None, **fields) -> ModelConfig:
        """The ModelConfig of a Llama-like decoder: what all families read alike, and the family's `fields`.

        default_theta: the family's rope_theta where the file has none.
        """
        if "quantization_config" in self.raw:
            raise self.wrong("has a quantization_config: quantised weights cannot be trained; use the original model")
        for key, allowed, why in _FIXED:
            self.expect(key, allowed, allowed, why)
        if any(kind != "full_attention" for kind in self.get("layer_types", list, [])):
            raise self.wrong("layer_types names more than full_attention; sliding-window layers are not supported")
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.wrong(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
        hidden = self.size("hidden_size")
        head_dim = self.size("head_dim", None)
        if head_dim is None:
            if hidden % heads:
                raise self.wrong(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
            head_dim = hidden // heads
        if head_dim % 2:
            raise self.wrong(f"head_dim={head_dim} is odd; rotary embeddings need an even one")
        common = dict(
            family=family,
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden,
            num_layers=self.size("num_hidden_layers", most=10_000),  # the table of parameters grows with it
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self.size("intermediate_size"),
            max_positions=self.size("max_position_embeddings"),
            **self.rope(default_theta),
            rms_eps=self.number("rms_norm_eps"),
            tied_embeddings=self.get("tie_word_embeddings", bool, False),
            qkv_bias=False,
            qk_norm=False,
            initializer_range=self.number("initializer_range", 0.02),
            dtype=self.dtype(),
        )
        return ModelConfig(**(common | fields))
