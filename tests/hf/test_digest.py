"""Two models are told apart by a sample of their weights."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jsft.hf.digest import weights_digest


def write(folder, seed=0, shards=1, **changed):
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(64, 96)).astype(np.float32),
        "model.norm.weight": rng.normal(size=5000).astype(np.float32),
        "lm_head.bias": np.asarray(rng.normal(), np.float32),
    } | changed
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    for i, name in enumerate(names):
        save_file({name: tensors[name]}, folder / f"model-{i}.safetensors")
    index = ", ".join(f'"{name}": "model-{i}.safetensors"' for i, name in enumerate(names))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {%s}}' % index)
    return folder


def test_the_same_weights_have_one_digest_however_they_are_split(tmp_path):
    assert weights_digest(write(tmp_path / "one")) == weights_digest(write(tmp_path / "three", shards=3))


@pytest.mark.parametrize("what", ["seed", "shape", "dtype"])
def test_other_weights_have_another(tmp_path, what):
    norm = np.random.default_rng(1).normal(size=5000)
    one = write(tmp_path / "one", **{"model.norm.weight": norm.astype(np.float32)})
    other = {
        "seed": {"model.norm.weight": (norm + 1e-3).astype(np.float32)},
        "shape": {"model.norm.weight": norm.astype(np.float32).reshape(50, 100)},
        "dtype": {"model.norm.weight": norm.astype(np.float16)},
    }[what]
    assert weights_digest(one) != weights_digest(write(tmp_path / "other", **other))
