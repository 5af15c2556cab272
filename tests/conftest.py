"""Eight virtual CPU devices for every test, set before JAX starts; marks decide what runs.

Plain `pytest` runs the quick suite. `-m slow`, `-m gpu` and `-m vllm` run the others by name.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if any("gpu" in argument for argument in sys.argv) and not any("not gpu" in a for a in sys.argv):
    os.environ["JSFT_TESTS_ON_GPU"] = "1"  # for the processes of pytest-xdist, which do not see these arguments
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share the GPU
if "JSFT_TESTS_ON_GPU" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest  # noqa: E402

from jsft.kernels.assembler import choose_ptxas  # noqa: E402

if "JSFT_TESTS_ON_GPU" in os.environ:
    choose_ptxas()  # before JAX meets the device, as runs do


def serving_python() -> Path | None:
    """The serving environment's Python, or None where it is not set up."""
    python = Path(os.environ.get("JSFT_SERVE_VENV", ROOT / ".venv-serve")) / "bin" / "python"
    return python if python.exists() else None


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("markexpr")
    for item in items:
        for mark in ("slow", "gpu"):
            if mark in item.keywords and mark not in chosen:
                item.add_marker(pytest.mark.skip(reason=f"run with -m {mark}"))
        if "vllm" in item.keywords and serving_python() is None:
            item.add_marker(pytest.mark.skip(reason="needs the serving environment: scripts/setup.sh --serve"))


@pytest.fixture(scope="session")
def serve_python() -> Path:
    """Python of the serving environment (torch, transformers, vLLM), for oracles run as a subprocess."""
    python = serving_python()
    if python is None:
        pytest.skip("needs the serving environment: scripts/setup.sh --serve")
    return python


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and tokenizer for golden tests: the folder named by JSFT_TEST_DATA."""
    folder = os.environ.get("JSFT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set JSFT_TEST_DATA to the folder of test data")
    return Path(folder)
