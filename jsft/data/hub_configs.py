"""The configurations (subsets) and splits that a data set's README.md declares, as on the Hugging Face hub.

The front matter lists, for each configuration, patterns of files by split. huggingface_hub reads it; nothing is
downloaded to know what there is, and a local copy of a data set is read in the same way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsft.errors import DataError, describe


class Declared(NamedTuple):
    """One configuration: its name and the patterns of each split's files, relative to the data set's folder."""

    name: str
    splits: dict[str, list[str]]
    default: bool


def declared_configs(folder: Path) -> list[Declared]:
    """The configurations that `folder/README.md` declares with their files; [] where it declares none.

    Raises DataError where its front matter cannot be read.
    """
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    if not card.is_file():
        return []
    try:
        configs = (metadata_load(card) or {}).get("configs") or []
        return [found for one in configs if (found := _declared(one))]
    except Exception as error:  # of YAML, of the file's encoding, or of entries with other types
        raise DataError(
            f"{card}: its list of configurations cannot be read ({describe(error)}); correct its front matter"
        ) from error


def _declared(entry: dict[str, Any]) -> Declared | None:
    files, base = entry.get("data_files"), str(entry.get("data_dir") or "").strip("/")
    if files is None:
        return None
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(one, str) for one in files)):
        files = {"train": files}
    if isinstance(files, list):
        files = {str(one.get("split", "train")): one["path"] for one in files}
    splits = {
        str(split): [f"{base}/{one}" if base else str(one) for one in ([path] if isinstance(path, str) else path)]
        for split, path in files.items()
    }
    return Declared(str(entry.get("config_name", "default")), splits, bool(entry.get("default")))


def choose_config(configs: Sequence[Declared], subset: str | None, where: str) -> Declared:
    """The configuration `subset`; without it the only one, or the one marked as default. Raises DataError."""
    names = ", ".join(one.name for one in configs)
    if subset:
        for one in configs:
            if one.name == subset:
                return one
        raise DataError(f"{where}: has no subset {subset!r}; set data.subset to one of {names}")
    standard = [one for one in configs if one.default] or [one for one in configs if one.name == "default"]
    if len(configs) == 1 or standard:
        return (standard or list(configs))[0]
    raise DataError(f"{where}: has {len(configs)} subsets ({names}); choose one with data.subset={configs[0].name}")


def choose_split(splits: Sequence[str], wanted: Sequence[str], named: str | None, where: str, field: str) -> str:
    """The split `named`; without it the first of `wanted` that there is, or the only one. Raises DataError."""
    there = ", ".join(splits)
    if named:
        if named not in splits:
            raise DataError(f"{where}: has no split {named!r}; set {field} to one of {there}")
        return named
    for split in wanted:
        if split in splits:
            return split
    if len(splits) == 1:
        return splits[0]
    raise DataError(
        f"{where}: has the splits {there}, none of them {' or '.join(wanted)}; choose one with {field}={splits[0]}"
    )


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files below `folder` that fit one of the patterns, by name. Raises DataError where none does."""
    found = set()
    for pattern in patterns:
        if pattern.startswith("/") or ".." in pattern or "://" in pattern:
            raise DataError(
                f"{folder}/README.md: names files outside of the data set ({pattern}); name the files instead"
            )
        whole = f"{pattern}/*" if pattern.endswith("**") else pattern  # `**` alone stands for folders
        found |= {path for path in folder.glob(whole.removeprefix("./")) if path.is_file()}
    if not found:
        raise DataError(f"{folder}: has no file for {', '.join(patterns)}, which its README.md names; fetch it again")
    return sorted(found)
