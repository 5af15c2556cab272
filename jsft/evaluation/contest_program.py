"""The Python text that runs a contest solution: the names it may use without importing them, then the solution.

The solution is compiled by itself, so that a docstring and `from __future__` remain its first statements.
"""

import functools
import importlib
import re
import unicodedata

# What LiveCodeBench gives a solution: all names of these modules, then the modules themselves. `builtins` comes last,
# so that pow, open, abs and sum are Python's own.
STARS = (
    "string",
    "re",
    "datetime",
    "collections",
    "heapq",
    "bisect",
    "copy",
    "math",
    "random",
    "statistics",
    "itertools",
    "functools",
    "operator",
    "io",
    "sys",
    "json",
    "typing",
    "builtins",
)
ALWAYS = {"os", "sys", "builtins"}
# Words that let a solution reach a name that its text does not contain.
REFLECTION = set(
    """globals locals vars dir eval exec compile getattr modules import_module __import__ __dict__ __globals__
    f_globals __builtins__ inspect""".split()
)

# CPython 3.12 and 3.13 count C calls separately, up to a fixed number that no program can change: a memoised function,
# or one inside sum() or sorted(), reaches a depth of only some hundreds. We raise the counter of each thread, so that
# the recursion limit alone counts, as in the versions before and after. The sandbox gives the stack for it. The counter
# lies next to the limit: we find it by setting the limit to an unlikely value, and change nothing if that fails.
DEEP = """
def _deep():
    import ctypes, sys, threading
    read = ctypes.pythonapi.PyThreadState_Get
    read.restype = ctypes.POINTER(ctypes.c_int)
    before, mark = sys.getrecursionlimit(), 912_673
    sys.setrecursionlimit(mark)
    state = read()
    found = [
        i for i in range(2, 64)
        if state[i] == mark and 0 < state[i - 1] <= mark and 0 < state[i + 1] < 1 << 16
    ]
    sys.setrecursionlimit(before)
    if len(found) != 1:
        return
    def raise_counter():
        read()[found[0] + 1] = 10_000_000
    def bootstrap(thread, begin=threading.Thread._bootstrap):
        raise_counter()
        begin(thread)
    threading.Thread._bootstrap = bootstrap
    raise_counter()
_deep()
del _deep
"""
START = f"""
import sys, _thread
_thread.stack_size(64 << 20)  # default of threads; the C library would use the main thread's size
if (3, 12) <= sys.version_info < (3, 14) and sys.implementation.name == "cpython":
    exec({DEEP!r})
"""

PROGRAM = """{start}{prelude}
exec(compile({code!r}, __file__, "exec", dont_inherit=True))
"""
# The result goes to a separate descriptor, so that it does not mix with what the solution prints. The solution is not
# the module __main__, as in the benchmark: code under `if __name__ == "__main__"` does not run.
CALL = """{start}
def _call():
    import json, os, sys, types
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = [json.loads(line) for line in sys.stdin.read().split("\\n") if line.strip()]
    solution = sys.modules["solution"] = types.ModuleType("solution")
    names = solution.__dict__
    exec({prelude!r}, names)
    exec(compile({code!r}, __file__, "exec", dont_inherit=True), names)
    holder = names["Solution"]() if "Solution" in names else solution
    result = getattr(holder, {function!r})(*arguments)
    print(json.dumps(list(result) if isinstance(result, tuple) else result), file=out, flush=True)
_call()
"""


def prelude(code: str) -> str:
    """The imports that give `code` the names it uses. Each name comes from the module that wins in a full import.

    A module is left out if the text holds none of its names: importing all takes a third of a short program's time.
    """
    text = unicodedata.normalize("NFKC", code)  # as Python reads names
    words = set(re.findall(r"\w+", text))
    names = set(re.findall(r"(?<![\w.])\w+", text))  # those after a dot are attributes
    everything = words & REFLECTION or re.search(r"(import|from)\s+__main__", text)
    stars = [m for m in STARS if everything or m in ALWAYS or m in names or names & _public(m)]
    modules = [m for m in (*STARS, "os") if everything or m in ALWAYS or m in names]
    lines = [f"from {m} import *" for m in stars] + [f"import {m}" for m in modules]
    return "\n".join([*lines, "sys.setrecursionlimit(50000)", ""])


@functools.cache
def _public(module: str) -> frozenset[str]:
    """The names that `from module import *` brings."""
    found = importlib.import_module(module)
    return frozenset(getattr(found, "__all__", [name for name in vars(found) if name[0] != "_"]))


def source(code: str, function: str | None = None) -> str:
    """A program that runs `code`: as a script, or, with `function`, as a module whose function is called.

    The function is a method of the class `Solution` where there is one. Standard input then holds its arguments, one
    line of JSON each; standard output gets its result as JSON.
    """
    template = CALL if function else PROGRAM
    return template.format(start=START, prelude=prelude(code), code=code, function=function)
