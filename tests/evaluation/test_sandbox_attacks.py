"""Attacks on the sandbox: none goes through, none counts as right, nothing stays; as root and as a user."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jsft.evaluation import sandbox, sandbox_cgroup, sandbox_filter
from tests.evaluation import sandbox_attacks as attacks

ROOT = Path(__file__).resolve().parents[2]
USER = 64321
KEYCTL = {"x86_64": (250, 248), "aarch64": (219, 217)}.get(os.uname().machine)
SESSION = -3


@pytest.fixture(scope="module", autouse=True)
def sandbox_works():
    if reason := sandbox.why_not():
        pytest.skip(reason)


needs_filter = pytest.mark.skipif(not sandbox_filter.compiled(), reason="no libseccomp here")


def as_user(arguments: list[str], **settings: str) -> subprocess.CompletedProcess:
    """Runs this Python as an ordinary user, who also sees the directories that are closed to users here."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; the other tests ran as a user")
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs util-linux")
    places = {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, ROOT)}
    closed = {str(d): [] for p in places for d in [first_closed(Path(p))] if d}
    script = ["set -e", "kept=$(mktemp -d)", "mount -t tmpfs kept $kept"]
    for number, place in enumerate(sorted(places)):
        if directory := first_closed(Path(place)):
            script.append(f"mkdir $kept/{number}; mount --rbind '{place}' $kept/{number}")
            closed[str(directory)].append(f"mkdir -p '{place}'; mount --rbind $kept/{number} '{place}'")
    for directory, mounts in closed.items():
        script += [f"mount -t tmpfs -o mode=755 closed '{directory}'", *mounts]
    script.append(f'exec setpriv --reuid {USER} --regid {USER} --clear-groups "$@"')
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **settings}
    command = ["unshare", "--mount", "sh", "-c", "\n".join(script), "sh", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=500)


def first_closed(path: Path) -> Path | None:
    """The outermost directory on the way to `path` that users may not enter."""
    return next((p for p in (*reversed(path.parents), path) if not p.stat().st_mode & 1), None)


def hold(found: dict, uid: int) -> None:
    assert found["uid"] == uid
    assert found["probe_ended"].startswith("ok"), found["probe_ended"]
    assert found["probes"] >= 55 and found["escaped"] == []
    assert found["alive"] == [] and found["rooms"] >= 10
    assert {state for state, _ in found["survivors"].values()} <= {"ok", "timeout", "failed"}
    assert not [name for name, (solved, _) in found["forgeries"].items() if solved]
    assert {state for state, _ in found["hoarders"].values()} <= {"memory", "failed"}, found["hoarders"]
    assert found["peak_mb"] < 1000, "the limit is 256; before, some reached ten times as much"


@needs_filter
def test_no_attempt_goes_through():
    count, escaped, ended = attacks.probe()
    assert (escaped, ended.split()[0]) == ([], "ok") and count >= 55


@needs_filter
def test_no_attempt_goes_through_as_a_user():
    done = as_user(
        ["-c", "import json; from tests.evaluation import sandbox_attacks as a; print(json.dumps(a.probe()))"]
    )
    assert done.returncode == 0, done.stderr
    count, escaped, ended = json.loads(done.stdout)
    assert (escaped, ended.split()[0]) == ([], "ok") and count >= 55


@pytest.mark.slow
@needs_filter
def test_all_attacks_as_who_we_are():
    hold(attacks.attack(), os.getuid())


@pytest.mark.slow
@needs_filter
def test_all_attacks_as_a_user():
    done = as_user([attacks.__file__])
    assert done.returncode == 0, done.stderr
    hold(json.loads(done.stdout), USER)


@pytest.mark.parametrize("name", ["another program", "its outputs held open", "one that runs from number to number"])
def test_nothing_outlives_the_program(name):
    watcher = attacks.Watcher(os.getpid())
    watcher.start()
    finished = sandbox.run(attacks.DAEMON + attacks.SURVIVORS[name], limits=sandbox.Limits(seconds=1.0))
    assert finished.state in ("ok", "timeout") and finished.seconds < 10
    assert watcher.survivors() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_judge(number):
    code = f"from jsft.evaluation import sandbox as s\ns.run({attacks.DAEMON + attacks.SURVIVORS['another program']!r},"
    code += "limits=s.Limits(seconds=60))"
    judge = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    watcher = attacks.Watcher(judge.pid)
    watcher.start()
    try:
        wait_for(lambda: any(b"sleep\0" in attacks.read(p / "cmdline") for p in inside(watcher.rooms)))
    finally:
        judge.send_signal(number)
        judge.wait()
    wait_for(lambda: not inside(watcher.rooms))
    assert watcher.rooms and watcher.survivors() == []


def inside(rooms: set[str]) -> list[Path]:
    return [p for p in attacks.processes() if attacks.namespace(p) in set(rooms)]


