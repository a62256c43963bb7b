"""TensorBoard's event files, written record by record in the thread that calls.

tensorboardX hands each event to a thread of its own over a bounded queue. A disk that is full ends
that thread, and whoever logs on waits for the queue for ever. So only its messages and checksums
are used here: a file is written whole events at a time, and what fails is told to the caller.
"""

import importlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfree_jax.files import disk_errors


class EventFile:
    """A new event file in a folder, which may hold older ones."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Opens it.

        Args:
          folder: is made if it is missing.
          purge_step: events of older files at this step and later do not count any more.

        Raises:
          OutputError: it cannot be written.
        """
        messages: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._event = messages.Event
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        with disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb", buffering=0)
            self._append(self._event(wall_time=now, file_version="brain.Event:2"))
            if purge_step is not None:
                log = messages.SessionLog(status=messages.SessionLog.START)
                self._append(self._event(wall_time=now, step=purge_step, session_log=log))

    def write(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Adds what belongs to a step.

        Raises:
          OSError: it cannot be written; the file ends with the last whole event.
        """
        from tensorboardX import summary

        now = time.time()
        found = [summary.scalar(name, value) for name, value in scalars.items()]
        found += [summary.text(name, text) for name, text in texts.items()]
        for values in found:
            self._append(self._event(wall_time=now, step=step, summary=values))

    def _append(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (header, data))
        record = header + next(sums) + data + next(sums)
        begin = self._file.tell()
        try:
            while record:
                record = record[self._file.write(record) :]
        except OSError:
            self._file.truncate(begin)
            self._file.seek(begin)
            raise

    def close(self) -> None:
        """Closes the file.

        Raises:
          OSError: what was written does not reach the disk.
        """
        with self._file:
            os.fsync(self._file.fileno())
