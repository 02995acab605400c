"""The examples of pixels and of bytes: what they learn from, what they ask about, and how answers are counted."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from examples import model_pixels, read_bytes
from sparse_hf.analysis import describe


def test_held_out_squares_are_of_the_right_alone():
    image = torch.arange(8 * 16).reshape(8, 16) % 16
    left, right = model_pixels.squares([image, image], 4)
    # columns 12 to 15, in two squares of each picture
    assert left[0].shape == (8, 12) and right.shape == (4, 4, 4)
    assert int(right.min()) == 12 and int(left[0].max()) == 11
    draw = torch.Generator().manual_seed(0)
    found = model_pixels.drawn(left, 4, 50, draw)
    assert found.shape == (50, 4, 4) and int(found.max()) < 12


@torch.no_grad()
def test_bits_are_of_each_pixel_behind_those_before_it():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=32, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval().to(model_pixels.DEVICE)
    pixels = torch.randint(256, (2, 4, 4))
    found = model_pixels.bits(model, pixels).cpu()
    # a GPU computes them in bfloat16
    close = 1e-4 if model_pixels.DEVICE.type == "cpu" else 2e-2
    text = torch.cat([torch.full((2, 1), 256), pixels.flatten(1)], 1).to(model_pixels.DEVICE)
    for row in range(2):
        for place in (0, 7, 15):
            chance = model(text[row : row + 1, : place + 1]).logits[0, -1].softmax(-1)[text[row, place + 1]]
            assert float(found[row, place]) == pytest.approx(-math.log2(float(chance)), rel=close)


def test_ways_have_the_pairs_that_their_names_say():
    side = 32
    pairs = {
        name: describe(pattern, length=side**2).density for name, pattern in model_pixels.ways(side).items() if pattern
    }
    assert pairs["window of as many pairs"] == pytest.approx(pairs["sparse_transformer"], rel=0.1)
    assert pairs["window of a row"] < 0.75 * pairs["sparse_transformer"]


def test_pixels_run_in_small(tmp_path):
    out, picture = tmp_path / "pixels.json", tmp_path / "pixels.png"
    found = model_pixels.main(["--tiny", "--out", str(out), "--plot", str(picture)])
    assert json.loads(out.read_text()) == found and picture.stat().st_size > 5_000
    # three steps from nothing: the first is as long as the alphabet
    for way in found["ways"].values():
        assert way["learning"][0] == pytest.approx(math.log2(257), abs=0.5) and len(way["by_row"]) == 8
    assert 1 < found["png"] < 9


def test_pages_are_of_their_own_authors():
    shelf = [torch.zeros(40, dtype=torch.long), torch.ones(50, dtype=torch.long)]
    pages, whose = read_bytes.drawn(shelf, 8, 20, torch.Generator().manual_seed(0))
    assert pages.shape == (20, 8) and torch.equal(pages[:, 0], whose) and 0 < int(whose.sum()) < 20
    pages, whose = read_bytes.asked_about([torch.arange(40), torch.arange(50)], 8, 3)
    assert pages[:, 0].tolist() == [0, 16, 32, 0, 21, 42] and whose.tolist() == [0, 0, 0, 1, 1, 1]


def test_bytes_that_differ_are_told_apart_by_frequency():
    shelf = [torch.full((40,), 70), torch.full((50,), 80)]
    args = argparse.Namespace(steps=2, batch=8)
    assert read_bytes.by_frequency(shelf, 8, read_bytes.asked_about(shelf, 8, 3), args) == 1


def test_a_reader_learns_who_wrote_a_page():
    args = argparse.Namespace(steps=40, batch=8, latents=8, rate=3e-3)
    learned, held_out = read_bytes.shelves(is_tiny=True)
    model = read_bytes.reader(128, 2, args)
    read_bytes.train(model, learned, 128, args)
    assert read_bytes.right(model, *read_bytes.asked_about(held_out, 128, 6), 4) > 0.9


def test_bytes_run_in_small(tmp_path, capsys):
    out, picture = tmp_path / "bytes.json", tmp_path / "bytes.png"
    found = read_bytes.main(["--tiny", "--out", str(out), "--plot", str(picture)])
    assert json.loads(out.read_text()) == found and picture.stat().st_size > 5_000
    assert list(found["lengths"]) == ["64", "256"]
    with pytest.raises(ValueError, match="the shortest"):
        read_bytes.check_lengths([100], [torch.zeros(40)])
