"""jsft: full-parameter fine-tuning of Qwen3, Qwen2.5, Llama 3, Mistral and InternLM2.5, in JAX.

Importing this package imports no JAX: the evaluation room runs in the serving environment, which has none. The names of
the Python API (`jsft.api`) are fetched when they are first used.
"""

__version__ = "0.1.0"
__all__ = ["Model", "Trainer", "load_model"]


def __getattr__(name: str):
    if name in __all__:
        from jsft import api

        return getattr(api, name)
    raise AttributeError(f"module 'jsft' has no attribute {name!r}")
