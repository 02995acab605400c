"""`sparse-hf list`."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table


def list_families(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the names of the classes.")] = False,
) -> None:
    """List the families of models that have sparse counterparts.

    Verified ones have tests of their own. Derived ones are made when they are first met, and compared
    with their dense class before they are used; named are those that worked when all were tried.
    """
    from .. import FAMILIES, derived_types

    rows = [
        {
            "family": name,
            "kind": "verified",
            "model_type": family.sparse_type,
            "heads": [c.__name__ for c in family.classes],
            "positions": family.positions.scheme,
            "conversion": family.positions.conversion,
        }
        for name, family in sorted(FAMILIES.items())
        if family.verified
    ]
    derived = [name for name in derived_types() if name not in {row["family"] for row in rows}]
    if as_json:
        typer.echo(json.dumps([*rows, *({"family": name, "kind": "derived"} for name in derived)], indent=2))
        return
    table = Table(box=box.SIMPLE, pad_edge=False, title="verified", title_justify="left")
    for column in ("family", "sparse", "heads", "positions", "conversion to a greater length"):
        table.add_column(column, min_width=34 if column == "heads" else None)
    for row in rows:
        table.add_row(row["family"], row["model_type"], _short(row["heads"]), row["positions"], row["conversion"])
    # wide enough that no name is cut, in a narrow window or a pipe too
    console = Console(width=max(Console().width, 132))
    console.print(table)
    console.print(f"derived when they are first met ({len(derived)} that were tried):", ", ".join(derived))


def _short(heads: list[str]) -> str:
    """Names of heads without what they share: "Model, MaskedLM"."""
    common = len(os.path.commonprefix(heads))
    return ", ".join(name[common:].replace("For", "") for name in heads)
