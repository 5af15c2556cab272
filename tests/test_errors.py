"""One line and the right exit code, whatever a command raises; a traceback only where nobody foresaw the error."""

import csv
import errno
import os
import re
import subprocess
import sys

import pytest

from jsft import errors
from jsft.errors import CheckpointError, DataError, explained, run_command


def ended(main, capsys, **options) -> tuple[int, str]:
    """(exit code, stderr) of a command."""
    with pytest.raises(SystemExit) as caught:
        run_command(main, **options)
    return caught.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def arrow_error():
    import pyarrow as pa

    return pa.lib.ArrowInvalid("Parquet magic bytes not found")


CAUSES = [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space"),
    (
        OSError(errno.ENOSPC, "No space left on device", "/from", None, "/to"),
        "No space left on device: /to; free space",
    ),
    (OSError(errno.EROFS, "Read-only file system", "/x/y"), "Read-only file system: /x/y; choose another place"),
    (OSError(errno.ENOTDIR, "Not a directory", b"/x"), "Not a directory: /x; rename it"),
    (OSError("odd"), "OSError: odd; rename it"),
    (UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte"), "byte 3 is not UTF-8; rename it"),
    (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates"), "character '\\ud800' cannot be written as utf-8"),
    (OverflowError("int too big to convert"), "OverflowError: int too big to convert"),
    (csv.Error("field larger than field limit (131072)"), "Error: field larger than field limit (131072)"),
]


@pytest.mark.parametrize(("cause", "told"), CAUSES)
def test_disk_encoding_and_tables_are_explained_with_place_and_fix(cause, told):
    with pytest.raises(CheckpointError, match=f"^the run in r cannot be written: {re.escape(told)}") as caught:
        with explained(CheckpointError, "the run in r cannot be written", "rename it"):
            raise cause
    assert caught.value.__cause__ is cause


def test_errors_of_arrow_are_explained_too():
    with pytest.raises(DataError, match=r"^a\.parquet: ArrowInvalid: Parquet magic bytes not found$"):
        with explained(DataError, "a.parquet"):
            raise arrow_error()


def test_a_file_that_was_named_is_not_named_again():
    with pytest.raises(DataError, match=r"^/a/b cannot be read: No such file or directory$"):
        with explained(DataError, "/a/b cannot be read"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b")


def test_our_own_errors_and_our_own_faults_pass_as_they_are():
    for error in (DataError("x"), KeyError("x"), BrokenPipeError()):
        with pytest.raises(type(error)) as caught, explained(CheckpointError, "nothing"):
            raise error
        assert caught.value is error


def test_the_last_resort_is_one_line_and_a_file_with_the_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    code, text = ended(raising(KeyError("x")), capsys)
    assert code == 1 and text.count("\n") == 1
    assert text.startswith("error: a fault of jsft (KeyError: 'x'); please report it; the traceback is in ")
    [file] = tmp_path.iterdir()
    assert str(file) in text and file.read_text().startswith("Traceback") and "raise error" in file.read_text()


def test_an_unexplained_error_of_the_disk_has_the_exit_code_of_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device", "/x/y")
    code, text = ended(raising(full), capsys, otherwise=CheckpointError)
    assert code == 5 and text.count("\n") == 1
    assert text.startswith("error: No space left on device: /x/y; free space; the traceback is in ")
    assert ended(raising(full), capsys)[0] == 1
    assert ended(raising(CheckpointError("a\n  b")), capsys) == (5, "error: a b\n")


def test_a_host_without_memory_has_the_exit_code_of_memory(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    code, text = ended(raising(MemoryError("Unable to allocate 9.3 GiB")), capsys)
    assert code == 6 and "error: the host ran out of memory (MemoryError: Unable to allocate 9.3 GiB); the" in text


def test_on_a_full_disk_only_a_fault_of_ours_prints_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(errors.tempfile, "NamedTemporaryFile", lambda *a, **k: raising(OSError(28, "full"))())
    code, text = ended(raising(OSError(errno.ENOSPC, "No space left on device")), capsys, otherwise=CheckpointError)
    assert (code, text) == (5, "error: No space left on device; free space\n")
    code, text = ended(raising(KeyError("x")), capsys)
    assert code == 1 and text.startswith("Traceback") and text.splitlines()[-1].startswith("error: a fault of jsft")


def test_output_to_a_full_disk_is_one_line():
    code = "from jsft.errors import run_command, DataError; run_command(lambda: print('x' * 100), DataError)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
        silent = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full)
    assert done.returncode == silent.returncode == 3
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "error: No space left on device; free space; the traceb"
    )


def test_a_name_that_the_terminal_cannot_show_ends_nothing():
    code = "from jsft.errors import run_command; run_command(lambda: print('a\\udcff ü'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a\\udcff \\xfc\n"), done.stderr
