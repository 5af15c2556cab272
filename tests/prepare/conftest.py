"""Fixtures of the tests of `jsft prepare`."""

import pytest

from tests.data.helpers import cot_rows, write_rows, write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory with only a tokenizer."""
    return str(write_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture
def cot(tmp_path):
    """A file of twelve rows with thinking, in three row groups."""
    return str(write_rows(tmp_path / "cot.parquet", cot_rows(), row_group_size=5))