def wait_for(what, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["exit code 125", "messages on all descriptors", "a signal to its group"])
def test_a_program_cannot_pretend_that_the_sandbox_is_broken(name):
    finished = sandbox.run(attacks.FORGERIES[name], limits=attacks.LIMITS)
    assert finished.state in ("ok", "failed") and finished.code is not None


def test_memory_is_limited_over_all_processes():
    finished = sandbox.run("import os, time\n" + attacks.HOARDERS["in ten children"], limits=attacks.LIMITS)
    assert (finished.state, finished.code) == ("memory", None)


def test_pages_that_processes_share_count_once():
    code = "import os, time\na = b'x' * (150 << 20)\nfor _ in range(5):\n    if os.fork() == 0:\n"
    code += "        time.sleep(0.5)\n        os._exit(0)\ntime.sleep(0.6)\nprint(len(a) >> 20)"
    finished = sandbox.run(code, limits=sandbox.Limits(seconds=20, memory_mb=400))
    assert (finished.state, finished.stdout) == ("ok", b"150\n"), finished.stderr


def test_without_a_filter_a_program_runs_and_it_is_said(monkeypatch):
    monkeypatch.setattr(sandbox_filter, "compiled", lambda: b"")
    finished = sandbox.run("import ctypes\nprint(ctypes.CDLL(None).shmget(0, 4096, 0o1600))")
    assert finished.state == "ok" and finished.missing == ("filter",)
    assert finished.stdout == b"-1\n"  # the keeper allows no segment in its IPC namespace
    monkeypatch.setattr(sandbox, "_probe", lambda: finished)
    assert sandbox.weaknesses() == [sandbox.MISSING["filter"]]


@pytest.mark.skipif(KEYCTL is None, reason="numbers of this machine's system calls are not known")
def test_the_keys_of_the_judge_are_out_of_reach_without_a_filter_too(monkeypatch):
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl, add_key = KEYCTL
    key = libc.syscall(add_key, b"user", b"jsft-test", b"secret", 6, SESSION)
    if key < 0:
        pytest.skip("no keyrings here")
    monkeypatch.setattr(sandbox_filter, "compiled", lambda: b"")
    source = f"""
import ctypes
libc = ctypes.CDLL(None)
data = ctypes.create_string_buffer(64)
print(libc.syscall({keyctl}, 11, {key}, data, 64), libc.syscall({keyctl}, 10, {SESSION}, b'user', b'jsft-test', 0),
      libc.syscall({keyctl}, 2, {key}, b'forged', 6), data.raw.strip(bytes(1)))
"""
    try:
        finished = sandbox.run(source)
        assert finished.stdout == b"-1 -1 -1 b''\n", finished
        data = ctypes.create_string_buffer(64)
        assert libc.syscall(keyctl, 11, key, data, 64) == 6 and data.raw[:6] == b"secret"
    finally:
        libc.syscall(keyctl, 21, key)  # invalidate


def test_a_launcher_that_is_killed_is_no_right_program():
    code = "import os, threading\nfrom jsft.evaluation import sandbox as s\n"
    code += "from tests.evaluation import sandbox_attacks as a\nw = a.Watcher(os.getpid())\nw.start()\n"
    code += "def kill():\n    for p in a.processes():\n        if w.mark in a.read(p / 'cmdline') and "
    code += "a.namespace(p) not in w.rooms: os.kill(int(p.name), 9)\n"
    code += (
        "threading.Timer(1.5, kill).start()\nf = s.run('import time; time.sleep(60)', limits=s.Limits(seconds=30))\n"
    )
    code += "__import__('time').sleep(1)\nprint(f.state, f.seconds < 25, w.survivors())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout in ("failed True []\n", "broken True []\n"), done.stderr  # broken: it was still building


def group(path: Path, controllers: str) -> Path:
    path.mkdir()
    for name, text in (("cgroup.subtree_control", controllers), ("cgroup.procs", "")):
        (path / name).write_text(text)
    return path


def test_a_control_group_is_made_below_the_nearest_that_hands_memory_on(tmp_path):
    root = group(tmp_path / "cgroup", "cpu memory pids")
    session = group(group(root / "user", "memory pids") / "session", "cpu")
    own = tmp_path / "own"
    own.write_text("1:name=systemd:/x\n0::/user/session\n")
    find = sandbox_cgroup.parent_group.__wrapped__
    assert find(root, own) is None  # not a version 2 hierarchy
    (root / "cgroup.controllers").write_text("cpu memory pids")
    (session.parent / "jsft-99999999-1").mkdir(), (session.parent / f"jsft-{os.getpid()}-1").mkdir()
    assert find(root, own) == session.parent
    assert [p.name for p in session.parent.glob("jsft-*")] == [f"jsft-{os.getpid()}-1"]  # the other's judge is dead
    (session.parent / "cgroup.subtree_control").write_text("cpu")
    assert find(root, own) == root
    (root / "cgroup.subtree_control").write_text("")
    assert find(root, own) is None
    own.write_text("4:memory:/x\n")
    assert find(root, own) is None and find(root, tmp_path / "nothing") is None


