"""What a start on a CPU does not load."""

import subprocess
import sys

import pytest

from tests.run.processes import ROOT, arguments, environment


@pytest.mark.slow
def test_a_start_imports_neither_pandas_nor_mosaic(tiny, reference):
    """The token cache is there, since `reference` has run. Either import is seconds on a busy machine."""
    code = (
        "import sys; from jsft import train; train.main(sys.argv[1:]); "
        "print('loaded:', [name for name in ('pandas', 'jax.experimental.mosaic.gpu') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments(tiny, reference, "--dry_run")]
    done = subprocess.run(command, env=environment(tiny), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "loaded: []" in done.stdout, (done.stdout + done.stderr)[-2000:]
