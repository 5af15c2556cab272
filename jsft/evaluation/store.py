"""A task's folder: `samples.jsonl`, written line by line as samples come, `results.json` and `per_problem.json`.

While a task runs, `samples.jsonl` is a log: a line per finished sample, later a line per judge's verdict.
When the task is done, the file is rewritten, sorted and with the grades, and `results.json` says `"state": "done"`.
A torn last line (the process was killed) is cut off; a damaged line before it is left out.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsft import files
from jsft.errors import CheckpointError, ConfigError, describe, explained
from jsft.evaluation.sampling import check_stored


class TaskFolder:
    """Samples and results of one task on one model."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """`settings`: everything the samples depend on. Folders with other settings are refused."""
        self.path, self.settings = path, settings
        self.samples: dict[tuple[str, int], dict[str, Any]] = {}
        self._stream = None

    @property
    def results(self) -> dict[str, Any] | None:
        """results.json, or None. Raises CheckpointError where we did not write it."""
        path = self.path / "results.json"
        try:
            results = json.loads(path.read_bytes())
            results["settings"].items(), results["state"]
        except FileNotFoundError:
            return None
        except NotADirectoryError:  # said when the folder is made
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {describe(error, str(path))}; remove the folder") from None
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} is not what an evaluation writes; remove the folder") from None
        return results

    def open(self, redo: bool = False) -> bool:
        """Reads what is there. Returns whether the task is done. Raises ConfigError on other settings."""
        results = None if redo else self.results
        if redo and self.path.exists():
            with self._explained():
                shutil.rmtree(self.path)
            results = None
        if results is not None:
            different = [k for k, v in self.settings.items() if results["settings"].get(k) != v]
            if results["state"] != "done":
                drawn = (self.path / "samples.jsonl").exists() and (self.path / "samples.jsonl").stat().st_size
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
        with self._explained():
            files.make_folder(self.path)
            files.remove_leftovers(self.path)
            self.write_results({"state": "running"})
            self._read_samples()
            self._stream = (self.path / "samples.jsonl").open("ab")
        return False

    def _explained(self, name: str = ""):
        return explained(CheckpointError, f"{self.path / name} cannot be written", "choose another --out")

    def add(self, entry: dict[str, Any]) -> None:
        """Appends a line: a new sample, or more about a known one (merged into it by problem and sample)."""
        self.samples.setdefault((entry["problem"], entry["sample"]), {}).update(entry)
        with self._explained("samples.jsonl"):
            self._stream.write(files.json_line(entry))
            self._stream.flush()

    def finish(
        self, order: list[tuple[str, int]], results: dict[str, Any], per_problem: list[float] | None = None
    ) -> None:
        """Writes the samples in `order`, the scores of the problems, and the final results."""
        with self._explained("samples.jsonl"):
            self._stream.close()
            files.write_bytes(
                self.path / "samples.jsonl", b"".join(files.json_line(self.samples[key]) for key in order)
            )
        if per_problem is not None:
            with self._explained("per_problem.json"):
                files.write_text(self.path / "per_problem.json", json.dumps(per_problem) + "\n")
        self.write_results({"state": "done", **results})

    def fail(self, reason: str) -> None:
        """Leaves the samples for another try and says why there is no result."""
        if self._stream is not None:
            with suppress(OSError):  # the disk is full: that error was reported already
                self._stream.close()
        self.write_results({"state": "failed", "reason": reason})

    def write_results(self, results: dict[str, Any]) -> None:
        text = json.dumps({**results, "settings": self.settings}, indent=2, ensure_ascii=False) + "\n"
        with self._explained("results.json"):
            files.write_text(self.path / "results.json", text)

    def _read_samples(self) -> None:
        """Reads every whole line. Damaged ones are counted and removed from the file; their samples are drawn again."""
        path = self.path / "samples.jsonl"
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        found, damaged = [], []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line, parse_constant=_refused)
                key = entry["problem"], entry["sample"]
                hash(key)
                check_stored(entry)
            except (ValueError, KeyError, TypeError, RecursionError):
                if number < len(lines) or line.endswith(b"\n"):
                    damaged.append(number)
                continue
            if line.endswith(b"\n"):
                self.samples.setdefault(key, {}).update(entry)
                found.append((key, line))
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            print(f"warning: {path}, line {damaged[0]} is damaged{more}; what it held is redone", flush=True)
        # A verdict whose sample was in a damaged line is no sample.
        self.samples = {key: entry for key, entry in self.samples.items() if "response" in entry}
        good = [line for key, line in found if key in self.samples]
        if good != lines:
            files.write_bytes(path, b"".join(good))


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
