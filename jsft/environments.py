"""Where jsft lies, and the two environments it runs in: training (JAX) and serving (vLLM), each a Python of its own.

Standard library only, valid for Python 3.11: both environments load it.
"""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # of a checkout; of an installed package, its site-packages
INSTALLED = (PACKAGE / "configs").is_dir()  # a checkout has configs/ at its top


def import_path() -> Path:
    """A folder for PYTHONPATH of the other environment: it holds jsft and no package that is meant for this one.

    A checkout is such a folder. For an installed package, whose neighbours are this environment's packages, it is one
    below the user's cache with a link to the package. Raises OSError where that cannot be made.
    """
    if not INSTALLED:
        return ROOT
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "jsft" / f"path-{hashlib.sha256(os.fsencode(PACKAGE)).hexdigest()[:12]}"
    link = folder / "jsft"
    if not (link.is_symlink() and link.resolve() == PACKAGE):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"jsft.tmp-{os.getpid()}"
        temporary.symlink_to(PACKAGE)
        temporary.replace(link)
    return folder


def serving_python() -> Path | None:
    """Python of the serving environment: that of JSFT_SERVE_VENV, else this one where it has vLLM, else that of a
    checkout's .venv-serve. None where there is none.
    """
    return _python("JSFT_SERVE_VENV", "vllm", ".venv-serve")


def training_python() -> Path | None:
    """Python of the training environment: that of JSFT_VENV, else this one where it has JAX, else that of a checkout's
    .venv. None where there is none.
    """
    return _python("JSFT_VENV", "jax", ".venv")


def _python(variable: str, package: str, default: str) -> Path | None:
    named = os.environ.get(variable)
    if not named and importlib.util.find_spec(package):
        return Path(sys.executable)
    if not named and INSTALLED:
        return None
    python = Path(named or ROOT / default).expanduser() / "bin" / "python"
    return python if python.exists() else None


def no_serving() -> str:
    """Why there is no serving environment, and how to make one: the end of an error."""
    named = os.environ.get("JSFT_SERVE_VENV")
    if not INSTALLED:
        where = named or ROOT / ".venv-serve"
        return f"there is no serving environment in {where}; make it with scripts/setup.sh --serve"
    requirements = PACKAGE / "evaluation" / "requirements-serve.txt"
    where = f"JSFT_SERVE_VENV={named} has no bin/python" if named else "JSFT_SERVE_VENV is not set"
    return f"{where}; make an environment of its own, pip install -r {requirements} there, and name it in that variable"
