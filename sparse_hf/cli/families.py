"""`sparse-hf list`."""

from __future__ import annotations

import difflib
import json
import os
from typing import Annotated, Any

import typer
from rich.console import Console

from .paragraphs import print_hanging, print_lines


def list_families(
    family: Annotated[
        str | None, typer.Argument(help="Tell all about one family: a dense or sparse model type, like llama.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the names of the classes.")] = False,
) -> None:
    """List the families of models that have sparse counterparts.

    Verified ones have tests of their own. Derived ones are made when they are first met, and compared
    with their dense class before they are used; named are those that worked when all were tried.
    """
    from .. import FAMILIES, derived_types

    # an entry of the table is verified, and what was made of one says so
    verified = [name for name, known in sorted(FAMILIES.data.items()) if getattr(known, "verified", True)]
    derived = [name for name in derived_types() if name not in verified]
    if family is not None:
        _tell(_find(family, verified, derived), as_json)
    elif as_json:
        typer.echo(json.dumps([*map(_row, verified), *map(_derived_row, derived)], indent=2))
    else:
        _list([_row(name) for name in verified], derived)


def _row(name: str) -> dict[str, Any]:
    from .. import FAMILIES
    from ..models.hf.auto_classes import head_names
    from ..models.hf.dense_family import DenseFamily

    known = FAMILIES.data[name]
    if isinstance(known, DenseFamily):
        # Transformers' tables of names say it, and importing all modelling files takes seconds
        model_type, heads, positions = known.sparse_type, head_names(name, known.prefix), known.positions
    else:
        family = FAMILIES[name]
        model_type, heads, positions = family.sparse_type, [c.__name__ for c in family.classes], family.positions
    return {
        "family": name,
        "kind": "verified",
        "model_type": model_type,
        "heads": heads,
        "positions": positions.scheme,
        "conversion": positions.conversion,
    }


def _derived_row(name: str) -> dict[str, Any]:
    return {"family": name, "kind": "derived"}


def _find(asked: str, verified: list[str], derived: list[str]) -> dict[str, Any]:
    name = asked.removeprefix("sparse_")
    if name in verified:
        return _row(name)
    if name in derived:
        return {**_derived_row(name), "model_type": f"sparse_{name}"}
    close = difflib.get_close_matches(name, [*verified, *derived], 3)
    hint = (
        f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `sparse-hf list` names all that are known"
    )
    raise ValueError(f"{asked!r} is no family with a sparse counterpart{hint}")


def _tell(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    lines = [f"{row['family']} -> {row['model_type']} ({row['kind']})"]
    if row["kind"] == "verified":
        lines += ["classes:", *(f"  {name}" for name in row["heads"])]
        lines += [f"positions: {row['positions']}", f"to a greater length: {row['conversion']}"]
    else:
        lines.append("made when it is first met, and compared with its dense class on a tiny copy before it is used")
    lines.append(f"convert: sparse-hf convert FOLDER OUT --pattern PATTERN, of any checkpoint of type {row['family']}")
    print_lines(lines)


def _list(rows: list[dict[str, Any]], derived: list[str]) -> None:
    console = Console(highlight=False)
    name = max(len(row["family"]) for row in rows)
    console.print(f"verified ({len(rows)}), their positions and their heads:", style="bold")
    for row in rows:
        told = f"{row['family'].ljust(name)}  {row['positions'].ljust(10)}  {_short(row['heads'])}"
        print_hanging(console, told, name + 14)
    console.print(f"derived when they are first met ({len(derived)} that were tried):", style="bold")
    print_hanging(console, "  " + ", ".join(derived), 2)
    console.print("`sparse-hf list FAMILY` tells all about one.", markup=False)


def _short(heads: list[str]) -> str:
    """Names of heads without what they share: "Model, MaskedLM"."""
    common = len(os.path.commonprefix(heads))
    return ", ".join(name[common:].replace("For", "") for name in heads)
