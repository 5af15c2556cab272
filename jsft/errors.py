"""The errors a user sees: one line that says what is wrong, where, and how to fix it; one exit code for each kind.

Valid for Python 3.11 and free of JAX, so that every room can use it.
"""

import csv
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class JsftError(Exception):
    """Base of all errors that end a command with one line and `exit_code`."""

    exit_code = 1


class ConfigError(JsftError):
    """A field, recipe or command-line argument is wrong."""

    exit_code = 2


class DataError(JsftError):
    """A data file, row or field is wrong."""

    exit_code = 3


class ModelError(JsftError):
    """A model directory is missing something, or holds something unsupported."""

    exit_code = 4


class CheckpointError(JsftError):
    """A checkpoint or run directory cannot be written, read or used."""

    exit_code = 5


class OutOfMemoryError(JsftError):
    """The device ran out of memory."""

    exit_code = 6


class NonFiniteError(JsftError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    exit_code = 7


class HangError(JsftError):
    """A step took far too long; the watchdog ended the process."""

    exit_code = 8


class PeerLostError(JsftError):
    """Another process of the run is gone."""

    exit_code = 9


_FIXES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or raise the quota",
    errno.EROFS: "choose another place, or mount it for writing",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.EIO: "the disk may be failing: look into the kernel's log",
    errno.ESTALE: "mount the file system again",
}


@contextmanager
def explained(kind: type[JsftError], what: str, fix: str = "") -> Iterator[None]:
    """Turns an error of disk, encoding, number, CSV or Arrow in the block into a `kind`: "what: cause; fix".

    what: what could not be done, with its file or directory. fix: used where the error itself suggests none. A
    JsftError passes unchanged; so does every other exception, which is a fault of ours.
    """
    try:
        yield
    except Exception as error:
        if not _is_foreseen(error):
            raise
        advice = _fix(error) or fix
        raise kind(f"{what}: {describe(error, what)}{advice and '; '}{advice}") from error


def _fix(error: BaseException) -> str:
    return _FIXES.get(error.errno, "") if isinstance(error, OSError) else ""


def describe(error: BaseException, said: str = "") -> str:
    """The cause in a few words, with the file where the error names one that `said` does not."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"character {error.object[error.start]!r} cannot be written as {error.encoding}"
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # when copying, the second file is to blame
        named = error.filename2 if full and error.filename2 else error.filename
        file = os.fsdecode(named) if isinstance(named, (str, bytes)) else ""
        return f"{error.strerror}: {file}" if file and file not in said else error.strerror
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_foreseen(error: BaseException) -> bool:
    """Whether a disk, an encoding or a table is to blame. Arrow may be absent: its errors are known by their module."""
    if isinstance(error, BrokenPipeError):
        return False  # the reader of our output is gone: see run_command
    arrow = any(kind.__module__ == "pyarrow.lib" for kind in type(error).__mro__)
    return arrow or isinstance(error, (OSError, UnicodeError, OverflowError, csv.Error))


def run_command(main: Callable[[], int | None], otherwise: type[JsftError] = JsftError) -> None:
    """Runs `main` and ends the process: 0, or the exit code of a `JsftError` whose message goes to stderr as one line.

    otherwise: the kind of an error of disk, encoding or table that no `explained` block caught. The traceback of such
    an error, and of any other exception, goes to a file, and the line says where.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may hold what the terminal's encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except JsftError as error:
        code = _fail(error.exit_code, str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # the reader of the output has closed it, as in "... --help | head -1"
        code = 141  # a shell's code for SIGPIPE
    except Exception as error:
        code = _last_resort(error, otherwise)
    try:
        sys.stdout.flush()
    except OSError:  # gone, or on a full disk: otherwise Python complains again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _last_resort(error: Exception, otherwise: type[JsftError]) -> int:
    """Prints an unexplained error as one line, and returns the exit code."""
    file = _keep_traceback(error)
    where = f"; the traceback is in {file}" if file else ""
    if isinstance(error, MemoryError):
        return _fail(OutOfMemoryError.exit_code, f"the host ran out of memory ({describe(error)}){where}")
    if _is_foreseen(error):
        fix = _fix(error)
        return _fail(otherwise.exit_code, f"{describe(error)}{fix and '; '}{fix}{where}")
    if not file:  # print it here instead
        traceback.print_exception(error)
    return _fail(1, f"a fault of jsft ({describe(error)}); please report it{where}")


def _fail(code: int, message: str) -> int:
    with suppress(OSError):  # stderr may be a file on a full disk
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _keep_traceback(error: BaseException) -> str | None:
    """Writes the traceback of `error` to a new file. Returns its name, or None where there is no room."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="jsft-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
        return file.name
    except OSError:
        return None
