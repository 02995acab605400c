"""What "auto" takes and says, and how little it plans."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from sparse_hf import build_plan, sparse_attention
from sparse_hf.attention import attention, dispatch, route
from sparse_hf.attention.backend import AttentionCall
from sparse_hf.attention.dropout import NO_DROPOUT, Dropout
from sparse_hf.attention.scoring import Scoring
from sparse_hf.pattern.base import as_pattern
from sparse_hf.plan import block_plan, lookup, of_batch, strided
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.exactness import BATCH, DEVICE, call_of, leaves, tensors

LENGTH = 200


def chosen(q, k, v, pattern, **given) -> str:
    """The name of what "auto" takes."""
    how = {"wants_lse": False, **given}
    return route(call_of(q, k, v, pattern, **how), "auto").name


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        (128, "attention on cpu in torch.float32 runs on backend 'blockwise'"),
        (
            8,
            "attention of fewer than 128 queries on cpu in torch.float32 runs on PyTorch's scaled_dot_product_attention over the "
            "keys that they see",
        ),
    ],
)
def test_auto_says_what_it_chose_once(queries, said, caplog):
    dispatch._say.cache_clear()
    dispatch._say_torch.cache_clear()
    q, k, v = (t.detach() for t in leaves(*[(1, 1, queries, 8)] * 3))
    with caplog.at_level(logging.INFO, logger="sparse_hf"):
        for _ in range(3):
            sparse_attention(q, k, v, "window(1, 0)")
    assert [r.message for r in caplog.records] == [said]


# pattern, queries, what else is given, and what is taken on a CPU
TAKEN = {
    "nothing is left out": ("window(None, 0)", LENGTH, {}, "sdpa"),
    "a window as long as the text": ("window(199, 0)", LENGTH, {}, "sdpa"),
    "one pair is left out": ("window(198, 0)", LENGTH, {}, "blockwise"),
    "global tokens": ("window(None, 0) | first(1)", LENGTH, {}, "blockwise"),
    "heads of their own": ("per_head(window(None, 0), full(), full(), full())", LENGTH, {}, "blockwise"),
    "heads alike": ("per_head(full(), full(), full(), full())", LENGTH, {}, "sdpa"),
    "padding": ("full()", LENGTH, {"key_padding_mask": torch.arange(LENGTH).expand(2, -1) < 150}, "blockwise"),
    "documents": ("full()", LENGTH, {"segment_ids": torch.arange(LENGTH).expand(2, -1) // 100}, "blockwise"),
    "a mask of ones": ("full()", LENGTH, {"key_padding_mask": torch.ones(2, LENGTH, dtype=torch.bool)}, "sdpa"),
    "the last queries": ("window(None, 0)", 150, {}, "blockwise"),
    "a few queries": ("window(20, 0)", 17, {}, "decode"),
    "a few that see several ranges": ("window(20, 0) | first(2)", 17, {}, "blockwise"),
    "one that sees several ranges": ("window(20, 0) | first(2)", 1, {}, "decode"),
    "a few with padding": ("window(20, 0)", 17, {"key_padding_mask": torch.arange(LENGTH).expand(2, -1) > 9}, "decode"),
    "a few that see all keys between them": ("stride(7) & window(None, 0)", 17, {}, "decode"),
    "one that sees keys here and there": ("stride(7) & window(None, 0)", 1, {}, "blockwise"),
    "strides": ("stride(16)", 608, {}, "strided"),
    "hashes": ("window(5, 0) | lsh(4, 2, 8)", LENGTH, {}, "lsh"),
    "hashes of a few": ("window(5, 0) | lsh(4, 2, 8)", 1, {}, "lsh"),
    "choices": ("window(5, 0) | topk(8)", LENGTH, {}, "topk"),
    "choices of one": ("window(5, 0) | topk_blocks(2, 8)", 1, {}, "topk"),
    "lse": ("full()", LENGTH, {"wants_lse": True}, "blockwise"),
    "lse of a few": ("window(20, 0)", 5, {"wants_lse": True}, "blockwise"),
    "a soft cap": ("full()", LENGTH, {"scoring": Scoring(1.0, 2.0)}, "blockwise"),
    "a soft cap of a few": ("window(20, 0)", 5, {"scoring": Scoring(1.0, 2.0)}, "blockwise"),
    "dropout": ("full()", LENGTH, {"dropout": Dropout.draw(0.1)}, "blockwise"),
    "dropout of a few": ("window(20, 0)", 5, {"dropout": Dropout.draw(0.1)}, "blockwise"),
    "dropout with strides": ("stride(16)", 608, {"dropout": Dropout.draw(0.1)}, "blockwise"),
    "a bias with strides": ("stride(16)", 608, {"scoring": Scoring(1.0, bias=torch.zeros(4, 1215))}, "blockwise"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name):
    pattern, queries, given, wanted = TAKEN[name]
    q, k, v = tensors((4, 2, 32), queries, max(queries, LENGTH), torch.float32)
    assert chosen(q, k, v, pattern, **given) == wanted
    # who is asked for by name is taken
    if wanted not in ("lsh", "topk", "strided"):
        assert route(call_of(q, k, v, pattern, **given), "blockwise").name == "blockwise"


def test_a_plan_and_a_mask_of_ones_are_taken_too():
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    right = sparse_attention(q, k, v, "window(None, 0)", backend="blockwise")
    ones = torch.ones(2, LENGTH, dtype=torch.bool)
    for pattern, given in ((build_plan("window(None, 0)", LENGTH), {}), ("causal()", {"key_padding_mask": ones})):
        torch.testing.assert_close(sparse_attention(q, k, v, pattern, **given), right, atol=1e-5, rtol=1e-5)
        assert chosen(q, k, v, pattern, **given) == "sdpa"


@pytest.mark.parametrize(
    ("pattern", "given"),
    [
        ("window(198, 0)", {}),
        ("window(None, 0) | first(1)", {}),
        ("per_head(window(None, 0), full(), full(), full())", {}),
        ("full()", {"key_padding_mask": torch.arange(LENGTH).expand(2, -1) < 150}),
        ("full()", {"segment_ids": torch.arange(LENGTH).expand(2, -1) // 100}),
    ],
)
def test_what_is_left_out_stays_out(pattern, given):
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    got = sparse_attention(q, k, v, pattern, **given)
    assert chosen(q, k, v, pattern, **given) == "blockwise"
    torch.testing.assert_close(got, sparse_attention(q, k, v, pattern, **given, backend="blockwise"))


def test_the_last_queries_of_a_text_see_their_own_past():
    q, k, v = tensors((4, 2, 32), 150, LENGTH, torch.float64)
    got = sparse_attention(q, k, v, "window(None, 0)")
    right, _ = oracle.attention(q, k, v, oracle.dense_mask("window(None, 0)", 150, LENGTH))
    torch.testing.assert_close(got, right, atol=1e-12, rtol=1e-12)
    assert chosen(q, k, v, "window(None, 0)") == "blockwise"


@pytest.mark.parametrize("queries", [5, LENGTH])
@pytest.mark.parametrize(
    "how",
    [{"backend": "blockwise"}, {"return_lse": True}, {"dropout": 0.5}, {"softcap": 2.0}],
    ids=lambda how: next(iter(how)),
)
def test_what_is_asked_besides_is_left_to_others(how, queries, monkeypatch):
    q, k, v = tensors((4, 2, 32), queries, LENGTH, torch.float32)
    for backend in (dispatch.DENSE, dispatch.DECODE):
        monkeypatch.setattr(type(backend), "forward", lambda self, call: pytest.fail(f"{self.name} ran"))
    sparse_attention(q, k, v, "full()", **how)
    sparse_attention(q, k, v, "window(20, 0)", **how)


def test_training_in_16_bits_is_left_to_blockwise():
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.bfloat16)
    assert chosen(q, k, v, "full()") == "sdpa"
    assert chosen(q.requires_grad_(), k, v, "full()") == "blockwise"


def test_where_nobody_sees_anything_others_give_gradients_of_zero():
    q, k, v = (t.requires_grad_() for t in tensors((4, 2, 32), 5, 5, torch.float64))
    nothing = torch.zeros(BATCH, 5, dtype=torch.bool)
    out = sparse_attention(q, k, v, "window(2, 2)", key_padding_mask=nothing)
    assert chosen(q, k, v, "window(2, 2)", key_padding_mask=nothing) == "blockwise" and not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_global_queries_of_a_long_text_are_left_to_others():
    q, k, v = tensors((4, 2, 32), 100, 60_000, torch.float32)
    # the last of them sees all keys, as the others do
    pattern = "window(None, 59990)"
    with AllocationInterceptor(60_000) as found:
        out = sparse_attention(q, k, v, pattern)
    assert chosen(q, k, v, pattern) == "blockwise" and not found.quadratic
    assert "too much for a mask" in dispatch.DECODE.why_not(call_of(q, k, v, pattern, wants_lse=False))
    assert chosen(q, k, v, "window(None, None)") == "sdpa"
    torch.testing.assert_close(out, sparse_attention(q, k, v, "window(None, None)", backend="blockwise"))


def test_decisions_are_those_of_their_call():
    """One after the other, each differing from the last in one thing that a decision depends on."""
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    names = [chosen(q, k, v, "full()"), chosen(q, k, v, "full()", wants_lse=True), chosen(q, k, v, "full()")]
    assert names == ["sdpa", "blockwise", "sdpa"]
    half = [t.bfloat16() for t in (q, k, v)]
    assert [chosen(*half, "full()"), chosen(half[0].requires_grad_(), *half[1:], "full()")] == ["sdpa", "blockwise"]
    with torch.no_grad():
        assert chosen(*half, "full()") == "sdpa"
    assert chosen(q, k, v, "window(None, 0)") == "sdpa"
    assert chosen(q[:, :, -5:], k, v, "window(None, 0)") == "decode"
    # an other head dim of v has kernels with scores of all pairs
    assert chosen(q, k, torch.randn(2, 2, LENGTH, 40), "full()") == "blockwise"


# layers that share a batch, and what they are asked for one after the other
LAYERS = 4


@dataclass
class Planned:
    """How many plans were made, and of how many the tables."""

    counts: Counter

    def since(self) -> tuple[int, int]:
        found = self.counts["plans"], self.counts["tables"]
        self.counts.clear()
        return found


@pytest.fixture
def planned(monkeypatch):
    counts = Counter()

    def counted(name: str, function):
        def call(*given, **named):
            counts[name] += 1
            return function(*given, **named)

        return call

    for module in (lookup, strided):
        monkeypatch.setattr(module, "build_plan", counted("plans", module.build_plan))
    monkeypatch.setattr(block_plan, "list_tables", counted("tables", block_plan.list_tables))
    return Planned(counts)


def decode_token(patterns: list[str], position: int, device: str, **batch) -> None:
    """A token by `LAYERS` layers, as models ask for it, against attention in float64."""
    keys = position + 1
    q, k, v = tensors((4, 2, 16), 1, keys, torch.float32, device)
    data = {name: t[:, :keys] for name, t in batch.items()}
    named = [data.get(name) for name in ("key_padding_mask", "segment_ids", "marks")]
    info = of_batch(*(None if t is None else t.to(device) for t in named))
    for layer in range(LAYERS):
        text = patterns[layer % len(patterns)]
        call = AttentionCall(q, k, v, as_pattern(text), position, Scoring(0.25), NO_DROPOUT, info, wants_lse=False)
        out, _ = attention(call, "auto")
        real, documents, marks = named
        mask = oracle.dense_mask(text, 1, keys, real, documents, marks)
        right, _ = oracle.attention(*(t.cpu().double() for t in (q, k, v)), mask)
        torch.testing.assert_close(out.cpu().double(), right, atol=1e-5, rtol=1e-5)


PADDING = torch.arange(1000).expand(2, -1) >= torch.tensor([[13], [0]])
ONES = torch.ones(2, 1000, dtype=torch.bool)
MARKS = torch.arange(1000).expand(2, -1) % 90 == 7
DECODED = {
    # patterns of layers in turn, what a batch says, and the most plans that a token takes
    "sinks": (["streaming(window=32, sinks=4)"], {}, 0),
    "a window": (["window(40, 0)"], {}, 0),
    "dense and a window": (["window(None, 0)", "window(40, 0)"], {}, 0),
    "sinks, all tokens real": (["streaming(window=32, sinks=4)"], {"key_padding_mask": ONES}, 0),
    "sinks, padded": (["streaming(window=32, sinks=4)"], {"key_padding_mask": PADDING}, 1),
    "dense, padded": (["window(None, 0)"], {"key_padding_mask": PADDING}, 1),
    "marks": (["window(40, 0) | marked() & window(None, 0)"], {"marks": MARKS}, 1),
    "chunks": (["chunk(50) & window(None, 0)"], {}, 1),
    "strides": (["(stride(7) | window(5, 0)) & window(None, 0)"], {}, 1),
    "strides, padded": (["(stride(7) | window(5, 0)) & window(None, 0)"], {"key_padding_mask": PADDING}, 1),
    "bigbird": (["bigbird(block_size=16) & window(None, 0)"], {}, 1),
    "two patterns": (["streaming(window=32, sinks=4)", "chunk(50) & window(None, 0)"], {}, 1),
    "two patterns, padded": (["window(None, 0)", "window(9, 0)"], {"key_padding_mask": PADDING}, 2),
}


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_decoded_token_makes_one_plan_at_most(name, device, planned):
    patterns, batch, most = DECODED[name]
    for position in (300, 301, 302, 640):
        decode_token(patterns, position, device, **batch)
        plans, tables = planned.since()
        # `blockwise` takes marked tokens apart, and what is left of the plan has tables too
        assert plans <= most and tables <= most + (name == "marks"), f"{plans} plans and {tables} tables at {position}"


def test_a_whole_text_makes_one_plan(planned):
    q, k, v = tensors((4, 2, 16), LENGTH, LENGTH, torch.float32, DEVICE)
    real = (torch.arange(LENGTH).expand(2, -1) >= torch.tensor([[13], [0]])).to(DEVICE)
    for given in ({}, {"key_padding_mask": real}):
        for pattern in ("window(20, 20) | first(2)", "chunk(50)"):
            info = of_batch(given.get("key_padding_mask"), None, None)
            for _ in range(LAYERS):
                leaf = q.clone().requires_grad_()
                call = AttentionCall(
                    leaf, k, v, as_pattern(pattern), 0, Scoring(0.25), NO_DROPOUT, info, wants_lse=False
                )
                attention(call, "auto")[0].sum().backward()
            assert planned.since() == (1, 1)
            # another pass with another tensor of the same content
            again = of_batch(*(None if t is None else t.clone() for t in info.tensors))
            attention(
                AttentionCall(q, k, v, as_pattern(pattern), 0, Scoring(0.25), NO_DROPOUT, again, wants_lse=False),
                "auto",
            )
            assert planned.since() == (0, 0)


def test_a_batch_is_let_go_with_its_last_user():
    q, k, v = tensors((4, 2, 16), LENGTH, LENGTH, torch.float32)
    gc.disable()
    try:
        for real in (torch.arange(LENGTH).expand(2, -1) >= 9, torch.ones(2, LENGTH, dtype=torch.bool)):
            info = of_batch(real.clone(), None, None)
            for pattern in ("window(20, 20) | first(2)", "full()", "window(5, 0) | lsh(4, 2, 8)"):
                call = AttentionCall(q, k, v, as_pattern(pattern), 0, Scoring(0.25), NO_DROPOUT, info, wants_lse=False)
                attention(call, "auto")
            gone = weakref.ref(info)
            del info, call
            assert gone() is None
    finally:
        gc.enable()


def test_only_the_named_kernels_run_where_they_are_asked_for(monkeypatch):
    """Decisions are made anew where a process asks for other kernels, or for runs that repeat."""
    asked = []
    original = dispatch._decided
    monkeypatch.setattr(dispatch, "_decided", lambda call, name: asked.append(name) or original(call, name))
    q, k, v = tensors((4, 2, 32), LENGTH, LENGTH, torch.float32)
    for _ in range(2):
        chosen(q, k, v, "window(20, 20)")
    assert len(asked) == 1
    torch.use_deterministic_algorithms(True)
    try:
        chosen(q, k, v, "window(20, 20)")
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) == 2
