"""A run of version 0.1.0 resumes and exports with this version: nobody loses a run by an update.

`golden/run_0.1.0.tar.xz` holds a model of 2 layers, its data and the directory of a run of 8 updates on one CPU device,
killed before its last save: it has checkpoint 4, the milestone 2 and metrics up to update 8. `expected.json` has the
metrics of the whole run as that version wrote them, and digests of its exports.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy learns bfloat16
import pytest
from safetensors.numpy import load_file

from tests.run import processes

ARCHIVE = Path(__file__).parent / "golden" / "run_0.1.0.tar.xz"
REL = 2e-5  # processors differ in the order of float32 sums


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def call(golden: Path, *command: str) -> str:
    """Output of a command of jsft that is started in the folder of the run's data, on one CPU device."""
    tiny = processes.Tiny(golden / "model", golden / "train.parquet", golden / "held.parquet", golden / "compiled")
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=golden,
        env=processes.environment(tiny, devices=1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def fields(golden: Path) -> list[str]:
    """Every field of the recorded config as a flag, so that the recipe in the tree may change."""
    config = json.loads((golden / "run" / "config.json").read_text())["config"]
    given = {name: value for name, value in config.items() if value is not None}
    return [f"--config.{name}={tuple(v) if isinstance(v, list) else v}" for name, v in given.items()]


def tensors_digest(file: Path) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(load_file(file).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def test_checkpoints_of_an_earlier_version_export_bit_for_bit(golden):
    expected = json.loads((golden / "expected.json").read_text())["exports"]
    call(golden, "jsft.export", "--workdir", "run", "--step", "2,4", "--out", "out")
    for step, digest in expected.items():
        assert tensors_digest(golden / "out" / f"step_{step}" / "model.safetensors") == digest


def test_a_run_of_an_earlier_version_resumes_to_the_same_end(golden):
    config = processes.ROOT / "configs" / "quickstart.py"
    said = call(golden, "jsft.train", "--config", f"{config}:tiny", "--workdir", "run", *fields(golden))
    expected = json.loads((golden / "expected.json").read_text())
    assert "step 5/8" in said and "step 4/8" not in said
    for name in ("metrics", "heldout"):
        ours = processes.records(golden / "run", name)
        assert [one["step"] for one in ours] == [one["step"] for one in expected[name]]
        for one, other in zip(ours, expected[name], strict=True):
            assert one == pytest.approx(other, rel=REL, abs=1e-9)
    assert processes.status(golden / "run")["state"] == "done"
