"""One process at a time works in a run directory.

The lock is the kernel's, on the folder itself: it goes with the process that holds it, however that ends, and leaves
no file that somebody would have to remove.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from jaxcl.errors import RequestError


class Lock:
    """Held from `take` to `release`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def take(self) -> None:
        """Locks the folder, which must exist. Raises RequestError where another process has it."""
        if self.held:
            return
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise RequestError(
                f"--out {self.folder}: another process is at work there; wait until it ends, or give another directory"
            ) from None
        except OSError:  # a file system that knows no locks, as some networks': then it is the user's care
            pass
        self._fd = fd

    def release(self) -> None:
        """Gives the folder back; nothing happens where it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
