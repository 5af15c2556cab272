"""A task's folder: `samples.jsonl`, written line by line as samples come, and `results.json`.

While a task runs, `samples.jsonl` is a log: a line per finished sample, later a line per judge's verdict.
When it is done the file is written once more, sorted and with the grades, and `results.json` says `"state":
"done"`. A torn last line (the process was killed) is cut off.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from jsft.errors import CheckpointError, ConfigError


class TaskFolder:
    """Samples and results of one task on one model."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """`settings`: everything the samples depend on. Folders with other settings are refused."""
        self.path, self.settings = path, settings
        self.samples: dict[tuple[str, int], dict[str, Any]] = {}
        self._stream = None

    @property
    def results(self) -> dict[str, Any] | None:
        """results.json, or None."""
        try:
            return json.loads((self.path / "results.json").read_text(encoding="utf-8"))
        except OSError:
            return None
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}/results.json is not JSON ({error}); remove the folder"
            ) from None

    def open(self, redo: bool = False) -> bool:
        """Reads what is there. Returns whether the task is done. Raises ConfigError on other settings."""
        results = self.results
        if redo and self.path.exists():
            shutil.rmtree(self.path)
            results = None
        if results is not None:
            different = [k for k, v in self.settings.items() if results["settings"].get(k) != v]
            if results["state"] != "done":
                drawn = (self.path / "samples.jsonl").exists() and (
                    self.path / "samples.jsonl"
                ).stat().st_size
                # Samples hold for any judge; where there are none yet, any settings will do.
                different = [k for k in different if drawn and k != "judges"]
            if different:
                shown = "; ".join(
                    f"{k}: {results['settings'].get(k)!r} there, {self.settings[k]!r} now" for k in different
                )
                raise ConfigError(
                    f"{self.path} holds results of other settings ({shown}); give another --out, or --redo"
                )
            if results["state"] == "done":
                return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if results is None or results["state"] != "done":
                self.write_results({"state": "running"})
            self._read_samples()
            self._stream = (self.path / "samples.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}") from error
        return False

    def add(self, entry: dict[str, Any]) -> None:
        """Appends a line: a new sample, or more about a known one (merged into it by problem and sample)."""
        self.samples.setdefault((entry["problem"], entry["sample"]), {}).update(entry)
        try:
            self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise CheckpointError(f"{self.path}/samples.jsonl cannot be written: {error.strerror}") from error

    def finish(self, order: list[tuple[str, int]], results: dict[str, Any]) -> None:
        """Writes the samples in `order` and the final results."""
        self._stream.close()
        lines = (json.dumps(self.samples[key], ensure_ascii=False) + "\n" for key in order)
        try:
            _replace(self.path / "samples.jsonl", "".join(lines))
        except OSError as error:
            raise CheckpointError(f"{self.path}/samples.jsonl cannot be written: {error.strerror}") from error
        self.write_results({"state": "done", **results})

    def fail(self, reason: str) -> None:
        """Leaves the samples for another try and says why there is no result."""
        if self._stream is not None:
            self._stream.close()
        self.write_results({"state": "failed", "reason": reason})

    def write_results(self, results: dict[str, Any]) -> None:
        text = json.dumps({**results, "settings": self.settings}, indent=2, ensure_ascii=False) + "\n"
        try:
            _replace(self.path / "results.json", text)
        except OSError as error:
            raise CheckpointError(f"{self.path}/results.json cannot be written: {error.strerror}") from error

    def _read_samples(self) -> None:
        path = self.path / "samples.jsonl"
        if not path.exists():
            return
        whole = 0
        with path.open("rb") as stream:
            for line in stream:
                try:
                    entry = json.loads(line)
                    key = entry["problem"], entry["sample"]
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                self.samples.setdefault(key, {}).update(entry)
                whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
