"""Code that misbehaves: what it may not do, and how it ends."""

import base64
import json
import os
import pickle
import time
import zlib
from pathlib import Path

import pytest

from jsft.errors import DataError
from jsft.evaluation import sandbox
from jsft.evaluation.tasks.livecodebench_v2 import LiveCodeBenchV2, decode_tests, same_output, same_value
from tests.evaluation.sandbox_attacks import Watcher

ROOT = Path(__file__).resolve().parents[2]
LIMITS = sandbox.Limits(seconds=2.0, memory_mb=512)


@pytest.fixture(scope="module", autouse=True)
def sandbox_works():
    if reason := sandbox.why_not():
        pytest.skip(reason)


def run(source, stdin=b"", limits=LIMITS):
    return sandbox.run(source, stdin, limits)


def test_input_output_and_exit_codes():
    finished = run("import sys\nprint(sum(map(int, input().split())))\nprint('noise', file=sys.stderr)", b"1 2 3\n")
    assert (finished.state, finished.code, finished.stdout, finished.stderr) == ("ok", 0, b"6\n", "noise\n")
    finished = run("import sys\nsys.exit(7)")
    assert (finished.state, finished.code) == ("failed", 7)
    finished = run("def f(:")
    assert finished.state == "failed" and "SyntaxError" in finished.stderr
    assert run("import os\nos.kill(os.getpid(), 11)\nimport ctypes\nctypes.string_at(0)").state == "failed"
    big = run("import sys\nprint(len(sys.stdin.read()))", b"x" * 3_000_000)
    assert big.stdout == b"3000000\n"


def test_who_and_where_it_is():
    told = run(
        "import os\nprint(os.getpid(), os.getuid() == 0, sorted(os.listdir('/')), os.listdir('.'))"
    ).stdout.decode()
    assert told.startswith("2 False")  # process 1 of the namespace is ours, and nobody is root
    assert "proc" not in told and "program.py" in told


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 80), timeout=1)",
        "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)",
        f"open({str(ROOT / 'pyproject.toml')!r}).read()",
        "open('/etc/passwd').read()",
        "open('/usr/written', 'w')",
        "open('/written', 'w')",
        "open('program_data', 'wb').write(b'a' * (100 << 20))",  # more than its disk
        "bytearray(1 << 30)",  # more than its memory
        "import os\nos.kill(os.getppid(), 9)\nos.setuid(0) if os.getuid() else os.kill(-1, 9)",
        "import ctypes\nassert ctypes.CDLL(None).mount(b'n', b'/room', b'tmpfs', 0, None) == 0",
    ],
)
def test_what_it_may_not_do(source):
    assert run(source).state == "failed"
    assert not Path("/written").exists() and not Path("/usr/written").exists()


def test_its_own_folder_can_be_written_and_is_gone_after():
    assert run("open('a', 'w').write('x')\nprint(open('/room/a').read())").stdout == b"x\n"
    assert run("import tempfile\nprint(tempfile.gettempdir())").stdout == b"/room\n"
    assert run("import os\nprint(os.path.exists('a'))").stdout == b"False\n"


def test_bombs_and_sleepers_end_in_time():
    started = time.monotonic()
    watcher = Watcher(os.getpid())
    watcher.start()
    fork = run("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass")
    assert fork.state == "timeout"
    counted = run(
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            "
        "time.sleep(60)\n"
        "        n += 1\nexcept OSError:\n    print(n)"
    )
    assert counted.state == "ok" and int(counted.stdout) <= LIMITS.processes
    assert run("import time\ntime.sleep(60)").state == "timeout"
    assert run("while True: pass").state == "timeout"
    assert run("while True: print('x' * 100000)").state == "flood"
    # Closed outputs, a session of its own, a child left behind: nothing outlives the limit.
    left = run("import os, time\nos.close(1), os.close(2)\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(60)")
    assert left.state == "timeout"
    assert time.monotonic() - started < 30
    assert watcher.survivors() == []


def graded(code: str, tests: list, function: str | None = None):
    gold = {"tests": tests, "function": function, "difficulty": "easy"}
    return LiveCodeBenchV2().grade(gold, f"```python\n{code}\n```")


def test_programs_are_judged_by_their_tests():
    tests = [{"input": "1\n", "output": "2\n"}, {"input": "5\n", "output": "6\n"}]
    assert graded("print(int(input()) + 1)", tests).scores["solved"] == 1
    assert graded("print(2)", tests).note == "wrong output"
    assert graded("raise SystemExit(1)", tests).note == "crashed"
    calls = [{"input": "[3, 1]\n2", "output": "[1, 3, 2]"}]
    solution = "class Solution:\n    def f(self, a: List[int], b: int):\n        print(a)\n        return {}"
    assert graded(solution.format("tuple(sorted(a)) + (b,)"), calls, "f").scores["solved"] == 1
    assert graded(solution.format("a"), calls, "f").note == "wrong output"
    assert graded("def f(a, b): pass", calls, "f").note == "wrong output"
    assert graded("class Solution: pass", calls, "f").note == "crashed"


