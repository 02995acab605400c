"""The report as one page of HTML: no script, no file beside it, readable on a phone, on paper and without colours."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from ..layers import layer_ranges
from ..pieces import Found
from .figures import Figure, Letters, figures
from .svg import swatch
from .table import rows

# of columns of the table
MEANINGS = {
    "LongPPL": "perplexity of tokens that need the far past",
    "named": "hidden tokens named",
    "found": "passages whose text comes first",
    "KL": "of the dense answers from the candidate's, in nats",
    "same": "the first answer is that of dense attention",
    "error": "how far the last states are from the dense ones, as a share of their length",
    "kept": "the dense model's attention weights on pairs that the pattern holds",
    "recall": "facts said when asked for",
    "harness": "tasks of lm-evaluation-harness",
    "answer loss": "on the tokens of these facts",
}
STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 1180px; padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #bbb }
h3 { font-size: 1rem; margin: 0 0 .2rem }
p { margin: .3rem 0 .6rem; max-width: 46rem }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; min-width: 4.2rem }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; min-width: 0 }
td.name { text-align: left; max-width: 19rem; white-space: normal; min-width: 9rem }
.verdicts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .8rem }
.verdict { border: 1px solid #bbb; border-left: .5rem solid #777; padding: .6rem .8rem; break-inside: avoid }
.verdict.safe { border-left-style: double }
.verdict ul { margin: .3rem 0; padding-left: 1.1rem }
.verdict li { overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem 1.6rem }
figure { margin: 0; break-inside: avoid }
figure.wide { grid-column: 1 / -1 }
figure svg { height: auto; display: block; max-width: none }
figure svg.wide { width: 100%; min-width: 20rem }
figcaption { font-size: .85rem; color: #333 }
.legend { list-style: none; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: .1rem .8rem; font-size: .9rem; align-items: start }
.legend li { display: flex; gap: .5rem; align-items: baseline; overflow-wrap: anywhere }
.swatch { flex: none; align-self: center }
small, footer { color: #444; font-size: .8rem }
@media print { body { max-width: none; padding: 0; font-size: 10pt } .scroll { overflow: visible }
  .figures { grid-template-columns: 1fr 1fr; gap: .6rem 1rem } .verdicts { grid-template-columns: 1fr 1fr }
  figure svg, figure svg.wide { min-width: 0; max-width: 100% } table { font-size: 7.5pt } th, td { padding: .1rem .3rem; min-width: 0 }
  h2 { break-after: avoid } }
"""


def page(result: Found) -> str:
    """The whole page."""
    model, length = result["model"], result["settings"]["length"]
    headings, written = rows(result)
    letters = Letters([row[0] for row in written])
    title = f"{model['name']}: what patterns cost"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{_about(result)}</p>",
        '<h2 id="table">In one table</h2>',
        f"<p>Figures at {length:,} tokens{_asked_at(result)}. What was measured on this machine and on these texts holds for texts like "
        "these.</p>",
        _table(headings, written, letters),
        f"<p><small>{escape(' '.join(f'{name}: {MEANINGS[name]}.' for name in headings if name in MEANINGS))}</small></p>",
        '<h2 id="verdicts">Verdicts</h2>',
        f'<div class="verdicts">{"".join(map(_verdict, result["verdicts"]))}</div>',
        '<h2 id="pictures">Pictures</h2>',
        _legend(result, letters),
        f'<div class="figures">{"".join(map(_figure, figures(result, letters)))}</div>',
        *_lost(result, letters),
        '<h2 id="patterns">Patterns</h2>',
        _patterns(result, letters),
        f"<footer><p>{_footer(result)}</p></footer>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )


def _asked_at(result: Found) -> str:
    """At which lengths the probes were that have lengths of their own."""
    lengths, probes = [f"{length:,}" for length in result["settings"]["lengths"]], result["probes"]
    recall = f"; recall at {', '.join(lengths)}" if "recall" in probes else ""
    return recall + (f"; costs at {lengths[-1]}" if "cost" in probes else "")


