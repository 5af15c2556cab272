"""Contest solutions run as they would on a contest site: what they may use without importing it, and how."""

import re
import sys

import pytest

from jsft.evaluation import contest_program, sandbox

LIMITS = sandbox.Limits(seconds=30.0, memory_mb=4096)
# Names that the benchmark's own prelude brings, one or two of each module; `bisect` and `copy` are modules.
NAMES = """ascii_lowercase findall timedelta Counter deque heappush bisect_left deepcopy gcd inf sqrt comb randint
mean median permutations accumulate lru_cache cache reduce xor itemgetter StringIO stdin maxsize dumps loads List
Optional string re datetime collections heapq bisect copy math random statistics itertools functools operator io
sys json os""".split()
MEMOISED = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n"


@pytest.fixture(scope="module", autouse=True)
def sandbox_works():
    if reason := sandbox.why_not():
        pytest.skip(reason)


def run(code, stdin=b"", function=None):
    return sandbox.run(contest_program.source(code, function), stdin, LIMITS)


def shown(code, stdin=b"", function=None):
    finished = run(code, stdin, function)
    assert finished.state == "ok", finished.stderr
    return finished.stdout.decode()


def test_builtins_are_pythons_own_and_the_names_of_the_benchmark_are_there():
    code = f"""
missing = [name for name in {NAMES!r} if name not in globals()]
print(missing)
print(pow(3, 200, 10**9 + 7), pow(3, -1, 7), pow(3, 60), abs(-1), sum([1, 2]), open, round(2.5))
print(type(math).__name__ == type(copy).__name__ == type(bisect).__name__ == 'module', xor(5, 1), gcd(4, 6))
print(mean([1, 2, 3]), ascii_lowercase[:3], deepcopy([1]), maxsize > 0, sys.getrecursionlimit())
print(exit, __name__, compile('1', '', 'eval').co_code is not None)
"""
    lines = shown(code).splitlines()
    assert lines[0] == "[]"
    assert lines[1].startswith(f"{pow(3, 200, 10**9 + 7)} 5 {3**60} 1 3 <built-in function open> 2")
    assert lines[2:4] == ["True 4 2", "2 abc [1] True 50000"]
    assert lines[4] == "Use exit() or Ctrl-D (i.e. EOF) to exit __main__ True"


def test_a_name_means_the_same_whether_all_modules_are_imported_or_those_it_needs():
    def brought(code):
        names, limit = {}, sys.getrecursionlimit()
        exec(contest_program.prelude(code), names)
        sys.setrecursionlimit(limit)
        return names

    everything = brought("globals()")
    assert len(everything) > 500 and set(NAMES) < set(everything)
    different = [n for n in everything if n != "__builtins__" and brought(f"print({n}, 1)")[n] is not everything[n]]
    assert different == []
    assert contest_program.prelude("print(input().split())").count("from") == 2  # sys, builtins
    for code in [
        "ｓｑｒｔ(4)",
        "f'{sqrt(4)}'",
        "x = 1 if 1else sqrt",
        "[*accumulate(a)]",
        "@cache\ndef f(): 0",
        "a.\nsqrt",
    ]:
        assert re.search("from (math|functools|itertools) import", contest_program.prelude(code)), code


@pytest.mark.parametrize(
    "code",
    [
        "from __future__ import annotations\nprint(8)",
        '"""Solution."""\nfrom __future__ import annotations\nprint(8)',
        "# -*- coding: utf-8 -*-\n'''a'''\nfrom __future__ import annotations, division\nprint(8)",
        "#!/usr/bin/env python3\n\n'it''s'\nprint(8 if __doc__ == 'its' else __doc__)",
        "def f() -> 1 + 'a': pass\nprint(8)".replace("def", "from __future__ import annotations\ndef", 1),
        "if __name__ == '__main__':\n    print(8)",
        "print(8)\nexit()\nprint(9)",
        "print(8)\nsys.exit()\nprint(9)",
        "def main():\n    print(8)\n    quit()\nmain()",
        "import threading\nthreading.Thread(target=lambda: print(8)).start()",
        "sys.stdout.write('8')\nsys.stdout.flush()",
        "print('\\N{DIGIT EIGHT}', end='')\r\nprint()",
        "print(8)  # '''\"\"\"{code}%s\\\\",
        "import atexit\natexit.register(print, 8)",
        "print(8, file=open('/dev/stdout', 'w'))",
        "sys.stdout = open('/dev/stdout', 'w')\nprint(8)\nprint(9, file=open('/dev/stderr', 'w'))",
    ],
)
def test_a_script_means_what_it_means_alone(code):
    assert shown(code).strip() == "8"


