"""Fixtures of the data room's tests."""

from pathlib import Path

import pytest

from tests.data.helpers import write_rows, write_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def make_config(tmp_path, tiny_model):
    """A resolved config on `rows` with fields overridden by dotted name."""
    from jsft import config as schema

    def make(rows_or_path, **fields):
        config = schema.default_config()
        path = rows_or_path
        if not isinstance(path, str | Path):
            path = write_rows(tmp_path / "train.parquet", rows_or_path)
        values = {
            "model.path": str(tiny_model),
            "data.train": str(path),
            "data.max_length": 256,
            "data.pack_length": 256,
            "data.shuffle": False,
            "data.cache_dir": str(tmp_path / "cache"),
            "train.global_batch": 8,
        }
        for name, value in (values | {k.replace("__", "."): v for k, v in fields.items()}).items():
            schema.put(config, name, value)
        return schema.resolve(config)

    return make


@pytest.fixture(scope="session")
def qwen3_tokenizer(shared_data):
    """The real Qwen3 tokenizer with its chat template; loading it takes seconds."""
    from jsft.data.chat import load_tokenizer

    return load_tokenizer(shared_data / "qwen3_tokenizer")
