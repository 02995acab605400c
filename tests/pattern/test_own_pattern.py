"""A user's own pattern runs wherever those of the package do."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

import sparse_hf
from sparse_hf import Pattern, PatternError, PerHead, Window, build_plan, sparse_attention
from sparse_hf.attention import BACKENDS
from sparse_hf.pattern import words
from sparse_hf.pattern.base import joint, state
from tests import oracle
from tests.attention.exactness import DEVICE, batch_of, call_of, compare, tensors, why_not
from tests.models.families import LENGTH, additive, dense_model, explicit_mask, inputs
from tests.pattern.drawn import BOXES, K, N, Q, states_and_truth
from tests.pattern.own import (
    EveryNth,
    LastKeys,
    Mirrored,
    OddFirst,
    OddMarked,
    OddRandomBlocks,
    OddStride,
    OddWindow,
    Unmarked,
)
from tests.table import SCENARIOS

OWN = [
    EveryNth(5, 2),
    EveryNth(1),
    EveryNth(7) | Window(9, 9),
    Unmarked() & Window(20, 20),
    LastKeys(3) | Window(5, 5),
    Mirrored(Window(9, 0) | sparse_hf.First(2), 30),
    OddWindow(20, 3),
    OddFirst(3) | Window(9, 0),
    OddMarked() | Window(9, 9),
    OddStride(3) & Window(30, 30),
    OddRandomBlocks(2, 16, 1),
    EveryNth(6, 1) & sparse_hf.RandomBlocks(2, 16, 1),
]
HEADS = PerHead(EveryNth(5), OddWindow(9, 9), Window(9, 9), Mirrored(OddWindow(9, 9), 4))
MINE = EveryNth(5, 2) | Window(9, 9)


@pytest.mark.parametrize("pattern", [*OWN, HEADS], ids=str)
def test_text_form_round_trips(pattern):
    assert Pattern.parse(str(pattern)) == pattern and hash(Pattern.parse(str(pattern))) == hash(pattern)
    assert repr(pattern) == str(pattern)


def test_the_word_is_the_name_of_the_class():
    assert str(EveryNth(5, 2)) == "every_nth(5, 2)" and Pattern.parse("every_nth(n=5)") == EveryNth(5)
    assert str(OddWindow(3, 0)) == "odd_window(3, 0)" and OddWindow(3, 0) != Window(3, 0)
    assert Pattern.parse("mirrored(far=4, pattern=every_nth(3) | first(1))").far == 4
    with pytest.raises(PatternError, match=r"the form is every_nth\(n, offset=0\)"):
        Pattern.parse("every_nth()")
    with pytest.raises(PatternError, match="'4' is not a pattern"):
        Pattern.parse("mirrored(4, 4)")


@pytest.mark.parametrize("pattern", OWN, ids=str)
def test_they_are_what_they_must_be(pattern):
    states, truth = states_and_truth(pattern, 0)
    wrong = ((states == 0) & (truth != 0)) | ((states == 2) & (truth != 2))
    assert len(states) == BOXES and not wrong.any()
    # no key that is still seen is let go
    later = pattern.allows(Q, K, sparse_hf.pattern.base.Marks(length=N)).flip(0).cummax(0).values.flip(0)
    assert not (later & ~pattern.reachable(K, Q)).any()


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("pattern", [*OWN, HEADS], ids=str)
def test_plans_hold_its_pairs(pattern, case):
    q_len, given, data = batch_of(case, 257)
    expected = oracle.dense_mask(str(pattern), q_len, 257, **data)
    plan = build_plan(pattern, q_len, 257, block_size=32, **given)
    found = plan.to_dense()[:, list(plan.heads) or [0]]
    assert torch.equal(found.expand_as(expected), expected)


# those that run on no CPU
NEED_GPU = ("fa", "flex")


def runs():
    """Every own pattern on every backend; Triton's interpreter takes a second for each."""
    for i, pattern in enumerate([*OWN, HEADS]):
        for backend in ("auto", *BACKENDS):
            for j, case in enumerate(("plain", "last_queries", "packed_and_padded")):
                marks = [pytest.mark.slow] if backend == "triton" and i % 3 != j else []
                marks += [pytest.mark.gpu] if backend in NEED_GPU else []
                yield pytest.param(pattern, backend, case, id=f"{pattern}-{backend}-{case}", marks=marks)


@pytest.mark.cross(("pattern", "backend"), "case")
@pytest.mark.parametrize(("pattern", "backend", "case"), list(runs()))
def test_exact_on_every_backend(pattern, backend, case, request):
    if backend == "triton":
        request.getfixturevalue("interpreted")
    length, shape = (40 if backend == "triton" else 150), (4, 2, 16)
    q_len, given, _ = batch_of(case, length, DEVICE)
    reason = why_not(backend, call_of(*tensors(shape, q_len, length, torch.float32, DEVICE), pattern, **given))
    if reason:
        pytest.skip(reason)
    compare(backend, str(pattern), length, case, shape, torch.float32, DEVICE)


@pytest.mark.parametrize("pattern", [OWN[0], OWN[6], HEADS], ids=str)
def test_compiled_equals_eager(pattern):
    torch._dynamo.reset()
    drawn = tensors((4, 2, 16), 90, 90, torch.float64)

    def attend(q, k, v):
        return sparse_attention(q, k, v, pattern, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(oracle.gradients(compiled, *drawn), oracle.gradients(attend, *drawn), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_in_a_model(head, tmp_path):
    dense, batch = dense_model(head), inputs(head)
    ours = sparse_hf.sparsify(dense_model(head), MINE)
    mask = explicit_mask(str(MINE), LENGTH, batch["attention_mask"], None, is_causal=head[0] == "L")
    real = batch["attention_mask"].bool()
    given = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        wanted = dense(**given, attention_mask=additive(mask)).logits
        found = ours(**given, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sparse_attention"]["patterns"]["sparse"] == str(MINE)
    again = type(ours).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**given, attention_mask=batch["attention_mask"]).logits, found)


def test_generates_the_same_with_a_cache():
    ours = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), MINE)
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), ours.generate(ids, **options, use_cache=False))