def test_private_tests_are_read_without_running_them():
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()
    assert decode_tests(packed) == [{"input": "1", "output": "2"}] == decode_tests(json.dumps(tests))

    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/jsft-was-here",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    row = {
        "question_content": "q",
        "public_test_cases": "[]",
        "private_test_cases": packed,
        "question_id": "x",
    }
    with pytest.raises(DataError, match="the tests of problem x cannot be read: the pickle names"):
        LiveCodeBenchV2().problem(row, 0)


def row(**columns):
    tests = json.dumps([{"input": "1", "output": "2"}])
    return {"question_content": "q", "public_test_cases": tests, "question_id": "x", **columns}


def test_a_row_without_tests_is_refused_and_one_without_private_tests_is_said(capsys):
    with pytest.raises(DataError, match=r"row 1 \(problem x\) has no tests, so any program would pass"):
        LiveCodeBenchV2().problems([row(private_test_cases="[]"), row(public_test_cases="[]")])
    LiveCodeBenchV2().problems(
        [row(), row(private_test_cases="[]"), row(private_test_cases=row()["public_test_cases"])]
    )
    assert "2 of 3 problems have no private tests (column private_test_cases)" in capsys.readouterr().err
    LiveCodeBenchV2().problems([row(private_test_cases=row()["public_test_cases"])])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "tests",
    ["{", "3", '"a"', '{"input": "1"}', '["a"]', '[{"input": 1, "output": "2"}]', 7, [None], "[" * 9999, "null"],
)
def test_tests_of_another_shape_are_one_line(tests):
    with pytest.raises(DataError, match="the tests of problem x cannot be read"):
        LiveCodeBenchV2().problem(row(public_test_cases=tests), 0)


def test_tests_may_be_a_list_already():
    tests = [{"input": "1", "output": "2"}]
    problem = LiveCodeBenchV2().problem(row(public_test_cases=tests, metadata={"func_name": "f"}), 0)
    assert problem.gold["tests"] == tests and problem.gold["function"] == "f"


@pytest.mark.parametrize(
    "shown", ["[" * 100_000, "NaN", "sNaN", "1e" + "9" * 30, "9" * 5000, "{}", "", "\x00", "Infinity", "1_0 ", "\ud800"]
)
def test_no_output_passes_for_another(shown):
    assert not same_value(shown, "1") and not same_output(shown, "1")


def test_what_ordinary_programs_use_works_under_the_filter():
    source = """
import asyncio, concurrent.futures, os, resource, select, shutil, signal, socket, subprocess, sys, tempfile, threading
import time
def later(): return 7
async def main():
    await asyncio.sleep(0.001)
    process = await asyncio.create_subprocess_exec('/bin/echo', 'a', stdout=subprocess.PIPE)
    return await asyncio.to_thread(later), (await process.communicate())[0]
assert asyncio.run(main()) == (7, b'a\\n')
assert subprocess.run(['/bin/echo', 'a'], capture_output=True).stdout == b'a\\n'
assert os.popen('echo b').read() == 'b\\n' and os.system('true') == 0
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(abs, range(-9, 9))) == 81
a, b = socket.socketpair()
a.send(b'x'); assert b.recv(1) == b'x' and select.select([a], [], [], 0)[0] == []
with tempfile.TemporaryDirectory() as d:
    open(d + '/a', 'w').write('1'); shutil.copy(d + '/a', d + '/b'); os.rename(d + '/b', d + '/c')
    assert sorted(os.listdir(d)) == ['a', 'c']
def alarm(*_): raise TimeoutError
signal.signal(signal.SIGALRM, alarm); signal.setitimer(signal.ITIMER_REAL, 0.01)
try:
    time.sleep(5); assert False
except TimeoutError:
    pass
resource.setrlimit(resource.RLIMIT_STACK, (resource.getrlimit(resource.RLIMIT_STACK)[0] // 2, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))
if (child := os.fork()) == 0:
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert os.cpu_count() and os.urandom(4) and time.perf_counter() and not sys.stdout.isatty()
try:
    import numpy
    assert (numpy.ones((50, 50)) @ numpy.ones((50, 50))).sum() == 125000
except ImportError:
    pass
print('done')
"""
    finished = run(source, limits=sandbox.Limits(seconds=30.0, memory_mb=2048))
    assert (finished.state, finished.stdout) == ("ok", b"done\n"), finished.stderr
