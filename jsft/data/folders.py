"""Which files of a folder or of a hub data set are its data: one split, one format, nothing skipped silently."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsft.data.arrow_tables import saved_splits
from jsft.data.hub_configs import choose_config, choose_split, declared_configs, matching
from jsft.errors import DataError, explained

JSON = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".arrow", ".feather")
SUFFIXES = (".parquet", *JSON, *TABLES)
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
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json")
_OTHER_FORMATS = {  # what else holds data -> what to do about it
    ".gz": "unpack it (gunzip)",
    ".zst": "unpack it (unzstd)",
    ".bz2": "unpack it (bunzip2)",
    ".xz": "unpack it (unxz)",
    ".zip": "unpack it (unzip)",
    ".tar": "unpack it (tar -xf)",
    ".xlsx": "save it as CSV",
    ".txt": 'write a JSON line {"text": ...} for each document',
}


class Wanted(NamedTuple):
    """Which part of a data set is read. splits: the preferred first; named: the one that `field` of the config names;
    strict: whether a lone file, which has no parts, is refused where one is named.
    """

    splits: Sequence[str] = TRAIN
    named: str | None = None
    subset: str | None = None
    field: str = "data.split"
    strict: bool = True


class Chosen(NamedTuple):
    """The data files of a folder, by name, a line for each group of files that was left out, and the split's name."""

    files: list[Path]  # or the one folder that save_to_disk wrote
    left_out: list[str]
    split: str = ""


def choose_files(folder: Path, wanted: Wanted = Wanted()) -> Chosen:
    """The files of one split of the folder: as its README.md declares, as save_to_disk wrote them, or by their names.

    By names: the first of the wanted splits that there is, or all files where their names tell no split. A folder with
    one split alone is taken whatever it is called. Raises DataError for a folder that holds no data, files of several
    formats, files with and without a split, or several splits without a wanted one.
    """
    found = _visible_files(folder)
    if (splits := saved_splits(folder)) is not None:
        return _choose_saved(folder, splits, wanted)
    if configs := declared_configs(folder):
        return _choose_declared(folder, configs, wanted)
    if wanted.subset:
        return _choose_subfolder(folder, found, wanted)
    data = [path for path in found if path.name not in ABOUT and suffix(path) in (*SUFFIXES, *_OTHER_FORMATS)]
    if any(suffix(path) != ".txt" for path in data):  # notes beside data
        data = [path for path in data if suffix(path) != ".txt"]
    others = [path for path in found if path not in set(data)]
    if not data:
        raise DataError(f"{folder}: holds no {' or '.join(SUFFIXES)} file")
    groups = defaultdict(list)
    for path in data:
        groups[_split_of(path.relative_to(folder))].append(path)
    if wanted.named and wanted.named not in groups:
        groups = _by_stem(folder, data)
    taken = _choose_group(folder, groups, wanted)
    _refuse_mixed(folder, groups[taken])
    _refuse_incomplete(folder, groups[taken])
    left_out = [f"left out: {_names(folder, paths)} (split {name})" for name, paths in groups.items() if name != taken]
    if others:
        left_out.append(f"left out: {_names(folder, others)} (no data)")
    return Chosen(groups[taken], left_out, taken)


def suffix(path: Path) -> str:
    """The suffix that tells a file's format: `.parquet` also of `X.PARQUET`, `.csv.gz` of `x.csv.gz`."""
    last = path.suffix.lower()
    both = Path(path.stem).suffix.lower() + last
    return both if both in SUFFIXES else last


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


def _choose_saved(folder: Path, splits: list[str], wanted: Wanted) -> Chosen:
    if wanted.subset:
        raise DataError(f"{folder}: a folder of save_to_disk has no subsets; leave data.subset={wanted.subset} out")
    if splits == [""]:
        if wanted.named:
            raise DataError(f"{folder}: was saved as one split; leave {wanted.field}={wanted.named} out")
        return Chosen([folder], [])
    taken = choose_split(splits, wanted.splits, wanted.named, str(folder), wanted.field)
    left_out = [f"left out: {name} (split {name})" for name in splits if name != taken]
    if not (folder / taken).is_dir():
        raise DataError(f"{folder}: its split {taken} is not there; save the data set again")
    return Chosen([folder / taken], left_out, taken)


def _choose_declared(folder: Path, configs, wanted: Wanted) -> Chosen:
    config = choose_config(configs, wanted.subset, str(folder))
    taken = choose_split(list(config.splits), wanted.splits, wanted.named, str(folder), wanted.field)
    left_out = [f"left out: the split {name} of its README.md" for name in config.splits if name != taken]
    if others := [one.name for one in configs if one.name != config.name]:
        left_out.append(f"left out: the subsets {', '.join(others)} of its README.md")
    found = matching(folder, config.splits[taken])
    _refuse_mixed(folder, found)
    _refuse_incomplete(folder, found)
    return Chosen(found, left_out, taken)


def _choose_subfolder(folder: Path, found: Sequence[Path], wanted: Wanted) -> Chosen:
    """Without a README.md that declares subsets, each folder below may be one."""
    there = dict.fromkeys(path.relative_to(folder).parts[0] for path in found if path.parent != folder)
    if wanted.subset not in there:
        names = f"its folders are {', '.join(there)}" if there else "it has no folders"
        raise DataError(f"{folder}: has no subset {wanted.subset!r}; {names}; leave data.subset out, or name one")
    return choose_files(folder / wanted.subset, wanted._replace(subset=None))


def _by_stem(folder: Path, data: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the name before `-00000-of-00002`, or by that of their folder where these do not differ from all."""
    groups = defaultdict(list)
    for path in data:
        found = _SHARD.fullmatch(path.name)
        groups[found[1] if found else path.name.partition(".")[0]].append(path)
    for path in data:
        if path.parent != folder:
            groups[path.parent.relative_to(folder).parts[0]].append(path)
    return groups


def _split_of(relative: Path) -> str:
    """'train', 'validation', 'test', or '' where no name tells one; the file's own name counts before its folders'."""
    for part in (relative.name.partition(".")[0], *reversed(relative.parent.parts)):
        splits = {_WORDS[word] for word in _WORD.findall(part.lower())}
        if splits:
            return splits.pop() if len(splits) == 1 else ""
    return ""


def _choose_group(folder: Path, groups: dict[str, list[Path]], wanted: Wanted) -> str:
    named = ", ".join(name for name in groups if name)
    if wanted.named:
        if wanted.named not in groups:
            there = f"set {wanted.field} to one of {named}" if named else f"leave {wanted.field} out"
            raise DataError(f"{folder}: has no split {wanted.named!r}; {there}, or name the files themselves")
        return wanted.named
    if len(groups) == 1:
        return next(iter(groups))
    if "" in groups:
        raise DataError(
            f"{folder}: holds files of the split {named}, and files whose names tell no split "
            f"({_names(folder, groups[''])}); name the files themselves"
        )
    for split in wanted.splits:
        if split in groups:
            return split
    raise DataError(
        f"{folder}: holds the splits {named}, none of them {' or '.join(wanted.splits)}; choose one with "
        f"{wanted.field}={next(iter(groups))}, or name the files themselves"
    )


def _refuse_mixed(folder: Path, paths: Sequence[Path]) -> None:
    formats = {}
    for path in paths:
        formats.setdefault(".jsonl" if suffix(path) in JSON else suffix(path), path)
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
