"""Which system calls a judged program may make: a seccomp filter, compiled by the system's libseccomp.

libseccomp knows every architecture's numbers and closes the side doors (32-bit calls, x32). It is called through
ctypes: it comes with Debian, Ubuntu and Fedora (apt and systemd need it), and its bindings on PyPI either need it too
or are unmaintained. A call that is not listed fails with 'not implemented', which C libraries handle. So a program has
no keyrings, io_uring, userfaultfd, bpf, perf, ptrace, memfd, System V memory, mounts or namespaces, and only Unix
sockets.
"""

import ctypes
import errno
import functools
import os

ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 open openat creat close close_range
    lseek dup dup2 dup3 flock fsync fdatasync sync_file_range truncate ftruncate fallocate fadvise64
    sendfile copy_file_range pipe pipe2 stat fstat lstat newfstatat fstatat64 statx access faccessat faccessat2
    readlink readlinkat getdents getdents64 mkdir mkdirat rmdir rename renameat renameat2 link linkat symlink
    symlinkat unlink unlinkat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask chdir fchdir
    getcwd utime utimes utimensat futimesat mknod mknodat statfs fstatfs getxattr lgetxattr fgetxattr listxattr
    llistxattr flistxattr
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd
    eventfd2 timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4
    mmap munmap mremap mprotect madvise brk msync mincore membarrier
    fork vfork execve exit exit_group wait4 waitid getpid getppid gettid getpgid setpgid getpgrp getsid setsid
    set_tid_address set_robust_list get_robust_list futex futex_waitv rseq arch_prctl prctl getrlimit setrlimit
    getrusage times sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
    sched_get_priority_min getpriority getcpu sysinfo uname
    getuid geteuid getgid getegid getresuid getresgid getgroups capget
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack kill tkill
    tgkill alarm setitimer getitimer pause restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom
    bind listen accept accept4 connect getsockname getpeername sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg
    shutdown getsockopt
""".split()

EQUAL, MASKED_EQUAL = 4, 7  # libseccomp's comparisons
UNIX = 1
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX: sizes, modes and flags; nothing types into a terminal.
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no locks and no larger pipes, whose
# memory no process shows.
FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)
# Allowed where one argument has a certain value: (call, argument, comparison, a, b).
CONDITIONAL = [
    ("socket", 0, EQUAL, UNIX, 0),
    ("socketpair", 0, EQUAL, UNIX, 0),
    ("clone", 0, MASKED_EQUAL, NEW_NAMESPACES, 0),  # clone3 hides its flags; without it, clone is used
    ("prlimit64", 0, EQUAL, 0, 0),  # the caller's own limits
    ("sched_setaffinity", 0, EQUAL, 0, 0),
    *(("ioctl", 1, EQUAL, number, 0) for number in IOCTLS),
    *(("fcntl", 1, EQUAL, number, 0) for number in FCNTLS),
]
ALLOW, ERROR = 0x7FFF0000, 0x00050000
OPTIMIZE, BINARY_TREE = 8, 2


class _Comparison(ctypes.Structure):
    _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64)]
    _fields_ += [("b", ctypes.c_uint64)]


@functools.cache
def compiled() -> bytes:
    """The filter's BPF instructions, 8 bytes each; empty where libseccomp is missing or refuses the rules."""
    try:
        return _compile(ctypes.CDLL("libseccomp.so.2"))
    except OSError:
        return b""


def _compile(library: ctypes.CDLL) -> bytes:
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ERROR | errno.ENOSYS)))
    try:
        library.seccomp_attr_set(rules, OPTIMIZE, BINARY_TREE)  # older libraries: one by one
        for name in ALLOWED:
            _allow(library, rules, name)
        for name, *comparison in CONDITIONAL:
            _allow(library, rules, name, _Comparison(*comparison))
        descriptor = os.memfd_create("filter")
        try:
            _check(library.seccomp_export_bpf(rules, descriptor), "export")
            return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        finally:
            os.close(descriptor)
    finally:
        library.seccomp_release(rules)


def _allow(library: ctypes.CDLL, rules: ctypes.c_void_p, name: str, *comparisons: _Comparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:
        return  # not on this architecture, or newer than the library
    array = (_Comparison * len(comparisons))(*comparisons)
    code = library.seccomp_rule_add_array(rules, ctypes.c_uint32(ALLOW), number, len(comparisons), array)
    _check(code, name)


def _check(code: int, what: str) -> None:
    if code != 0:
        raise OSError(-code, f"libseccomp: {what}: {os.strerror(-code)}")
