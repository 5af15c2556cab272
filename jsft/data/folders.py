"""Which files of a folder or of a hub data set are its data: one split, one format, nothing skipped silently."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsft.errors import DataError, explained

SUFFIXES = (".parquet", ".jsonl", ".json")
TRAIN, HELD_OUT = ("train",), ("validation", "test")  # the splits that a run wants, the preferred first

_WORDS = {  # words of a file's or folder's name -> its split
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "heldout": "validation",
    "held_out": "validation",
    "held-out": "validation",
    "holdout": "validation",
    "test": "test",
    "testing": "test",
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![a-z])")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\..*")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json")
_OTHER_FORMATS = {  # what else holds data -> what to do about it
    ".arrow": "write parquet, with datasets: Dataset.from_file(...).to_parquet(...)",
    ".feather": "write parquet, with pandas: read_feather(...).to_parquet(...)",
    ".csv": "write parquet, with pandas: read_csv(...).to_parquet(...)",
    ".tsv": "write parquet, with pandas: read_csv(..., sep='\\t').to_parquet(...)",
    ".ndjson": "end its name in .jsonl",
    ".gz": "unpack it (gunzip)",
    ".zst": "unpack it (unzstd)",
    ".bz2": "unpack it (bunzip2)",
    ".xz": "unpack it (unxz)",
    ".zip": "unpack it (unzip)",
    ".tar": "unpack it (tar -xf)",
}


class Chosen(NamedTuple):
    """The data files of a folder, by name, and a line for each group of files that was left out."""

    files: list[Path]
    left_out: list[str]


def choose_files(folder: Path, splits: Sequence[str] = TRAIN) -> Chosen:
    """The files of the first of `splits` that the folder has, or all where their names tell no split.

    A folder with one split alone is taken whatever it is called. Raises DataError for a folder that holds no data,
    files of several formats, files with and files without a split, or several splits without a wanted one.
    """
    found = _visible_files(folder)
    _refuse_saved_to_disk(folder, found)
    data = [path for path in found if path.name not in _ABOUT and suffix(path) in (*SUFFIXES, *_OTHER_FORMATS)]
    others = [path for path in found if path not in set(data)]
    if not data:
        raise DataError(f"{folder}: holds no {' or '.join(SUFFIXES)} file")
    groups = defaultdict(list)
    for path in data:
        groups[_split_of(path.relative_to(folder))].append(path)
    taken = _choose_split(folder, groups, splits)
    _refuse_mixed(folder, groups[taken])
    _refuse_incomplete(folder, groups[taken])
    left_out = [f"left out: {_names(folder, paths)} (split {name})" for name, paths in groups.items() if name != taken]
    if others:
        left_out.append(f"left out: {_names(folder, others)} (no data)")
    return Chosen(groups[taken], left_out)


def suffix(path: Path) -> str:
    """The suffix that tells a file's format: `.parquet` also of `X.PARQUET`."""
    return path.suffix.lower()


def how_to_read(path: Path) -> str:
    """What to do about a file of a format that is not read."""
    hint = _OTHER_FORMATS.get(suffix(path))
    return f"{path}: {path.suffix or 'no suffix'} is an unknown data format; " + (
        hint or f"use one of {', '.join(SUFFIXES)}"
    )


def _visible_files(folder: Path) -> list[Path]:
    with explained(DataError, f"{folder}: cannot be listed"):
        found = sorted(
            path
            for path in folder.rglob("*")
            if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        for path in found:
            if not path.exists():
                raise DataError(f"{path}: a link to {path.readlink()}, which is not there; fix or remove it")
    return found


def _refuse_saved_to_disk(folder: Path, found: Sequence[Path]) -> None:
    names = {path.relative_to(folder).as_posix() for path in found}
    for path in found:
        sets = path.name == "dataset_dict.json"
        parent = path.parent.relative_to(folder)
        if sets or (path.name == "state.json" and (parent / "dataset_info.json").as_posix() in names):
            one = "['train']" if sets else ""
            raise DataError(
                f"{path.parent}: was written by save_to_disk of datasets (Arrow files), which is not read; write "
                f"parquet: datasets.load_from_disk('{path.parent}'){one}.to_parquet('train.parquet')"
            )


def _split_of(relative: Path) -> str:
    """'train', 'validation', 'test', or '' where no name tells one; the file's own name counts before its folders'."""
    for part in (relative.name.partition(".")[0], *reversed(relative.parent.parts)):
        splits = {_WORDS[word] for word in _WORD.findall(part.lower())}
        if splits:
            return splits.pop() if len(splits) == 1 else ""
    return ""


def _choose_split(folder: Path, groups: dict[str, list[Path]], splits: Sequence[str]) -> str:
    if len(groups) == 1:
        return next(iter(groups))
    named = ", ".join(name for name in groups if name)
    if "" in groups:
        raise DataError(
            f"{folder}: holds files of the split {named}, and files whose names tell no split "
            f"({_names(folder, groups[''])}); name the files themselves"
        )
    for split in splits:
        if split in groups:
            return split
    wanted = " or ".join(splits)
    raise DataError(f"{folder}: holds the splits {named}, none of them {wanted}; name the files themselves")


def _refuse_mixed(folder: Path, paths: Sequence[Path]) -> None:
    formats = {}
    for path in paths:
        formats.setdefault(".jsonl" if suffix(path) == ".json" else suffix(path), path)
    if len(formats) > 1:
        examples = ", ".join(str(path.relative_to(folder)) for path in formats.values())
        raise DataError(
            f"{folder}: mixes data files of several formats ({examples}); name the files themselves, or move those of "
            "one format away"
        )
    if (only := next(iter(formats))) in _OTHER_FORMATS:
        raise DataError(how_to_read(formats[only]))


def _refuse_incomplete(folder: Path, paths: Sequence[Path]) -> None:
    """Names like train-00000-of-00002.parquet say how many there are."""
    there = defaultdict(set)
    for path in paths:
        if found := _SHARD.fullmatch(path.name):
            there[path.parent / found[1], int(found[3])].add(int(found[2]))
    for (stem, count), numbers in there.items():
        if missing := sorted(set(range(count)) - numbers):
            raise DataError(
                f"{folder}: {stem.relative_to(folder)} has {len(numbers)} of its {count} files, number {missing[0]} is "
                "not there; fetch it, or name the files themselves"
            )


def _names(folder: Path, paths: Sequence[Path]) -> str:
    first = ", ".join(str(path.relative_to(folder)) for path in paths[:3])
    return f"{first} and {len(paths) - 3} more" if len(paths) > 3 else first
