"""Who assembles the kernels: ptxas, also where JAX's CUDA plugin would take nvJitLink.

nvJitLink assembles a kernel to be linked with others, and then ignores `setmaxnreg`, by which the warpgroups of the
attention kernels share out the registers: they spill, and each product is waited for. XLA takes ptxas instead if
nvJitLink's version is an old one with a known fault, or cannot be asked for. Mosaic in jaxlib 0.12 has no option for it
(docs/lab/2026-11-30-jax-0.12.md), so here the plugin's question for the version is answered with an error. It calls the
library through a table of pointers that are empty until they are first used; the error is written there.
"""

import ctypes
import functools
import importlib.util
import mmap
import os
import shutil
import sys
from pathlib import Path

import jaxlib
import numpy as np

_SECTION = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("address", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("align", "<u8"),
        ("entry", "<u8"),
    ]
)
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
_SYMTAB = 2


@functools.cache
def choose_ptxas() -> str | None:
    """Has ptxas assemble the kernels of this process; call before the first use of a device.

    -> None, or why the kernels may spill, for the run's log. Does nothing where no CUDA plugin is installed and with
    jaxlib 0.11, which takes ptxas.
    """
    version = jaxlib.__version__
    library = _plugin()
    if library is None or version.startswith("0.11."):
        return None
    if not version.startswith("0.12.0"):
        return f"jaxlib {version} is untried, its kernels may spill and wait: install jax 0.12.0.1 or 0.11.2"
    spills = f"jaxlib {version} assembles the kernels with nvJitLink, they spill and wait"
    if not _has_ptxas():
        return f"{spills}: no ptxas found on PATH or in nvidia-cuda-nvcc, install one"
    try:
        _refuse_nvjitlink(library)
    except (OSError, LookupError, ValueError) as problem:
        return f"{spills}: {problem}; install jax 0.11.2"
    return None


def _plugin() -> Path | None:
    """JAX's CUDA plugin, the library that assembles the kernels."""
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    for version in (13, 12):
        if (package := importlib.util.find_spec(f"jax_plugins.xla_cuda{version}")) and package.origin:
            return Path(package.origin).with_name("xla_cuda_plugin.so")
    return None


def _has_ptxas() -> bool:
    """Whether XLA finds ptxas: without one it could assemble nothing."""
    wheels = (Path(p) / "nvidia" / folder / "bin" for p in sys.path for folder in ("cu13", "cuda_nvcc"))
    folders = map(str, (*wheels, "/usr/local/cuda/bin"))
    return shutil.which("ptxas") is not None or shutil.which("ptxas", path=os.pathsep.join(folders)) is not None


def _refuse_nvjitlink(library: Path) -> None:
    """Answers the plugin's calls of nvJitLinkVersion with an error. Raises LookupError or ValueError where it is built
    in another way, or has called it already.
    """
    symbols = _symbols(library, "nvJitLink", "_nvjitlink_tramp_table", "GetPjrtApi")
    entries = sorted(address for name, address in symbols.items() if name.startswith("nvJitLink"))
    loaded = ctypes.CDLL(str(library))
    base = ctypes.cast(loaded.GetPjrtApi, ctypes.c_void_p).value - symbols["GetPjrtApi"]
    # The table is in the order of the functions that jump through it.
    place = entries.index(symbols["nvJitLinkVersion"])
    table = (ctypes.c_void_p * len(entries)).from_address(base + symbols["_nvjitlink_tramp_table"])
    if any(table):
        raise ValueError("JAX has compiled before it could be stopped")
    # A function that always gives 1, an error code of nvJitLink's, and needs neither arguments nor Python's lock.
    table[place] = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
    number = ctypes.c_uint()
    ask = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(base + symbols["nvJitLinkVersion"])
    if ask(ctypes.byref(number), ctypes.byref(number)) != 1:
        raise ValueError("its plugin does not call it as expected")


def _symbols(library: Path, *prefixes: str) -> dict[str, int]:
    """Addresses, from where the library is loaded, of its symbols whose names begin so. Raises LookupError where it has
    no table of symbols, or none of these.
    """
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, count = int.from_bytes(content[0x28:0x30], "little"), int.from_bytes(content[0x3C:0x3E], "little")
        sections = np.frombuffer(content[start : start + count * _SECTION.itemsize], _SECTION)
        tables = sections[sections["type"] == _SYMTAB]
        if not len(tables):
            raise LookupError("its plugin has no table of symbols")
        parts = tables[0], sections[tables[0]["link"]]
        table, names = (content[part["offset"] : part["offset"] + part["size"]] for part in parts)
    symbols = np.frombuffer(table, _SYMBOL)
    found = {}
    for prefix in prefixes:
        at = names.find(b"\0" + prefix.encode())
        if at < 0:
            raise LookupError(f"its plugin has no symbol {prefix}")
        while at >= 0:
            name = names[at + 1 : names.index(b"\0", at + 1)].decode()
            found |= {name: int(symbol["value"]) for symbol in symbols[symbols["name"] == at + 1]}
            at = names.find(b"\0" + prefix.encode(), at + 1)
    return found
