"""Tiny model directories."""

import pytest

from jsft.hf.random_model import write_random_model


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Makes (once for each set of options) a bfloat16 random model directory; do not change it."""
    made = {}

    def make(family="qwen3", **options):
        options = {"std": 0.15, "perturb": True} | options
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = write_random_model(tmp_path_factory.mktemp("model") / family, family, **options)
        return made[key]

    return make
