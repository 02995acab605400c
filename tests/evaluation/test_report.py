"""The report: one page that stands alone, well formed, with a picture for each figure; the command that writes it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import sparse_hf
from sparse_hf.evaluation import Settings, evaluate
from sparse_hf.evaluation.layers import dense_layers, layer_ranges
from sparse_hf.evaluation.report.figures import Figure, Letters, figures
from sparse_hf.evaluation.report.svg import Axis, Grid, Series, heat_map, lines, points, shade
from sparse_hf.evaluation.report.table import rows
from sparse_hf.units import size
from tests.evaluation.tiny import QUICK, TEXT, tiny_model, tokenizer
from tests.test_cli import run

PATTERNS = {"narrow <b>": "window(3, 0)", "wide": "window(20, 0) | first(2)"}
VOID = {"meta", "br", "link", "img", "hr", "input"}


@pytest.fixture(scope="module")
def found():
    settings = Settings(length=96, lengths=(260, 300), depths=(0.0, 1.0), tasks=("passkey", "words"), progress=False)
    return evaluate(tiny_model(), PATTERNS, TEXT, tokenizer=tokenizer(), settings=settings)


class Page(HTMLParser):
    """Tags that are open, and what pages must not have."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(found):
    page = Page()
    page.feed(found.html())
    assert not page.open and not page.addresses and not page.seen & {"script", "link", "img", "iframe", "b>"}
    assert "http" not in found.html() and "@import" not in found.html()
    assert "narrow &lt;b&gt;" in found.html() and "narrow <b>" not in found.html()


def test_pictures_are_well_formed_and_named(found):
    pictures = re.findall(r"<svg.*?</svg>", found.html(), re.S)
    assert len(pictures) > 15
    for picture in pictures:
        tree = ElementTree.fromstring(picture)
        assert tree.get("aria-label") or tree.get("aria-hidden")
        box = [float(x) for x in tree.get("viewBox").split()]
        for text in tree.iter("text"):
            if text.get("x"):
                assert 0 <= float(text.get("x")) <= box[2] + 12 and 0 <= float(text.get("y")) <= box[3] + 3


def test_every_candidate_has_its_letter_in_the_table_and_the_pictures(found):
    for letter in "ABC":
        assert found.html().count(f"<b>{letter}</b>") >= 3
    headings, written = rows(found.result)
    assert [row[0] for row in written] == ["dense", *PATTERNS]
    assert headings[:4] == ["", "perplexity", "KL", "same"] and "cache" in headings


def test_what_is_printed(found):
    text = str(found)
    assert "perplex" in text and "wide: " in text and "not asked: masked" in text
    assert max(map(len, text.splitlines())) <= 100 and "MiB" in text or "KiB" in text


def test_a_result_that_is_saved_is_read_back(found, tmp_path):
    assert found.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "report.html"
    read = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert type(found)(read).html() == found.html()


def test_encoders_have_reports(tmp_path):
    for head in ("BertModel", "BertForMaskedLM"):
        found = evaluate(
            tiny_model(head),
            "window(3, 3)",
            [TEXT, TEXT[200:], TEXT[400:]],
            tokenizer=tokenizer(),
            settings=QUICK,
            out=tmp_path,
        )
        assert {"embedding", "coverage", "cost"} <= set(found.result["probes"])
        page = Page()
        page.feed(found.html())
        assert "dense, in chunks" in found.html() and not page.open


def test_one_value_alone_can_be_drawn():
    one = [Series("A", "one", 0, [(1, 1.0)])]
    for draw in (lines, points):
        ElementTree.fromstring(draw(one, Axis("x", log=True), Axis("y"), "about"))
    ElementTree.fromstring(heat_map(Grid(["r"], ["c", "d"], [[0.5, None]]), "about"))


def width_of(columns: int) -> float:
    names = [str(i) for i in range(columns)]
    drawn = heat_map(Grid(["niah_multiquery"], names, [[1.0] * columns], cell=(40, 22)), "about")
    return float(ElementTree.fromstring(drawn).get("viewBox").split()[2])


