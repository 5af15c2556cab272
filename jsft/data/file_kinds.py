"""What a data file really is, by its first bytes: file names can be wrong, and downloads fail."""

from pathlib import Path

from jsft.errors import DataError, explained

_LONGEST = 64
_KINDS = (  # first bytes, what they mean, what to do
    (b"\x1f\x8b", "is compressed (gzip)", "unpack it (gunzip), or end its name in .gz"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd)", "unpack it (unzstd)"),
    (b"BZh", "is compressed (bzip2)", "unpack it (bunzip2)"),
    (b"\xfd7zXZ", "is compressed (xz)", "unpack it (unxz)"),
    (b"PK\x03\x04", "is a zip archive", "unpack it (unzip)"),
    (b"PAR1", "is a parquet file", "end its name in .parquet"),
    (b"ARROW1", "is an Arrow file", "end its name in .arrow"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data", "fetch the data: git lfs pull"),
    (b"<", "is an HTML or XML page, not data", "fetch it again"),
    (b"\xff\xfe\x00\x00", "is UTF-32", "store it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "is UTF-32", "store it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "is UTF-16", "store it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16", "store it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)


def refuse_foreign(path: Path) -> None:
    """Raises DataError when the file is empty, cannot be read, or is plainly of another kind than its name says."""
    with explained(DataError, f"{path}: cannot be read"), open(path, "rb") as file:
        head = file.read(_LONGEST)
    if not head:
        raise DataError(f"{path}: is empty (0 bytes) and holds no rows; fetch it again, or leave it out")
    parquet = path.suffix.lower() == ".parquet"
    for start, kind, fix in _KINDS:
        if head.startswith(start) and not (start == b"PAR1" and parquet):
            raise DataError(f"{path}: {kind}; {fix}")
    if parquet and head.lstrip()[:1] in (b"{", b"["):
        raise DataError(f"{path}: is JSON, not parquet; end its name in .jsonl")
    if not parquet and b"\0" in head[:4]:
        order = "LE" if head[1:2] == b"\0" else "BE"
        raise DataError(
            f"{path}: is UTF-16 or another binary format; store it as UTF-8 (iconv -f UTF-16{order} -t UTF-8)"
        )
