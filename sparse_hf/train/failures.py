"""An error in one of several processes is said by all, where the others would only wait, or end without a word.

Whoever fails leaves a message in the store that the processes met through and waits until the others have read it: each has a
thread that looks once a second. No step costs anything, and no collective is added.
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

# seconds between looks, that whoever fails waits for the others, and that those have to get out of what they wait in
LOOK, HEAR, LEAVE = 1.0, 10.0, 30.0
# blocks are entered by all processes in one order, so that their numbers agree
_numbers = itertools.count()


class TellAll(AbstractContextManager):
    """`with TellAll(): trainer.train()`: if one process fails, the others say which and why.

    They raise as soon as what they wait in lets them: over gloo when the process that failed is gone. Where it does not (NCCL
    waits in the GPU), they end by SIGTERM, as launchers end them. One process by itself is left alone.

    Raises:
        RuntimeError: another process failed; its error is in the message.
    """

    def __enter__(self):
        self._store = self._heard = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self._rank, self._size = distributed.get_rank(), distributed.get_world_size()
            store = distributed.distributed_c10d._get_default_store()
            self._store = distributed.PrefixStore(f"sparse_hf/failures/{next(_numbers)}", store)
            self._left = threading.Event()
            threading.Thread(target=self._listen, name="TellAll", daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback):
        if self._store is None:
            return
        self._left.set()
        if not isinstance(error, Exception):
            return
        try:
            # the store may be gone with the process that failed
            told = self._heard or self._told()
            # a collective that lost a process is no failure of its own
            if told is None or not isinstance(error, RuntimeError):
                self._tell(error)
                return
        except distributed.DistError:
            return
        raise RuntimeError(told) from error

    def _told(self) -> str | None:
        """What the first process that failed says."""
        return self._store.get("first").decode() if self._store.check(["first"]) else None

    def _tell(self, error: Exception) -> None:
        self._store.set(f"heard by {self._rank}", "")
        if self._store.add("failures", 1) == 1:
            self._store.set("first", f"process {self._rank} of {self._size} failed: {type(error).__name__}: {error}")
        everyone = [f"heard by {rank}" for rank in range(self._size)]
        end = time.monotonic() + HEAR
        while not self._store.check(everyone) and time.monotonic() < end:
            time.sleep(LOOK / 10)

    def _listen(self) -> None:
        while not self._left.wait(LOOK):
            try:
                self._heard = self._told()
                if self._heard is None:
                    continue
                logger.error(self._heard)
                self._store.set(f"heard by {self._rank}", "")
            except distributed.DistError:
                return
            if not self._left.wait(LEAVE):
                os.kill(os.getpid(), signal.SIGTERM)
            return
