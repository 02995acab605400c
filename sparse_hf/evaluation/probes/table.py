"""The probes by name, in the order of a report."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Probe, Setup
from .cost import Cost
from .coverage import Coverage
from .divergence import Divergence
from .embedding import Embedding
from .harness import Harness
from .longppl import LongPPL
from .masked import Masked
from .perplexity import Perplexity
from .recall import Recall

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (Divergence(), Perplexity(), LongPPL(), Masked(), Embedding(), Coverage(), Recall(), Harness(), Cost())
}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is no probe's."""
    unknown = next((name for name in names if name not in PROBES), None)
    if unknown is not None:
        raise ValueError(f"there is no probe {unknown!r}; there are {', '.join(PROBES)}")


def choose(names: list[str] | None, setup: Setup) -> tuple[list[Probe], dict[str, str]]:
    """The probes that are run, and why others are not; without names all that the model can be asked,
    and the harness if there are tasks for it.

    Raises:
        ValueError: one that the model or the texts cannot be asked.
    """
    chosen, left_out = [], {}
    # nobody misses a harness who named no task for it
    of_all = [name for name in PROBES if name != Harness.name or setup.settings.harness]
    for name in names or of_all:
        reason = PROBES[name].why_not(setup)
        if reason is None:
            chosen.append(PROBES[name])
        elif names:
            raise ValueError(f"probe {name}: {reason}")
        else:
            left_out[name] = reason
    return chosen, left_out
