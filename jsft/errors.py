"""The errors a user sees: one line that says what is wrong, where, and how to mend it; one exit code for each kind.

Valid for Python 3.11 and free of JAX, so that every room can use it.
"""

import os
import sys
from collections.abc import Callable


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


def run_command(main: Callable[[], int | None]) -> None:
    """Runs `main` and ends the process: 0, or the exit code of a `JsftError` whose message goes to stderr as one line."""
    try:
        code = main() or 0
        sys.stdout.flush()
    except JsftError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # whoever read the output wants no more of it, as in "... --help | head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at its end
        code = 141  # as a shell has it for SIGPIPE
    sys.exit(code)
