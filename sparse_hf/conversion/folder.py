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


def check_target(out: str | Path, overwrite: bool) -> Path:
    """The real folder that `out` names, if it may be written.

    Raises:
        FileExistsError: `out` is a file, holds something and `overwrite` is false, or holds no checkpoint.
    """
    real = Path(out).resolve()
    if real.exists() and not real.is_dir():
        raise FileExistsError(f"{out} is a file; give a folder")
    if not real.exists() or not any(real.iterdir()):
        return real
    if not overwrite:
        raise FileExistsError(f"{out} is not empty; give another folder, or overwrite=True (--overwrite)")
    if not (real / "config.json").is_file():
        raise FileExistsError(
            f"{out} is not empty and holds no config.json, so it is no checkpoint, and overwrite replaces nothing else; "
            "give another folder"
        )
    return real


def keep_apart(source: Path, out: Path) -> None:
    """Raise ValueError where writing `out` could touch `source`: both are one folder, or one lies in the other.

    Of a file, only the folders around it are kept.
    """
    real, target = source.resolve(), out.resolve()
    if not real.exists():
        return
    if real == target or target in real.parents or (real.is_dir() and real in target.parents):
        raise ValueError(
            f"out is {target} and source is {source}: the one holds the other, and writing would replace the checkpoint that "
            "is read; give a folder elsewhere"
        )


@contextlib.contextmanager
def whole_folder(out: Path, bytes_needed: int) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and vanishes if anything fails.

    A run that was killed leaves `.NAME.partial-PID` beside `out`, which never loads; the next run removes it.

    Raises:
        OSError: less room on the disk than `bytes_needed`, before any work, or a disk that fills up on the way.
    """
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
