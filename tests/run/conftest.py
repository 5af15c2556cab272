"""Fixtures of the tests of runs."""

from pathlib import Path

import pytest

from tests.run import processes


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes, full when it is full."""
    import os
    import subprocess

    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)