def test_the_program_joins_its_control_group(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sandbox_cgroup, "parent_group", lambda: tmp_path)
    monkeypatch.setattr(sandbox_cgroup, "_remove", made.append)
    make = Path.mkdir

    def mkdir(path, *arguments, **settings):
        make(path, *arguments, **settings)
        if path.name.startswith("jsft-"):  # as the kernel does
            for name in ("cgroup.procs", "memory.max", "memory.swap.max", "pids.max"):
                (path / name).write_text("")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert sandbox.run("print(1)", limits=sandbox.Limits(memory_mb=100)).state == "ok"
    (made,) = made
    read = {name: (made / name).read_text() for name in ("cgroup.procs", "memory.max", "memory.swap.max", "pids.max")}
    assert read == {"cgroup.procs": "0", "memory.max": str(164 << 20), "memory.swap.max": "0", "pids.max": "16"}


def test_a_judge_that_stands_still_does_not_keep_a_program_alive():
    program = attacks.DAEMON + attacks.SURVIVORS["another program"]
    code = "from jsft.evaluation import sandbox as s\n"
    code += f"print(s.run({program!r}, limits=s.Limits(seconds=0.5)).state)"
    judge = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    watcher = attacks.Watcher(judge.pid)
    watcher.start()
    try:
        wait_for(lambda: inside(watcher.rooms))
        judge.send_signal(signal.SIGSTOP)
        wait_for(lambda: not inside(watcher.rooms))  # the keeper's own clock
    finally:
        judge.send_signal(signal.SIGCONT)
    assert judge.communicate(timeout=30)[0] in ("timeout\n", "broken\n")  # broken: stopped while it was built


def changed_launcher(tmp_path, monkeypatch, old: str, new: str) -> None:
    text = sandbox.LAUNCHER.read_text()
    assert text.count(old) == 1
    launcher = tmp_path / "sandbox_launcher.py"
    launcher.write_text(text.replace(old, new))
    monkeypatch.setattr(sandbox, "LAUNCHER", launcher)


def test_mounts_are_read_only_one_by_one_on_older_kernels(tmp_path, monkeypatch):
    changed_launcher(tmp_path, monkeypatch, "AT_RECURSIVE = 442,", "AT_RECURSIVE = -1,")  # no such call
    source = "import os\nfor place in ('/usr', '/usr/lib', os.path.dirname(os.__file__)):\n"
    source += "    print(os.statvfs(place).f_flag & os.ST_RDONLY)\nopen('/usr/x', 'w')"
    finished = sandbox.run(source)
    assert finished.stdout == b"1\n1\n1\n" and "Read-only file system" in finished.stderr, finished


def test_memory_is_watched_where_a_container_forbids_another_proc(tmp_path, monkeypatch):
    changed_launcher(tmp_path, monkeypatch, 'mount("proc", place, "proc"', 'mount("proc", place, "no such kind"')
    source = "import os, time\n" + attacks.HOARDERS["in ten children"]
    finished = sandbox.run(source, limits=attacks.LIMITS)
    assert (finished.state, finished.missing) == ("memory", ())
    changed_launcher(tmp_path, monkeypatch, 'outer = os.open("/proc"', 'outer = os.open("/nothing"')
    finished = sandbox.run("print(1)", limits=attacks.LIMITS)
    assert (finished.state, finished.missing) == ("ok", ("memory",))


def test_the_judges_own_limits_and_umask_do_not_break_the_room():
    code = "import os, resource as r\nfrom jsft.evaluation import sandbox as s\nos.umask(0o077)\n"
    code += "r.setrlimit(r.RLIMIT_NPROC, (12, 12))\nr.setrlimit(r.RLIMIT_STACK, (1 << 22, 1 << 22))\n"
    code += "print(s.run('import os\\nprint(input(), os.umask(0))', b'7').stdout)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "b'7 18\\n'\n", done


WHY_NOT = (
    "from jsft.evaluation import sandbox as s; print(s.why_not()); print(s.weaknesses() if s.why_not() is None else '')"
)


def test_root_of_a_rootless_container_can_judge():
    code = f"import subprocess, sys; subprocess.run(['unshare', '-Ur', sys.executable, '-c', {WHY_NOT!r}])"
    done = as_user(["-c", code])
    assert done.stdout.splitlines()[:1] == ["None"], done


def test_without_user_namespaces_one_line_says_so():
    if not shutil.which("unshare"):
        pytest.skip("needs util-linux")
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'  # of a namespace of its own
    command = ["unshare", "-Ur", "sh", "-c", script, "sh", sys.executable, "-c", WHY_NOT]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode and "Permission" in done.stderr:
        pytest.skip(done.stderr)
    assert "could not be built: user namespaces are not allowed" in done.stdout, done
