"""Write a folder so that it is whole or absent, whatever happens on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool, bytes_needed: int) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and vanishes if anything fails.

    A run that was killed leaves `.NAME.partial-PID` beside `out`, which never loads; the next run removes it.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is false.
        OSError: less room on the disk than `bytes_needed`, before any work, or a disk that fills up on the way.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; give another folder, or overwrite=True (--overwrite)")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    free = shutil.disk_usage(out.parent).free
    if free < bytes_needed:
        raise OSError(errno.ENOSPC, f"{out.parent} has {free:,} bytes free; the checkpoint needs {bytes_needed:,}")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        _replace(partial, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = (
                f"the disk of {out.parent} is full; about {bytes_needed:,} bytes are needed. Nothing was left behind"
            )
            raise OSError(errno.ENOSPC, message) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, out: Path) -> None:
    if out.exists():
        # the old folder steps aside, so that there is no moment with half of either
        old = out.parent / f".{out.name}.partial-{os.getpid()}-old"
        os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old)
    else:
        os.rename(partial, out)


def _remove_stale(out: Path) -> None:
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        pid = stale.name.rpartition("partial-")[2].partition("-")[0]
        if pid.isdigit() and _alive(int(pid)) and int(pid) != os.getpid():
            raise FileExistsError(f"process {pid} is writing {out}; wait for it, or give another folder")
        if stale.name.endswith("-old") and not out.exists():
            os.rename(stale, out)
            continue
        logger.warning("removing %s, left by a conversion that was interrupted; starting again", stale)
        shutil.rmtree(stale)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