def test_every_way_to_read_the_input_reads_it():
    for code in [
        "a = input()\nb = input()\nprint(a + b)",
        "a, b = sys.stdin.read().split()\nprint(a + b)",
        "a, b = map(str.strip, open(0))\nprint(a + b)",
        "a, b = open('/dev/stdin').read().split()\nprint(a + b)",
        "print(b''.join(sys.stdin.buffer.read().split()).decode())",
        "print(os.read(0, os.fstat(0).st_size).decode().replace('\\n', ''))",
        "import mmap\nprint(mmap.mmap(0, 0, access=mmap.ACCESS_READ)[:].decode().replace('\\n', ''))",
        "print(''.join(x.strip() for x in stdin.readlines()))",
        "print(''.join(x.strip() for x in iter(sys.stdin.readline, '')))",
    ]:
        assert shown(code, b"1\n2\n") == "12\n", code
    assert "EOFError" in run("input()").stderr


@pytest.mark.parametrize(
    "code",
    [
        "@cache\n" + MEMOISED,
        "from functools import lru_cache as memo\n@memo(maxsize=None)\n" + MEMOISED,
        "@cache\ndef f(n):\n    return 0 if n == 0 else max(1 + f(n - 1) for _ in (0,))\n",
        "def f(n):\n    return 0 if n == 0 else 1 + sum(map(f, [n - 1]))\n",
        "class F(dict):\n    def __missing__(self, n):\n        return 0 if n == 0 else 1 + self[n - 1]\nf = F().get\n"
        "f = lambda n, table=F(): table[n]\n",
    ],
)
def test_recursion_through_c_functions_goes_as_deep_as_the_limit_says(code):
    assert shown(f"import sys\nsys.setrecursionlimit(10**6)\n{code}print(f(30000))") == "30000\n"


def test_recursion_in_a_thread_and_without_end():
    code = "@cache\n" + MEMOISED + "import threading\nthreading.stack_size(1 << 28)\n"
    code += "sys.setrecursionlimit(10**6)\nt = threading.Thread(target=lambda: print(f(30000)))\nt.start()"
    assert shown(code) == "30000\n"
    code = "@cache\ndef f(n):\n    return f(n + 1)\ntry:\n    f(0)\nexcept RecursionError:\n    print('caught')"
    assert shown(code) == "caught\n"


def test_a_function_is_called_with_its_arguments_and_nothing_else_runs():
    solution = "from __future__ import annotations\nclass Solution:\n    def f(self, a: List[int], b):\n        {}"
    assert shown(solution.format("return pow(a[0], -1, b)"), b"[3]\n7", "f") == "5\n"
    assert shown(solution.format("print(1)\n        return tuple(a)"), b"[3]\n7", "f") == "[3]\n"
    trial = solution.format("return b") + "\nprint('trial')\nif __name__ == '__main__':\n    input()\n    sys.exit(3)"
    assert shown(trial, b"[3]\n7", "f") == "7\n"
    assert shown("def f(a, b):\n    return a + b", b"1\n2", "f") == "3\n"  # no class at all
    assert run("class Solution:\n    pass", b"1", "f").state == "failed"


def test_strange_source_ends_as_a_failed_program():
    for code in ["def f(:", "print('\x00')", "print('\ud800')", "    indented", "\ufeffprint(", "x = " + "(" * 500]:
        assert run(code).state == "failed", code
    assert re.search("SyntaxError", run("def f(:").stderr)