def test_on_the_command_line():
    from sparse_hf.cli import app

    shown = CliRunner().invoke(app, ["show", "every_nth(5, 2) | window(3, 0)", "--length", "64"])
    assert shown.exit_code == 0, shown.output
    assert "every_nth(5, 2) | window(3, 0)" in shown.output and "pairs" in shown.output


def test_a_saved_pattern_needs_its_module(monkeypatch):
    monkeypatch.delitem(words._WORDS, "every_nth")
    with pytest.raises(PatternError, match="unknown word 'every_nth'.*once the module that defines it is imported"):
        Pattern.parse("every_nth(5)")


def test_a_native_export_does_not_take_it_for_a_window():
    from sparse_hf.conversion.export import _window

    assert _window(OddWindow(9, 0), Window(None, 0)) is None
    assert _window(Window(9, 3), Window(None, 0)) == Window(9, 0)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_hashes_are_cut_by_what_it_holds(backend):
    # of neither may the future be thought to be left out
    drawn = tensors((4, 2, 16), 60, 60, torch.float64)
    for cut in (Window(5, 0) | sparse_hf.First(3), OddWindow(9, 0) | EveryNth(3)):
        whole, part = (
            sparse_attention(*drawn[:2], torch.eye(60, dtype=torch.float64).expand(2, 2, -1, -1), text, backend=backend)
            > 0
            for text in ("lsh(4, 2, 8)", f"lsh(4, 2, 8) & ({cut})")
        )
        held = cut.allows(torch.arange(60)[:, None], torch.arange(60))
        assert torch.equal(part, whole & held)
        assert part.triu(1).any()


def define(**members):
    """A class as a notebook's cell defines it."""
    members = {
        "__annotations__": {"n": int, "offset": int},
        "offset": 0,
        "allows": EveryNth.allows,
        "blocks": EveryNth.blocks,
        **members,
    }
    return type("Mine", (Pattern,), {"reachable": EveryNth.reachable, **members})


@pytest.fixture
def _forgotten():
    yield
    words._WORDS.pop("mine", None)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: define(blocks=Pattern.blocks), "Mine does not define blocks; a pattern defines allows, blocks, reachable"),
        (lambda: define(reachable=Pattern.reachable), "Mine does not define reachable"),
        (lambda: type("Mine", (Window,), {"allows": EveryNth.allows}),
         r"Mine has pairs of its own, and blocks, reachable, signature, grain of Window.* `blocks = Window\.blocks` where that"),
        (lambda: str(define()()), r"Mine is no value; write @dataclass\(frozen=True\) above the class"),
        (lambda: build_plan(dataclass(define())(3), 9), r"write @dataclass\(frozen=True\)"),
        (lambda: dataclass(define())(3) | Window(1, 0), r"write @dataclass\(frozen=True\)"),
        (lambda: PerHead(dataclass(define())(3)), r"write @dataclass\(frozen=True\)"),
        (lambda: build_plan(dataclass(frozen=True, eq=False)(define())(3), 9), r"write @dataclass\(frozen=True\)"),
        (lambda: str(dataclass(frozen=True)(define(word="mine", __annotations__={"n": int, "word": str}))(3)),
         "Mine: word is a field; write it without a type, `word = 'mine'`"),
        (lambda: define(word="window"), r"the word 'window' belongs to sparse_hf\.pattern\.primitives\.Window; give .*Mine another"),
        (lambda: define(word="bigbird"), r"the word 'bigbird' belongs to sparse_hf\.pattern\.recipes\.bigbird; give .*Mine another"),
        (lambda: define(word="my word"), "word is 'my word'; it must be a name"),
        (lambda: dataclass(frozen=True)(define(uses_length=True))(3).unending(), "does not define unending"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.usefixtures("_forgotten")
def test_a_definition_that_is_run_again_replaces_itself():
    from sparse_hf.pattern.base import as_pattern

    mine = dataclass(frozen=True)(define())
    assert as_pattern("mine(3)") == mine(3)
    drawn = tensors((4, 2, 16), 40, 40, torch.float64)
    before = sparse_attention(*drawn, "mine(3)")

    def odd(self, q, k, marks=None):
        return joint(q, k) & (k % self.n == 1)

    def blocks(self, q0, q1, k0, k1, marks=None):
        return state(~joint(q0, k0), ~joint(q0, k0))

    again = dataclass(frozen=True)(define(allows=odd, blocks=blocks))
    assert as_pattern("mine(3)") == again(3) != mine(3)
    exact = oracle.attention(*drawn, (torch.arange(40) % 3 == 1).expand(1, 1, 40, 40))[0]
    found = sparse_attention(*drawn, "mine(3)")
    torch.testing.assert_close(found, exact)
    assert not torch.allclose(found, before)


def test_bases_have_no_word():
    class Base(Pattern, has_word=False):
        pass

    assert "base" not in words.WORDS

    @words.recipe
    def every_other(offset: int = 0):
        return EveryNth(2, offset)

    try:
        assert Pattern.parse("every_other(1) | first(1)") == EveryNth(2, 1) | sparse_hf.First(1)
    finally:
        words._WORDS.pop("every_other")
