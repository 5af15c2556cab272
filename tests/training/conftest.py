"""Fixtures of the training room's tests."""

from pathlib import Path

import pytest

from tests.training import processes


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> processes.Tiny:
    """A model, data and compilation cache for real processes."""
    return processes.make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reference(tiny, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run on two devices."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    code = processes.run(tiny, workdir)
    assert code == 0, processes.output(workdir).read_text()[-3000:]
    return workdir
