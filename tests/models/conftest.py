"""Tiny models and packed rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from jsft.hf.random_model import write_random_model


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Makes (once for each set of options) a float32 random model directory with weights large enough to matter."""
    made = {}

    def make(family="qwen3", **options):
        options = {"std": 0.15, "perturb": True, "dtype": "float32"} | options
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = write_random_model(tmp_path_factory.mktemp("model") / family, family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def packed_rows():
    """lengths of the documents of each row -> tokens, positions, doc_start, doc_end [rows, T]; the rest is padding."""

    def make(rows, T, vocabulary, seed=0):
        rng = np.random.default_rng(seed)
        tokens = np.zeros((len(rows), T), np.int32)
        start = np.tile(np.arange(T, dtype=np.int32), (len(rows), 1))
        end = start + 1
        for r, lengths in enumerate(rows):
            at = 0
            for length in lengths:
                tokens[r, at : at + length] = rng.integers(0, vocabulary, length)
                start[r, at : at + length], end[r, at : at + length] = at, at + length
                at += length
        positions = np.arange(T, dtype=np.int32) - start
        return tuple(jnp.asarray(x) for x in (tokens, positions, start, end))

    return make
