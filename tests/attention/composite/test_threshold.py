"""`threshold(...)` against its definition: which tiles it keeps, attention over them, and the weight that it leaves out."""

from __future__ import annotations

import gc
import logging
import weakref

import numpy as np
import pytest
import torch

import sparse_hf
from sparse_hf import Pattern, Threshold, mass_left_out, sparse_attention
from sparse_hf.analysis import describe
from sparse_hf.attention import left_out
from sparse_hf.attention.composite import chosen_few, chosen_judging, chosen_lists, chosen_threshold
from sparse_hf.attention.composite.content import held_by
from sparse_hf.attention.dispatch import content_plan
from sparse_hf.attention.scoring import Scoring
from sparse_hf.attention.slots import new_tokens
from sparse_hf.plan.tile_lists import tile_lists
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention.exactness import DEVICE, call_of, compare, compare_choice, leaves, tensors
from tests.models.families import dense_model
from tests.plan.test_tile_lists import drawn_out
from tests.table import SCENARIOS

# pattern -> its part of positions, share, keys and queries of a tile, what cuts it
PATTERNS = {
    "threshold(0.95, 16, 16)": ("first(0)", (0.95, 16, 16), "window(None, None)"),
    "(window(5, 0) | first(2) | threshold(0.9, 16, 16)) & window(None, 0)": (
        "(window(5, 0) | first(2)) & window(None, 0)",
        (0.9, 16, 16),
        "window(None, 0)",
    ),
    "window(4, 4) | threshold(0.6, 32, 1)": ("window(4, 4)", (0.6, 32, 1), "window(None, None)"),
    "first(3) | threshold(0.3, 16, 10) & window(40, 0)": ("first(3)", (0.3, 16, 10), "window(40, 0)"),
    "marked() | threshold(0.6, 16, 16)": ("marked()", (0.6, 16, 16), "window(None, None)"),
}
HIGH = "(window(5, 0) | threshold(0.99, 16, 16)) & window(None, 0)"
CAUSAL = "(window(5, 0) | first(2) | threshold(0.9, 16, 16)) & window(None, 0)"
ALONE = "(window(5, 0) | first(2) | threshold(0.3, 16, 1)) & window(None, 0)"