def kl_picture(*by_position: list[float]) -> Figure:
    """The picture of divergences by position, of candidates that have these."""
    found = {
        "edges": [0, 8, 16],
        "candidates": {f"p{i}": {"kl_by_position": kl, "hidden_error": [0.0, 0.1]} for i, kl in enumerate(by_position)},
    }
    letters = Letters(["dense", *found["candidates"]])
    return next(figures({"probes": {"divergence": found}}, letters))


def test_one_that_goes_astray_does_not_hide_the_others():
    near, other = [0.0, 0.02], [0.03, 0.04]
    assert "nothing is drawn" not in kl_picture(near, other).text
    far = kl_picture(near, other, [0.9, 1.0])
    assert "Below 0.0001 nothing is drawn." in far.text
    # where the axis grows by factors, the others are as far apart from each other as that
    (*_, first), (*_, second), _ = (
        [float(place.split(",")[1]) for place in points.split()]
        for points in re.findall(r'points="([^"]*)"', far.picture)
    )
    assert first - second > 20


def test_maps_of_many_columns_fit_beside_each_other():
    # narrow ones keep their cells, and very many are scrolled
    assert width_of(2) < 250 and width_of(12) <= 560 < width_of(60)


def test_shades_grow_darker():
    brightness = [sum(int(shade(i / 20)[j : j + 2], 16) for j in (1, 3, 5)) for i in range(21)]
    assert brightness == sorted(brightness, reverse=True)


def test_words_for_numbers():
    assert layer_ranges(["a", "b", "a", "a", "a"]) == [("0, 2-4", "a"), ("1", "b")]
    assert dense_layers([5, 2, 0, 1, 5]) == "0-2=dense, 5=dense"
    assert [size(x) for x in (1, 2048, 3 << 20, 5 << 30)] == ["1 B", "2.00 KiB", "3.00 MiB", "5.00 GiB"]


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def command(folder, *arguments: str):
    return run(
        "evaluate", str(folder / "model"), "--text", str(folder / "text.txt"), "--length", "96", "--out", str(folder / "out"),
        *arguments,
    )  # fmt: skip


def test_the_command_prints_and_writes(folder):
    done = command(
        folder, "--pattern", "window(3, 0)", "--pattern", "half: window(3, 0); 0=dense", "--probes", "divergence"
    )
    assert done.returncode == 0, done.stderr
    assert "half: " in done.stdout and "the report is" in done.stderr
    assert (folder / "out" / "report.html").exists() and len(list((folder / "out" / "pieces").iterdir())) == 2


def test_layers_are_those_of_every_pattern_that_names_none(folder):
    done = command(
        folder, "--pattern", "window(3, 0)", "--pattern", "own: window(3, 0); 1=dense", "--layers", "0=dense", "--probes",
        "divergence", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [one["layers"] for one in json.loads(done.stdout)["candidates"]] == [
        ["dense", "dense"], ["dense", "window(3, 0)"], ["window(3, 0)", "dense"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pattern", "window(3, 0)", "--depths", "deep"), "--depths has 'deep'"),
        (("--pattern", "window(3, 0)", "--probes", "masked"), "probe masked: "),
        ((), "patterns is empty and the model is dense"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, message):
    done = command(folder, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_says_how_to_go_on(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sparse_hf.evaluation, "evaluate", interrupted)
    done = command(folder, "--pattern", "window(3, 0)")
    assert done.returncode == 130 and "the same command goes on" in done.stderr


def test_a_card_takes_its_figures():
    settings = Settings(length=96, progress=False)
    options = {"tokenizer": tokenizer(), "settings": settings, "probes": ["perplexity", "divergence"]}
    found = evaluate(tiny_model(), {"near": "window(9, 0)"}, TEXT, **options)
    figures, probes = found.card_results("near"), found.result["probes"]
    assert figures["perplexity"] == {
        "sparse": probes["perplexity"]["candidates"]["near"]["perplexity"],
        "dense": probes["perplexity"]["candidates"]["dense"]["perplexity"],
    }
    assert figures["same"] == {"sparse": probes["divergence"]["candidates"]["near"]["same"]}
    assert figures["dataset"] == "text 1" and "96 tokens" in figures["note"] and "Verdict: " in figures["note"]
    with pytest.raises(ValueError, match="no candidate is named 'far'; there are near"):
        found.card_results("far")
