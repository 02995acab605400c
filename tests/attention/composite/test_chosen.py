"""`topk(...)` and `topk_blocks(...)` against their definition, in attention and in models."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparse_hf
from sparse_hf import Pattern, sparse_attention
from sparse_hf.attention.chosen import best_keys, by_blocks, gathers, pieces, selection, tiles
from sparse_hf.attention.chosen.choice import Band, ChosenBlocks
from sparse_hf.attention.composite import chosen as composite
from sparse_hf.attention.composite import chosen_blocks, chosen_scores
from sparse_hf.attention.composite.chosen_rest import find_rest
from sparse_hf.attention.composite.content import ContentPairs, held_by, positions_plan
from sparse_hf.attention.dispatch import content_plan, route
from sparse_hf.bench.exactness import plain_call
from sparse_hf.pattern.forms import read_content
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention import choices
from tests.attention.exactness import DEVICE, compare, compare_choice, leaves, tensors
from tests.models.families import dense_model, named_cache
from tests.table import SCENARIOS

BLOCKS = "window(6, 0) | topk_blocks(3, 8)"
TOKENS = "window(6, 0) | first(2) | topk(8)"
IN_TILES = "window(6, 0) | topk_blocks(2, 16, 'bounds', 16)"


@pytest.mark.cross
@pytest.mark.parametrize("case", SCENARIOS)
@pytest.mark.parametrize("text", choices.PATTERNS)
def test_equals_the_definition(text, case):
    for backend in ("reference", "blockwise"):
        compare(backend, text, 36, case, (4, 2, 16), torch.float64, mask_of=choices.mask_of)


@pytest.mark.parametrize("text", ["topk(60)", "topk(1000)", "window(5, 0) | topk(60)", "topk_blocks(8, 8)"])
def test_a_choice_of_all_keys_is_dense_attention(text):
    q, k, v = tensors((4, 2, 16), 60, 60, torch.float64)
    for cut, mask in (
        (" & window(None, 0)", torch.ones(60, 60, dtype=torch.bool).tril()),
        ("", torch.ones(60, 60) > 0),
    ):
        whole = f"({text}){cut}"
        if "window(5, 0)" in text and not cut:
            whole = text
        out, lse = sparse_attention(q, k, v, whole, return_lse=True)
        for found, wanted in zip((out, lse), oracle.attention(q, k, v, mask), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("rows", "queries", "keys"), [(1, 0, 40), (1, 0, 0), (0, 40, 40)])
@pytest.mark.parametrize(
    "text", ["topk(3)", "topk_blocks(2, 16)", "vertical_slash(2, 2)", "lsh(2, 8)", "threshold(0.5)"]
)
def test_where_nobody_asks_nothing_is_chosen(text, rows, queries, keys, backend):
    q, k = torch.randn(rows, 2, queries, 16, requires_grad=True), torch.randn(rows, 2, keys, 16)
    out = sparse_attention(q, k, k, f"{text} & window(None, 0)", backend=backend)
    out.sum().backward()
    assert out.shape == q.shape and q.grad is not None


def test_a_choice_larger_than_the_text_is_told_once(caplog):
    composite._say_whole.cache_clear()
    given = tensors((4, 2, 16), 60, 60, torch.float64)
    with caplog.at_level(logging.INFO, logger="sparse_hf"):
        for text in ("topk(61)", "topk(61)", "topk(59)", "topk_blocks(8, 8)"):
            sparse_attention(*given, text)
    told = [record.message for record in caplog.records if "shorter than what" in record.message]
    assert [one.split("what ")[1].split(" may")[0] for one in told] == ["topk(61)", "topk_blocks(8, 8, 'mean', 1)"]


@pytest.mark.parametrize("text", [f"({BLOCKS}) & window(None, 0)", "topk(8)"])
def test_soft_caps_and_dropout_agree_with_the_reference(text):
    q, k, v = tensors((4, 2, 16), 60, 60, torch.float64)
    found = []
    for backend in ("reference", "blockwise"):
        torch.manual_seed(5)
        found.append(sparse_attention(q, k, v, text, backend=backend, dropout=0.4, softcap=2.0))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [BLOCKS, TOKENS])
def test_compiled_gradients(text):
    torch._dynamo.reset()

    def attend(q, k, v):
        return sparse_attention(q, k, v, text, return_lse=True)

    given = tensors((4, 2, 16), 60, 60, torch.float64)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for one, other in zip(oracle.gradients(compiled, *given), oracle.gradients(attend, *given), strict=True):
        torch.testing.assert_close(one, other)


SHARED = "topk_blocks(3, 64, 'antidiagonal', 64)"


@pytest.mark.parametrize("length", [8_256, pytest.param(16_411, marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", [TOKENS, BLOCKS, "topk_blocks(3, 64, 'bounds')", SHARED, "vertical_slash(5, 3, 16)"])
def test_no_tensor_has_two_lengths(text, length, monkeypatch):
    # as few scores at once as a longer text has
    monkeypatch.setattr(best_keys, "MAX_SCORES", 1 << 16)
    monkeypatch.setattr(chosen_scores, "MAX_NUMBERS", 1 << 16)
    q, k, v = leaves(*[(1, 1, length, 8)] * 3)
    with AllocationInterceptor(length) as seen:
        sparse_attention(q, k, v, f"({text}) & window(None, 0)").sum().backward()
    # blocks of eight are chosen from some queries at a time
    assert not seen.quadratic


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("per", "heads"), [("head", (2, 1)), ("group", (4, 2))])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_keys_of_blocks_are_not_written_out(by_kernels, per, heads, monkeypatch):
    monkeypatch.setattr(pieces, "MAX_GATHERED", 1 << 15)
    for room in (gathers, by_blocks):
        monkeypatch.setattr(room, "MAX_PART_BYTES", 1 << 16)
    monkeypatch.setattr(selection, "is_able", lambda device: False)
    if not by_kernels:
        monkeypatch.setattr(gathers, "why_not", lambda call: "asked not to")
    q, k, v = (t.to(DEVICE).requires_grad_() for t in tensors((*heads, 16), 300, 300, torch.float16))
    text = f"topk_blocks(4, 64, 'mean', 1, '{per}') & window(None, 0)"
    with AllocationInterceptor(300) as seen:
        sparse_attention(q, k, v, text).float().sum().backward()
    choosing = len(q) * (heads[1] if per == "group" else heads[0])
    # in bytes, of which the interpreter makes copies
    assert seen.largest < choosing * 300 * 4 * 64


def test_scores_find_large_products():
    torch.manual_seed(0)
    k = torch.randn(1, 2, 1024, 32)
    q = k.flip(2) + 0.1 * torch.randn_like(k)
    weights = (q @ k.mT * 32**-0.5).softmax(-1)
    kept = {}
    for text in ("topk(64)", "topk_blocks(8, 8)", "topk_blocks(8, 8, 'bounds')"):
        held = sparse_attention(q, k, torch.eye(1024).expand(1, 2, -1, -1), text) > 0
        kept[text] = float(weights[held].sum() / weights.sum())
    # nobody finds more than the best keys, and each leaves the sixteenth that chance would find far behind
    assert kept["topk(64)"] == max(kept.values()) > 0.35 and min(kept.values()) > 0.15


@pytest.mark.parametrize("text", [TOKENS, BLOCKS])
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_generates_the_same_with_every_cache_and_padded(head, text):
    ours = sparse_hf.sparsify(dense_model(head), text)
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = ours.generate(ids, **options)
    assert torch.equal(found, ours.generate(ids, **options, use_cache=False))
    assert torch.equal(found, ours.generate(ids, **options, cache_implementation="static", disable_compile=True))
    padded = torch.nn.functional.pad(ids, (11, 0))
    assert torch.equal(ours.generate(padded, attention_mask=(padded > 0).long(), **options)[:, 11:], found)


@pytest.mark.parametrize(
    ("head", "text"), [("LlamaForCausalLM", TOKENS), ("BertForMaskedLM", BLOCKS), ("LlamaForCausalLM", IN_TILES)]
)
def test_in_a_model(head, text, tmp_path):
    ours = sparse_hf.sparsify(dense_model(head), text)
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    wanted = ours(input_ids=ids, labels=ids)
    wanted.loss.backward()
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path, attn_implementation="sparse_reference").eval()
    outputs = again(input_ids=ids, output_attentions=True)
    torch.testing.assert_close(outputs.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert outputs.attentions[0].shape == (2, 4, 70, 70)


@pytest.mark.parametrize("text", [TOKENS, BLOCKS, IN_TILES])
def test_packed_equals_separate(text):
    ours = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), text)
    one, two = (torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (50, 37))
    places = torch.cat([torch.arange(50), torch.arange(37)])[None]
    packed = ours(torch.cat([one, two], 1), position_ids=places).logits
    torch.testing.assert_close(packed, torch.cat([ours(t).logits for t in (one, two)], 1), rtol=1e-4, atol=1e-5)


# and what of the distances and the first keys is left to choose from; None where that is not all that there is to say
BANDS = {
    "topk_blocks(3, 8) & window(None, 0)": (0, 60, 0),
    "(window(6, 0) | first(2) | topk_blocks(3, 8)) & window(None, 0)": (7, 60, 2),
    "(first(9) | topk_blocks(3, 8, 'mean', 4)) & window(None, 0)": (0, 60, 9),
    "(window(0, 0) | topk_blocks(2, 16, 'mean', 16)) & window(40, 0)": (1, 40, 0),
    "topk_blocks(3, 8)": None,
    "(stride(3) | topk_blocks(3, 8)) & window(None, 0)": None,
    "((first(4) & window(20, 0)) | topk_blocks(3, 8)) & window(None, 0)": None,
    "(window(None, 0) | topk_blocks(3, 8)) & window(None, 0)": None,
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("queries", [60, 23])
@pytest.mark.parametrize(("text", "band"), BANDS.items())
def test_keys_of_blocks_are_known_from_numbers(text, band, queries):
    q, k, _ = (t.to(DEVICE) for t in tensors((4, 2, 16), queries, 60, torch.float32))
    call = plain_call(q, k, k, Pattern.parse(text))
    call.q_offset = 60 - queries
    positions, ((content, cut),) = positions_plan(call), read_content(call.pattern).chosen
    rest = find_rest(positions, cut, 2)
    assert rest.band == (None if band is None else Band(*band))
    if band is not None:
        groups = chosen_blocks.find_groups(rest, content)
        found = groups.choose(q, k)
        group, block = (torch.arange(n, device=DEVICE) for n in (found.shape[2], groups.keys.first.shape[1]))
        seen = groups.limits.seen(slice(0, len(group)), slice(0, len(block)), q.device)
        wanted = groups._allows(group[:, None], block)
        assert torch.equal(torch.ones_like(wanted) if seen is None else seen.expand_as(wanted), wanted)
        exact = torch.cat(list(chosen_blocks._keys_of_blocks(found, groups)), 2)
        choice = chosen_blocks.block_choice(call, content, rest)
        assert isinstance(choice, ChosenBlocks) and (exact >= 0).any()
        assert torch.equal(choice.index, exact)
        assert torch.equal(choice.of_queries(slice(5, 20)).index, exact[:, :, 5:20])
        head, some = torch.tensor([1, 0], device=DEVICE), torch.tensor([7, 2, 2], device=DEVICE)
        assert torch.equal(choice.keys(1, head, some), exact[1, head][:, some])


def test_positions_without_pairs_are_not_attended_to():
    q, k, v = tensors((4, 2, 16), 60, 60, torch.float32)
    for text, count in (("topk(3)", 1), ("topk(3) | window(2, 0)", 2)):
        call = plain_call(q, k, v, Pattern.parse(f"({text}) & window(None, 0)"))
        backend = route(call, "auto")
        assert isinstance(backend, ContentPairs) and len(backend._parts(call)) == count


# with how often the queries that chose each block are listed: not forward, where heads fill tiles of a query or no tile has such
# blocks, else some queries at a time in either pass
OF_BLOCKS = [
    ("topk_blocks(3, 16, 'mean', 1, 'group') & window(None, 0)", (16, 1, 16), 1),
    ("(window(5, 0) | first(2) | topk_blocks(3, 8)) & window(None, 0)", (2, 1, 16), 1),
    ("topk_blocks(3, 12, 'bounds', 1, 'group') & window(None, 0)", (4, 2, 16), 1),
    ("topk_blocks(3, 16, 'mean', 1, 'group') & window(None, 0)", (4, 2, 16), 6),
    ("(window(5, 0) | topk_blocks(3, 16, 'bounds')) & window(40, 0)", (2, 1, 24), 4),
    ("topk_blocks(2, 32, 'mean', 1, 'group')", (6, 2, 16), 6),
]


@pytest.mark.usefixtures("interpreted")
def test_heads_that_fill_several_tiles_of_a_block(monkeypatch):
    monkeypatch.setattr(by_blocks, "LEAST_HEADS", 32)
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(tiles, name, (tiles.Tile(8, 4, 2),) * 2)
    monkeypatch.setattr(selection, "is_able", lambda device: False)
    text, given = (
        "(window(5, 0) | topk_blocks(3, 16, 'mean', 1, 'group')) & window(None, 0)",
        tensors((20, 1, 16), 20, 26, torch.float16),
    )
    call = plain_call(*(t.to(DEVICE) for t in given), Pattern.parse(text))
    call.q_offset = 6
    mask = held_by(content_plan(call), call, torch.arange(20, device=DEVICE)).cpu()
    compare_choice(text, given, mask, torch.float16, backend="triton")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("text", "shape", "times"), OF_BLOCKS)
def test_blocks_by_the_kernels(text, shape, times, monkeypatch):
    monkeypatch.setattr(gathers, "BLOCK_CHOOSERS", 10)
    monkeypatch.setattr(gathers, "MAX_PART_BYTES", 32_000)
    monkeypatch.setattr(by_blocks, "MAX_PART_BYTES", 2400)
    monkeypatch.setattr(by_blocks, "MAX_COPIED", 300)
    made, of_blocks = [], gathers._choosers_of_blocks
    monkeypatch.setattr(gathers, "_choosers_of_blocks", lambda *given: made.append(given) or of_blocks(*given))
    given = tensors(shape, 26, 26, torch.float16)
    # the choice itself in plain PyTorch, which the interpreter takes long for
    monkeypatch.setattr(selection, "is_able", lambda device: False)
    on_device = [t.to(DEVICE) for t in given]
    call = plain_call(*on_device, Pattern.parse(text))
    mask = held_by(content_plan(call), call, torch.arange(26, device=DEVICE)).cpu()
    compare_choice(text, given, mask, torch.float16, backend="triton")
    assert len(made) == times


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "per", "shape"), [(64, "group", (32, 2, 128)), (64, "head", (4, 4, 64)), (128, "group", (8, 2, 80))]
)
def test_blocks_on_a_gpu(dtype, size, per, shape):
    text = f"topk_blocks(4, {size}, 'mean', 1, '{per}') & window(None, 0)"
    given = tensors(shape, 1100, 1100, dtype, "cuda")
    call = plain_call(*given, Pattern.parse(text))
    mask = held_by(content_plan(call), call, torch.arange(1100, device="cuda")).cpu()
    compare_choice(text, given, mask, dtype)
    found = [oracle.gradients(lambda *t: sparse_attention(*t, text, return_lse=True), *given) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def _attend(text: str, **options):
    return lambda: sparse_attention(*tensors((4, 2, 16), 40, 40, torch.float32), text, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pattern.parse("topk(0)"), "topk: count is 0; it must be a whole number of at least 1"),
        (lambda: Pattern.parse("topk_blocks(4, 8, 'most')"), "the known ones are 'mean', 'bounds', 'antidiagonal'"),
        (lambda: Pattern.parse("topk_blocks(4, 8, per='all')"), "per is 'all'; the known ones are 'head', 'group'"),
        (lambda: Pattern.parse("topk_blocks(4, 8, 'mean', 12)"), "12 queries choose blocks of 8 keys together"),
        (lambda: Pattern.parse("topk_blocks(4, 16, 'antidiagonal', 8)"), "both are multiples of 16"),
        (lambda: Pattern.parse("vertical_slash(4, 0)"), "diagonals is 0; it must be a whole number of at least 1"),
        (lambda: Pattern.parse("per_head(topk(8), topk(8))"), "use it alone"),
        (lambda: Pattern.parse("outside(topk(8))"), "give a pattern of positions"),
        (lambda: sparse_hf.build_plan("topk(8)", 40), "pass the pattern itself"),
        (_attend("topk(8) & topk(4)"), "two hashes or choices cannot be intersected"),
        (_attend("topk(8) | lsh(4)"), "has both"),
        (_attend("topk_blocks(3, 8, 'mean', 8)", backend="flex"), r"'flex' cannot run topk_blocks\(...\), .* 'triton' can"),
        (_attend("topk(8)", relative_bias=torch.zeros(4, 79)), "does not go with relative_bias"),
        (lambda: sparse_hf.sparsify(dense_model("LlamaForCausalLM"), TOKENS)(
            torch.full((1, 40), 5), attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool)), "2-D attention mask"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call()


@pytest.mark.parametrize("padded", [0, 9])
def test_the_last_queries_are_those_of_the_call_in_a_static_cache(padded):
    """Slots that nothing was written to are no end of the text."""
    model = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "vertical_slash(4, 3, 8)").eval()
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    found = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        passes = [(slice(0, 33), mask[:, :33]), (slice(33, 40), mask)]
        with torch.no_grad():
            found.append(
                [model(ids[:, some], attention_mask=m, **named_cache(model, cache)).logits for some, m in passes]
            )
    for dynamic, static in zip(*found, strict=True):
        torch.testing.assert_close(static[:, padded:], dynamic[:, padded:])