def defined(text, q, k, data):
    """The pairs `[B, H, Q, K]`, tile by tile, and the share `[B, H, Q]` of weights that is left out. No plan, no backend."""
    batch, length, offset = q.shape[0], k.shape[2], k.shape[2] - q.shape[2]
    plain, (share, size, queries), cut = PATTERNS[text]
    held, may = (
        oracle.dense_mask(p, q.shape[2], length, *data.values())[:, 0].expand(batch, -1, -1) for p in (plain, cut)
    )
    real = torch.ones(batch, length, dtype=torch.bool) if data["real"] is None else data["real"]
    documents = torch.zeros(batch, length, dtype=torch.long) if data["documents"] is None else data["documents"]
    place = oracle.positions(real, documents)
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.double() @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~(held | may)[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num()
    relative = weights / weights.amax(-1, keepdim=True)
    judged = (may & ~held)[:, None]
    kept = torch.zeros_like(weights, dtype=torch.bool)
    for b in range(batch):
        of_query, of_key = (torch.where(real[b], documents[b] * length + place[b] // n, -1) for n in (queries, size))
        of_query = of_query[offset:]
        for i in set(of_query.tolist()):
            for j in set(of_key.tolist()):
                tile = (of_query == i)[:, None] & (of_key == j) & judged[b, 0]
                for h in range(q.shape[1]):
                    if tile.any() and relative[b, h][tile].max() >= share:
                        kept[b, h] |= tile
    lost = weights.masked_fill(kept | held[:, None], 0).sum(-1)
    return kept | held[:, None], lost.masked_fill(~(held | may).any(-1)[:, None], torch.nan)


def mask_of(text, q, k, data):
    return defined(text, q, k, data)[0]


@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("text", PATTERNS)
def test_equals_the_definition(text, case):
    for backend in ("reference", "blockwise"):
        compare(backend, text, 100, case, (4, 2, 16), torch.float64, mask_of=mask_of)


NOTHING_SAID = {"real": None, "documents": None, "marks": None}


@pytest.mark.parametrize("text", [text for text in PATTERNS if "marked" not in text])
@pytest.mark.parametrize("queries", [150, 54, 13, 1])
def test_mass_is_that_of_all_weights_that_are_left_out(text, queries):
    q, k, v = tensors((4, 2, 16), queries, 150, torch.float64)
    mask, lost = defined(text, q, k, NOTHING_SAID)
    assert not mask.all() and (lost.max() > 0 or queries < 54)
    for backend in ("reference", "blockwise"):
        with mass_left_out() as left:
            sparse_attention(q, k, v, text, backend=backend)
        torch.testing.assert_close(left.each, [lost])
    assert left.mean == pytest.approx(float(lost.mean())) and left.most == pytest.approx(float(lost.max()))


def test_mass_of_padded_rows_is_that_of_their_queries():
    q, k, v = tensors((4, 2, 16), 60, 60, torch.float64)
    real = torch.arange(60) >= torch.tensor([[0], [23]])
    lost = defined(CAUSAL, q, k, {**NOTHING_SAID, "real": real})[1]
    with mass_left_out() as left:
        sparse_attention(q, k, v, CAUSAL, key_padding_mask=real)
    torch.testing.assert_close(left.each, [lost], equal_nan=True)
    assert lost[1, :, :23].isnan().all() and left.mean == pytest.approx(float(lost.nanmean()))


def test_mass_of_nothing_but_padding_is_none():
    padding = torch.zeros(2, 40, dtype=torch.bool)
    with mass_left_out() as left:
        sparse_attention(*tensors((4, 2, 16), 40, 40, torch.float32), "threshold(0.1)", key_padding_mask=padding)
    with pytest.raises(ValueError, match="no query .* saw a key: all of them are padding"):
        _ = left.most


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("text", [CAUSAL, "window(4, 4) | threshold(0.6, 32, 1)"])
def test_a_few_queries_as_many_do(text, softcap):
    given = tensors((4, 2, 16), 13, 100, torch.float64)
    real = torch.arange(100) >= torch.tensor([[0], [92]])
    seen = []
    for few in (13, 0):
        with pytest.MonkeyPatch.context() as patch, mass_left_out() as left:
            patch.setattr(chosen_few, "MAX_QUERIES", few)
            seen.append(
                oracle.gradients(
                    lambda *t: sparse_attention(*t, text, return_lse=True, softcap=softcap, key_padding_mask=real),
                    *given,
                )
            )
        seen[-1] += tuple(left.each[:1])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_a_token_takes_some_dozens_of_steps():
    counts = []
    for heads in (4, 16):
        given = tensors((heads, heads // 2, 16), 1, 1000, torch.float32)
        with AllocationInterceptor(1000) as seen:
            sparse_attention(*given, CAUSAL)
        counts.append(seen.calls)
    # views are among them
    assert counts[1] <= counts[0] < 150


def test_soft_caps_count():
    q, k, v = tensors((4, 2, 16), 60, 60, torch.float64)
    q = 3 * q
    with mass_left_out() as left:
        found = [sparse_attention(q, k, v, CAUSAL, softcap=0.5, backend=b) for b in ("reference", "blockwise")]
        sparse_attention(q, k, v, CAUSAL)
    torch.testing.assert_close(*found)
    # scores are closer together, so that fewer tiles weigh little
    assert torch.equal(left.each[0], left.each[1]) and left.each[0].mean() < left.each[2].mean()


def test_pieces_change_nothing(monkeypatch):
    given = tensors((4, 2, 16), 100, 100, torch.float64)
    found = []
    for most in (1 << 22, 1 << 10):
        monkeypatch.setattr(chosen_threshold, "MAX_SCORES", most)
        call = call_of(*given, CAUSAL)
        plan = content_plan(call)
        found.append((held_by(plan, call, torch.arange(100)), plan.left_out))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_tables_hold_what_is_kept():
    given = tensors((4, 2, 16), 150, 150, torch.float64)
    call = call_of(*given, CAUSAL)
    plan = content_plan(call).joined
    assert torch.equal(plan.to_dense(), defined(CAUSAL, *given[:2], NOTHING_SAID)[0])
    # tiles that the choice leaves out are in no table
    assert len(plan.columns) < plan.q_blocks * (plan.q_blocks + 1) // 2 * 8 and plan.full.any()


JUDGED = {
    CAUSAL: (120, 120, 1.0, 2.0),
    HIGH: (54, 150, 3.0, None),
    "threshold(0.95, 16, 16)": (70, 70, 0.3, None),
    "(chunk(16) | last(1, 32) | threshold(0.6, 16, 16)) & window(60, 60)": (100, 100, 1.0, None),
    "threshold(1, 32, 32) & window(40, 0)": (70, 70, 1.0, None),
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("text", "sizes"), JUDGED.items())
def test_kernels_judge_as_the_definition_does(text, sizes, monkeypatch):
    queries, keys, factor, softcap = sizes
    q, k, v = (t.to(DEVICE) for t in tensors((2, 1, 16), queries, keys, torch.float32))

    def judged():
        with mass_left_out():
            call = call_of(factor * q, k, v, text, scoring=Scoring(0.25, softcap))
            plan = content_plan(call)
        return plan.joined, plan.left_out

    plan, lost = judged()
    assert isinstance(plan, chosen_threshold.FlaggedTiles)
    monkeypatch.setattr(chosen_judging, "why_not", lambda call: "for this test")
    wanted, wanted_lost = judged()
    assert isinstance(wanted, chosen_threshold.WeightyTiles) and len(wanted.codes)
    assert torch.equal(plan.codes, wanted.codes)
    torch.testing.assert_close(lost, wanted_lost, rtol=1e-4, atol=1e-6)
    # a bit for each tile is all that is held of the product of lengths
    assert plan.bits.shape == (*plan.flags().shape[:3], -(-plan.kv_blocks // 8)) and plan.bits.dtype == torch.uint8
    # those that kernels walk
    tiles, mask = plan.own_lists(plan.block_size), wanted.to_dense().cpu()
    for group, one in enumerate(mask.flatten(0, 1)):
        assert torch.equal(drawn_out(tiles.by_query, tiles.masks, group, one.shape), one)
        assert torch.equal(drawn_out(tiles.by_key, tiles.masks_by_key, group, one.T.shape), one.T)


@pytest.mark.usefixtures("interpreted")
def test_what_is_kept_of_a_choice_goes_with_its_last_user():
    given = [t.to(DEVICE) for t in tensors((2, 1, 16), 64, 64, torch.float32)]
    plan = content_plan(call_of(*given, CAUSAL)).joined
    assert isinstance(plan, chosen_threshold.FlaggedTiles)
    tile_lists(plan, plan.block_size, 2, 2)
    gone = weakref.ref(plan)
    gc.disable()
    try:
        del plan
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 41])
def test_flags_are_held_as_bits(count):
    flags = (torch.rand(2, 3, count) < 0.5).to(torch.uint8)
    bits = chosen_lists.packed(flags)
    assert bits.shape == (2, 3, -(-count // 8)) and torch.equal(chosen_lists.unpacked(bits, count), flags)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_a_few_queries_copy_a_few_keys_at_a_time(softcap, monkeypatch):
    given = tensors((4, 2, 16), 3, 100, torch.float16)
    wanted = sparse_attention(*given, CAUSAL, softcap=softcap, return_lse=True)
    # seven keys of two heads of 16
    monkeypatch.setattr(new_tokens, "MAX_WIDENED", 7 * 2 * 2 * 16)
    with AllocationInterceptor(100) as seen:
        found = sparse_attention(*given, CAUSAL, softcap=softcap, return_lse=True)
    assert seen.largest < given[1].numel()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("interpreted")
def test_nothing_is_added_up_where_nobody_listens():
    given = [t.to(DEVICE) for t in tensors((2, 1, 16), 50, 50, torch.float32)]
    plans = [content_plan(call_of(*given, CAUSAL))]
    with mass_left_out():
        plans.append(content_plan(call_of(*given, CAUSAL)))
    assert plans[0].left_out is None and plans[1].left_out is not None
    assert torch.equal(plans[0].joined.codes, plans[1].joined.codes)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("text", [CAUSAL, "threshold(0.95, 16, 16)", "window(4, 4) | threshold(0.6, 32, 1)"])
def test_kernels(text):
    given = tensors((2, 1, 16), 70, 70, torch.float32)
    mask, lost = defined(text, *given[:2], NOTHING_SAID)
    with mass_left_out() as left:
        compare_choice(text, given, mask, torch.float32, backend="triton")
    # told by the forward pass alone
    (told,) = left.each
    torch.testing.assert_close(told.cpu().double(), lost, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_on_a_gpu(dtype):
    text = "(window(127, 0) | first(4) | threshold(0.05)) & window(None, 0)"
    given = tensors((8, 2, 64), 1500, 1500, dtype, "cuda")
    call = call_of(*given, text)
    mask = held_by(content_plan(call), call, torch.arange(1500, device="cuda")).cpu()
    compare_choice(text, given, mask, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_judges_as_the_definition_does(dtype, monkeypatch):
    (q, k, v), generator = tensors((8, 2, 64), 3000, 3000, dtype), torch.Generator().manual_seed(1)
    # each 100 tokens have a direction of eight, and weigh keys of their own most
    centre = torch.nn.functional.normalize(torch.randn(8, 64, generator=generator), dim=-1)
    direction = centre[torch.randint(8, (30,), generator=generator)].repeat_interleave(100, 0).to(dtype)
    q, k, v = (t.cuda() for t in (q + 24 * direction, k + 3 * direction, v))
    text, found = "(window(127, 0) | first(4) | threshold(0.1)) & window(None, 0)", []
    for able in (True, False):
        if not able:
            monkeypatch.setattr(chosen_judging, "why_not", lambda call: "for this test")
        with mass_left_out():
            plan = content_plan(call_of(q, k, v, text))
        found.append((set(plan.joined.codes.tolist()), plan.left_out))
    (codes, lost), (wanted, wanted_lost) = found
    # rounding decides a tile that is at the share
    assert 0.02 < len(wanted) / (16 * 47 * 48 / 2) < 0.5 and len(codes ^ wanted) <= 2
    torch.testing.assert_close(lost, wanted_lost, rtol=1e-2, atol=1e-2)


def test_compiled_gradients_and_what_they_tell():
    torch._dynamo.reset()

    def attend(q, k, v):
        return sparse_attention(q, k, v, CAUSAL, return_lse=True)

    given = tensors((4, 2, 16), 60, 60, torch.float64)
    with mass_left_out() as left:
        compiled = oracle.gradients(torch.compile(attend, fullgraph=True, backend="aot_eager"), *given)
    for one, other in zip(compiled, oracle.gradients(attend, *given), strict=True):
        torch.testing.assert_close(one, other)
    assert len(left.each) == 1


@pytest.mark.parametrize("length", [4_160, pytest.param(16_411, marks=pytest.mark.slow)])
def test_no_tensor_has_two_lengths(length, monkeypatch):
    monkeypatch.setattr(chosen_threshold, "MAX_SCORES", 1 << 17)
    given = leaves(*[(1, 1, length, 8)] * 3)
    with AllocationInterceptor(length) as seen:
        sparse_attention(*given, "(window(99, 0) | threshold(0.9)) & window(None, 0)").sum().backward()
    assert not seen.quadratic


def test_generates_the_same_with_every_cache_and_padded():
    ours = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), ALONE)
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = ours.generate(ids, **options)
    assert torch.equal(found, ours.generate(ids, **options, use_cache=False))
    assert torch.equal(found, ours.generate(ids, **options, cache_implementation="static", disable_compile=True))
    padded = torch.nn.functional.pad(ids, (11, 0))
    assert torch.equal(ours.generate(padded, attention_mask=(padded > 0).long(), **options)[:, 11:], found)


@pytest.mark.parametrize("text", [HIGH, "(window(5, 0) | threshold(0.95, 16, 1)) & window(None, 0)"])
def test_in_a_model(text, tmp_path):
    ours = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), text)
    one, two = (torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (50, 37))
    places = torch.cat([torch.arange(50), torch.arange(37)])[None]
    ids = torch.cat([one, two], 1)
    with mass_left_out() as left:
        packed = ours(ids, position_ids=places, labels=ids)
    packed.loss.backward()
    layers = ours.config.num_hidden_layers
    assert [tuple(each.shape) for each in left.each] == [(1, 4, 87)] * layers and left.mean > 0
    torch.testing.assert_close(packed.logits, torch.cat([ours(t).logits for t in (one, two)], 1), rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path, attn_implementation="sparse_reference").eval()
    outputs = again(ids, position_ids=places, output_attentions=True)
    torch.testing.assert_close(outputs.logits, packed.logits, rtol=1e-4, atol=1e-5)
    assert outputs.attentions[0].shape == (1, 4, 87, 87)


def test_who_does_not_listen_is_told_once(caplog):
    left_out._say.cache_clear()
    given = tensors((4, 2, 16), 40, 40, torch.float32)
    with caplog.at_level(logging.WARNING, logger="sparse_hf"):
        for _ in range(3):
            sparse_attention(*given, "threshold(0.4, 16, 16)")
        with mass_left_out():
            sparse_attention(*given, "threshold(0.5, 16, 16)")
    assert [record.message.split(" leaves")[0] for record in caplog.records] == ["attention by threshold(0.4, 16, 16)"]
    with mass_left_out() as nothing, pytest.raises(ValueError, match="no layer with threshold"):
        _ = nothing.mean


def test_text_and_numbers():
    for share in (0.001, 1e-5, 1):
        assert Pattern.parse(str(Threshold(share))) == Threshold(share)
    for share in (np.float64(0.25), np.float32(0.25)):
        assert str(Threshold(share)) == "threshold(0.25, 64, 64)"
    assert describe("window(9, 0) | threshold(0.1)", 100).density == 1


def _attend(text: str, **options):
    return lambda: sparse_attention(*tensors((4, 2, 16), 40, 40, torch.float32), text, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pattern.parse("threshold(0)"), "share is 0; it must be a number above 0, and 1 at most"),
        (lambda: Pattern.parse("threshold(1.5)"), "share is 1.5"),
        (lambda: Pattern.parse("threshold(-0.1)"), "share is -0.1"),
        (lambda: Pattern.parse("threshold('much')"), "share is 'much'"),
        (lambda: Pattern.parse("threshold(0.1, 20)"), "size is 20; it must be a multiple of 16"),
        (lambda: Pattern.parse("threshold(0.1, 16, 0)"), "queries is 0; it must be a whole number of at least 1"),
        (lambda: Pattern.parse("threshold(0.1, 16.5)"), "'16.5' is not a value"),
        (lambda: sparse_hf.build_plan("threshold(0.1)", 40), "pass the pattern itself"),
        (_attend("threshold(0.1) & topk(4)"), "two hashes or choices cannot be intersected"),
        (_attend("threshold(0.1) | topk(4)"), r"has both threshold\(...\) and topk\(...\)"),
        (_attend("threshold(0.1) & window(9, 9) | threshold(0.2)"), "has 2 thresholds"),
        (_attend("threshold(0.1)", backend="flex"), r"'flex' cannot run threshold\(...\), .* 'triton' can"),
        (_attend("threshold(0.1)", backend="fa"), r"'fa' cannot run threshold\(...\)"),
        (_attend("threshold(0.1)", relative_bias=torch.zeros(4, 79)), r"threshold\(...\) does not go with relative_bias"),
        (lambda: sparse_hf.StreamingCache(sparse_hf.sparsify(dense_model("LlamaForCausalLM"), CAUSAL).config), "threshold"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call()
