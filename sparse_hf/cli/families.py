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

    verified = {name: _row(name, one) for name, one in sorted(FAMILIES.items()) if one.verified}
    derived = [name for name in derived_types() if name not in verified]
    if family is not None:
        _tell(_find(family, verified, derived), as_json)
    elif as_json:
        typer.echo(json.dumps([*verified.values(), *map(_derived_row, derived)], indent=2))
    else:
        _list(list(verified.values()), derived)


def _row(name: str, family: Any) -> dict[str, Any]:
    return {
        "family": name,
        "kind": "verified",
        "model_type": family.sparse_type,
        "heads": [c.__name__ for c in family.classes],
        "positions": family.positions.scheme,
        "conversion": family.positions.conversion,
    }


def _derived_row(name: str) -> dict[str, Any]:
    return {"family": name, "kind": "derived"}


def _find(asked: str, verified: dict[str, dict[str, Any]], derived: list[str]) -> dict[str, Any]:
    name = asked.removeprefix("sparse_")
    if name in verified:
        return verified[name]
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