def _about(result: Found) -> str:
    model = result["model"]
    texts = ", ".join(f"{text['name']} ({text['tokens']:,} tokens)" for text in result["texts"][:6])
    more = f" and {len(result['texts']) - 6} more" if len(result["texts"]) > 6 else ""
    trained = f", trained for {model['trained_length']:,} tokens" if model["trained_length"] else ""
    return escape(
        f"{model['class'].removeprefix('Sparse')}, {model['parameters']:,} parameters, {model['layers']} layers of {model['heads']} heads"
        f"{trained}, in {model['dtype']}. Read were {texts}{more}. Every candidate has the same weights and another pattern; “dense” is "
        "the model without one."
    )


def _table(headings: list[str], written: list[list[str]], letters: Letters) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in ["", "", *headings[1:]])
    lines = []
    for name, *values in written:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr><td><b>{letters.letter(name)}</b></td><td class="name">{escape(name)}</td>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _verdict(one: Found) -> str:
    points = [*one["reasons"], *([one["cannot_hear"]] if one["cannot_hear"] else [])]
    remedies = "".join(f"<li>{escape(remedy)}</li>" for remedy in one["remedies"])
    kind = "safe" if one["verdict"].startswith("safe") else "other"
    return (
        f'<section class="verdict {kind}"><h3>{escape(one["candidate"])}: {escape(one["verdict"])}</h3>'
        f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in points)}</ul>"
        + (f"<b>What would bring it back</b><ul>{remedies}</ul>" if remedies else "")
        + "</section>"
    )


def _legend(result: Found, letters: Letters) -> str:
    entries = "".join(
        f"<li>{swatch(number)}<b>{letters.letter(name)}</b><span>{escape(name)}</span></li>"
        for name, number in letters.numbers.items()
    )
    return f'<ul class="legend">{entries}</ul>'


def _figure(figure: Figure) -> str:
    wide = ' class="wide"' if figure.is_wide else ""
    return (
        f'<figure{wide}><h3>{escape(figure.title)}</h3><div class="scroll">{figure.picture}</div>'
        f"<figcaption>{escape(figure.text)}</figcaption></figure>"
    )


def _lost(result: Found, letters: Letters) -> Iterator[str]:
    """On which tokens the lost attention lay."""
    coverage = result["probes"].get("coverage")
    if coverage is None:
        return
    yield '<h2 id="lost">On which tokens the lost attention lay</h2>'
    yield (
        "<p>Of the weight that a pattern cuts off, the share on each kind of token, whatever its position. The first tokens of a text "
        "hold what heads have no use for; a pattern keeps them by first(4).</p>"
    )
    lines = []
    for name, one in coverage["candidates"].items():
        if one["kept"] > 0.9999:
            continue
        tokens = ", ".join(f"<code>{escape(_visible(token))}</code> {share:.1%}" for token, share in one["lost_on"][:8])
        lines.append(
            f'<tr><td><b>{letters.letter(name)}</b></td><td class="name">{escape(name)}</td><td>{1 - one["kept"]:.1%}</td>'
            f'<td>{one["lost_on_first_tokens"]:.1%}</td><td class="name" style="max-width:none">{tokens}</td></tr>'
        )
    yield (
        '<div class="scroll"><table><thead><tr><th></th><th></th><th>lost of all</th><th>of it on the first 4 tokens</th>'
        f'<th style="text-align:left">and on</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _visible(token: str) -> str:
    """A token as it is written, white space too."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "(nothing)"


def _patterns(result: Found, letters: Letters) -> str:
    lines = []
    for one in result["candidates"]:
        ranges = "<br>".join(
            f"{escape(where)}: <code>{escape(text)}</code>" for where, text in layer_ranges(one["layers"])
        )
        lines.append(
            f'<tr><td><b>{letters.letter(one["name"])}</b></td><td class="name">{escape(one["name"])}</td>'
            f'<td class="name" style="max-width:none">{ranges}</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th></th><th></th><th style="text-align:left">layers</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _footer(result: Found) -> str:
    here: dict[str, Any] = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items() if version)
    left_out = "".join(f" Not asked: {name}, since {reason}." for name, reason in result["left_out"].items())
    return escape(
        f"{here['date']}, {here['hardware']}, {here['threads']} threads, Python {here['python']}; {versions}. "
        f"Measured in {result['seconds']['of_all_pieces']:,.0f} s.{left_out}"
    )
