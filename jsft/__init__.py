"""jsft: full-parameter fine-tuning of Qwen3, Qwen2.5 and InternLM2.5 on long-reasoning data, in JAX.

Importing this package imports no JAX: the evaluation room runs in the serving environment, which has none.
"""

__version__ = "0.1.0"
