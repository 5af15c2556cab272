"""TensorBoard's event file, written in the calling thread.

TensorBoard's own writer has a thread that prints a traceback when the disk is full and leaves half a record; no later
record can then be read.
"""

import io
import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_COUNT = itertools.count()


class EventFile:
    """One file of events in `folder`, created with the first event."""

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._file = None

    def add(self, step: int, values: list[Summary.Value]) -> None:
        """Appends `values` as those of `step`. Raises OSError; the file then ends with the previous event."""
        if self._file is None:
            self._open()
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
        self._file = (self._folder / name).open("ab", buffering=0)
        source = SourceMetadata(writer="jsft")
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source))
        except OSError:
            self._file.close()
            self._file = None
            raise

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        whole, left = os.fstat(self._file.fileno()).st_size, record.getbuffer()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), whole)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
