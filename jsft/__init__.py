"""jsft: full-parameter fine-tuning of Qwen3, Qwen2.5, Llama 3, Mistral and InternLM2.5, in JAX.

Importing this package imports no JAX: the evaluation room runs in the serving environment, which has none. The names of
the Python API are fetched when they are first used.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Model", "Trainer", "load_model"]
_HOMES = {"Model": "jsft.api", "Trainer": "jsft.trainer", "load_model": "jsft.api"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jsft' has no attribute {name!r}")
