"""An error in one of several processes becomes known to all.

The others would only wait, or end in silence.

Whoever fails leaves a message in the store that the processes met through and waits until the
others have read it: each has a thread that polls the store. No step costs anything, and no
collective is added.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from contextlib import AbstractContextManager

from torch import distributed
from transformers.utils import logging

logger = logging.get_logger(__name__)

POLL_INTERVAL_S = 1.0
# how long whoever fails waits for the others to have read its message
READ_TIMEOUT_S = 10.0
# how long the others have to get out of what they wait in, before SIGTERM ends them
EXIT_TIMEOUT_S = 30.0
FIRST, FAILURES, READ = "first", "failures", "read by {}"
# blocks are entered by all processes in one order, so that their numbers agree
_numbers = itertools.count()


class TellAll(AbstractContextManager):
    """`with TellAll(): trainer.train()`: if one process fails, all say which and why.

    They raise as soon as what they wait in lets them: over gloo when the process that failed is
    gone. Where it does not (NCCL waits in the GPU), they end by SIGTERM, as launchers end them. One
    process by itself is left alone.

    Raises:
        RuntimeError: another process failed; its error is in the message.

    Examples:
        >>> with TellAll():
        ...     pass  # trainer.train()
    """

    def __enter__(self):
        self._board = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._board = _Board(next(_numbers), distributed.get_rank(), distributed.get_world_size())
            self._board.start()
        return self

    def __exit__(self, kind, error, traceback):
        if self._board is None:
            return
        self._board.left.set()
        if not isinstance(error, Exception):
            return
        try:
            # the store may be gone with the process that failed
            message = self._board.seen or self._board.message()
            # a collective that lost a process is no failure of its own
            if message is None or not isinstance(error, RuntimeError):
                self._board.post(error)
                return
        except distributed.DistError:
            return
        raise RuntimeError(message) from error


class _Board:
    """The messages of one block, which all processes share, and their polling thread."""

    def __init__(self, number: int, rank: int, size: int):
        self.rank, self.size = rank, size
        # what another process said, as soon as the thread has read it
        self.seen: str | None = None
        self.left = threading.Event()
        store = distributed.distributed_c10d._get_default_store()
        self._store = distributed.distributed_c10d.PrefixStore(f"sparse_hf/failures/{number}", store)

    def start(self) -> None:
        threading.Thread(target=self._poll, name="TellAll", daemon=True).start()

    def message(self) -> str | None:
        """What the first process that failed says."""
        return self._store.get(FIRST).decode() if self._store.check([FIRST]) else None

    def post(self, error: Exception) -> None:
        """Say what went wrong, unless another process was first, and wait for the readers."""
        self._store.set(READ.format(self.rank), "")
        if self._store.add(FAILURES, 1) == 1:
            self._store.set(FIRST, f"process {self.rank} of {self.size} failed: {type(error).__name__}: {error}")
        everyone = [READ.format(rank) for rank in range(self.size)]
        end = time.monotonic() + READ_TIMEOUT_S
        while not self._store.check(everyone) and time.monotonic() < end:
            time.sleep(POLL_INTERVAL_S / 10)

    def _poll(self) -> None:
        while not self.left.wait(POLL_INTERVAL_S):
            try:
                self.seen = self.message()
                if self.seen is None:
                    continue
                logger.error(self.seen)
                self._store.set(READ.format(self.rank), "")
            except distributed.DistError:
                return
            if not self.left.wait(EXIT_TIMEOUT_S):
                os.kill(os.getpid(), signal.SIGTERM)
            return
