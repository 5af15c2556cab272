"""Evaluation: tasks, sampling through vLLM or any OpenAI-compatible server, graders, judges.

Runs in the serving environment: valid for Python 3.11, imports no JAX, knows nothing of training.
"""
