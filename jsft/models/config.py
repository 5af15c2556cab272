"""What a decoder is: every number and switch of its architecture, read from a Hugging Face config.json."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jsft.errors import ModelError


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

    @property
    def query_size(self) -> int:
        """H * h."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """K * h."""
        return self.num_kv_heads * self.head_dim


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

    def rope(self) -> tuple[float, float | None]:
        """(rope_theta, dynamic NTK factor or None). Raises ModelError for any other kind of scaling."""
        parameters = self.get("rope_parameters", dict, {})
        scaling = parameters or self.get("rope_scaling", dict, {})
        theta = parameters.get("rope_theta", self.raw.get("rope_theta"))
        if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta < math.inf:
            raise self.wrong(f"rope_theta is {theta!r}, want a positive number")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        known = {"rope_type", "type", "factor", "rope_theta"}
        if kind == "default":
            return float(theta), None
        if kind != "dynamic":
            raise self.wrong(f"rope type {kind!r} is not supported (supported: default, dynamic)")
        if unknown := sorted(set(scaling) - known):
            raise self.wrong(f"rope scaling has unsupported keys {', '.join(unknown)} (supported: type, factor)")
        factor = scaling.get("factor")
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 1 <= factor < math.inf:
            raise self.wrong(f"rope scaling factor is {factor!r}, want a number >= 1")
        return float(theta), float(factor)

    def dtype(self) -> str:
        """'bfloat16', 'float32' or 'float16'; 'float32' where the file says nothing, as transformers has it."""
        value = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32").removeprefix("torch.")
        if value not in ("bfloat16", "float32", "float16"):
            raise self.wrong(f"dtype {value!r} is not supported (supported: bfloat16, float32, float16)")
        return value

    def model_config(self, family: str, **fields) -> ModelConfig:
        """The ModelConfig of a Llama-like decoder: what all families read alike, and the family's `fields`."""
        if "quantization_config" in self.raw:
            raise self.wrong("has a quantization_config: quantised weights cannot be trained; use the original model")
        self.expect("hidden_act", "silu", "silu", "the feed-forward block is SwiGLU with silu")
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
        theta, dynamic = self.rope()
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
            rope_theta=theta,
            rope_dynamic_factor=dynamic,
            rms_eps=self.number("rms_norm_eps"),
            tied_embeddings=self.get("tie_word_embeddings", bool, False),
            qkv_bias=False,
            qk_norm=False,
            initializer_range=self.number("initializer_range", 0.02),
            dtype=self.dtype(),
        )
        return ModelConfig(**(common | fields))
