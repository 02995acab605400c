"""Sparse attention of other packages beside ours.

Stand-ins compute what the packages do, from the very arguments.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from sparse_hf.bench import run_attention, sparse_peers
from sparse_hf.bench.exactness import row_error
from sparse_hf.pattern import Pattern, causal
from sparse_hf.plan import build_plan
from tests.bench import stand_ins

TABLE = "block_table(32, ((0,), (0, 1), (2,), (1, 3), (0, 4), (0, 2, 5), (6,))) & causal()"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Both installed, and a GPU."""
    for name in ("fla", "fla.ops.nsa", "fla.ops.moba.parallel"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["fla.ops.nsa"]).update(vars(stand_ins))
    vars(sys.modules["fla.ops.moba.parallel"]).update({**vars(stand_ins), "flash_attn_varlen_func": None})
    layers = tmp_path / "lsg_converter" / "attention_layers"
    layers.mkdir(parents=True)
    (tmp_path / "lsg_converter" / "__init__.py").write_text("raise NameError('AlbertEmbeddings')\n")
    (layers / "lsg_self_attention.py").write_text("from tests.bench.stand_ins import LSGSelfAttention\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sparse_peers, "_gpu_only", lambda q: None)
    # FlexAttention is compiled for half a minute, and all that a session holds is swept before
    # memory is measured
    monkeypatch.setattr("sparse_hf.bench.peers.MAX_FLEX_TOKENS", 0)
    monkeypatch.setattr("sparse_hf.bench.measure.gc.collect", lambda: 0)


def beside(pattern: str, kv_heads: int = 2, n: int = 200) -> dict:
    return run_attention(
        [n], pattern, heads=32, kv_heads=kv_heads, head_dim=16, device="cpu", backends=["blockwise"], repeats=1
    )


@pytest.mark.parametrize(
    ("pattern", "kv_heads", "kinds"),
    [
        ("window(40, 0)", 2, {"fla_nsa": "blocks"}),
        ("window(40, 0)", 32, {"lsg": "blocks"}),
        ("streaming(window=40, sinks=4)", 2, {"fla_nsa": "blocks"}),
        ("streaming(window=40, sinks=1)", 32, {"lsg": "blocks"}),
        ("window(30, 20) | first(1)", 32, {"lsg": "blocks"}),
        (TABLE, 2, {"fla_nsa": "blocks"}),
    ],
)
def test_bench_times_other_packages_once_their_rows_are_right(packages, pattern, kv_heads, kinds):
    result = beside(pattern, kv_heads)
    rows = {row["name"]: row for row in result["rows"]}
    assert {name: rows[name]["kind"] for name in kinds} == kinds
    assert set(rows) == {"sdpa_dense", "blockwise", *kinds}
    assert set(result["left_out"]) == set(sparse_peers.PACKAGES) - set(kinds)
    assert all(max(row["relative_error"], row["relative_error_grad_q"]) < 1e-5 for row in rows.values())
    # they compute the pairs asked for, and "blocks" those around them as well
    for name, kind in kinds.items():
        more = rows[name]["pairs"] - rows["blockwise"]["pairs"]
        assert more > 0 if kind == "blocks" and pattern != TABLE else more == 0


WRONG = {
    "fewer blocks": lambda given: {**given, "block_counts": torch.ones_like(given["block_counts"])},
    "smaller blocks": lambda given: {**given, "block_size": 32},
    "another scale": lambda given: {**given, "scale": 0.3},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bench_refuses_what_its_rows_are_not(packages, monkeypatch, wrong):
    def other(*tensors, **given):
        return stand_ins.parallel_nsa(*tensors, **WRONG[wrong](given))

    monkeypatch.setattr(sys.modules["fla.ops.nsa"], "parallel_nsa", other)
    with pytest.raises(AssertionError, match="fla_nsa at n=200: output and gradient are off by"):
        beside("streaming(window=100, sinks=4)")


def test_bench_refuses_nan(packages, monkeypatch):
    def other(*tensors, **given):
        return stand_ins.parallel_nsa(*tensors, **given) * torch.nan

    monkeypatch.setattr(sys.modules["fla.ops.nsa"], "parallel_nsa", other)
    with pytest.raises(AssertionError, match="fla_nsa at n=200: output and gradient are off by nan, nan"):
        beside("window(40, 0)")


def test_row_error_of_queries_without_keys():
    q = torch.randn(1, 2, 100, 16)
    pattern = Pattern.parse("block_table(10, ((0,),))")
    right = torch.zeros_like(q)
    right[:, :, :10] = torch.nn.functional.scaled_dot_product_attention(q[:, :, :10], q[:, :, :10], q[:, :, :10])
    assert row_error(q, q, q, pattern, right, q, None)[0] < 1e-5
    assert row_error(q, q, q, pattern, q, q, None)[0] > 1


@pytest.mark.parametrize("n", [1, 63, 100, 257])
@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("window(40, 0)", 64),
        ("window(None, 0)", 64),
        ("stride(7) & causal()", 64),
        ("random_blocks(2, 16) & causal() | window(0, 0)", 64),
        ("(chunk(16, 1) | first(16)) & causal()", 16),
        ("(chunk(96, 1) | random_blocks(1, 32)) & causal()", 32),
        ("bigbird(block_size=128) & causal()", 64),
        (TABLE, 32),
    ],
)
def test_nsa_lists_hold_the_blocks_of_the_pattern(pattern, size, n):
    pattern = Pattern.parse(pattern)
    table = sparse_peers._blocks(pattern, n)
    indices, counts = sparse_peers._nsa_lists(table, n, 2, torch.device("cpu"))
    assert table.size == size and (indices.dtype, counts.dtype) == (torch.int32, torch.int32)
    assert bool(((indices >= 0).sum(-1) == counts).all()) and bool((indices[:, :, 0] == indices[:, :, 1]).all())
    place = torch.arange(n)
    listed = (indices[0, :, 0, None] == (place // size)[:, None]).any(-1) & (place <= place[:, None])
    exact, ours = (build_plan(p, n).to_dense()[0, 0] for p in (table & causal(), pattern))
    assert torch.equal(listed, exact) and not bool((ours & ~exact).any())
    # no others are held where the pattern is made of such blocks
    assert pattern.grain % size or torch.equal(exact, ours)


@pytest.mark.parametrize(
    ("name", "pattern", "heads", "reason"),
    [
        ("fla_nsa", "window(40, 0)", (8, 8), "16, 32, 64, ... query heads per key head, and there are 1"),
        ("fla_nsa", "window(40, 0)", (24, 1), "and there are 24"),
        ("fla_nsa", "window(40, 40)", (16, 1), "is causal, and the pattern is not"),
        ("fla_nsa", "window(40, 1)", (16, 1), "is causal, and the pattern is not"),
        ("fla_nsa", f"per_head({', '.join(['window(9, 0)'] * 16)})", (16, 1), "takes one pattern for all heads"),
        ("fla_nsa", "window(40, 0)", (16, 1), "runs on a GPU, in bf16 or fp16"),
        ("lsg", "window(40, 0)", (8, 2), "has as many key heads as query heads"),
        ("lsg", "window(40, 0) | first(2) & causal()", (8, 8), "takes a window and at most one first token"),
        ("lsg", "window(300, 0)", (8, 8), "counts to 304 in torch.bfloat16 for its causal mask, which is wrong"),
        ("lsg", "window(600, 0)", (8, 8), "counts to 1000 in torch.bfloat16 for its causal mask, which is wrong"),
    ],
)
def test_installed_packages_that_cannot_run_a_call_say_why(name, pattern, heads, reason):
    q, k = (torch.zeros(1, h, 1000, 16, dtype=torch.bfloat16) for h in heads)
    make = sparse_peers.PACKAGES[name][2]
    assert reason in make(name, stand_ins, Pattern.parse(pattern), q, k)


def test_packages_that_do_not_import_say_why_and_others_are_not_spoken_of(monkeypatch):
    def broken():
        raise NameError("name 'AlbertEmbeddings' is not defined")

    table = {"broken": ("torch", broken, None), "absent": ("no_such_package", broken, None)}
    monkeypatch.setattr(sparse_peers, "PACKAGES", table)
    q = torch.zeros(1, 2, 8, 4)
    told = {"broken": "does not import: NameError: name 'AlbertEmbeddings' is not defined"}
    assert sparse_peers.sparse_peers(Pattern.parse("window(1, 0)"), q, q) == ([], told)


@pytest.mark.usefixtures("packages")
def test_a_choice_at_run_time_is_no_call_for_them():
    found = beside("(window(9, 0) | topk(8)) & window(None, 0)")["left_out"]
    assert found == {
        "fla_nsa": "takes topk_blocks(...) alone",
        "fla_moba": "takes topk_blocks(count, size) alone, by means and for each head",
        "lsg": "takes pairs that are known by their positions",
    }


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "text", ["topk_blocks(3, 16, 'bounds', 1, 'group')", "topk_blocks(3, 32, 'mean', 16, 'group')"]
)
def test_nsa_has_the_very_blocks_that_ours_chose(text):
    rows = {row["name"]: row for row in beside(f"{text} & window(None, 0)")["rows"]}
    assert set(rows) == {"sdpa_dense", "blockwise", "auto, keys given", "fla_nsa"}
    assert max(max(row["relative_error"], row["relative_error_grad_q"]) for row in rows.values()) < 1e-5


@pytest.mark.usefixtures("packages")
def test_moba_chooses_the_blocks_that_ours_does(monkeypatch):
    rows = {row["name"]: row for row in beside("topk_blocks(3, 16) & window(None, 0)", 32)["rows"]}
    assert set(rows) == {"sdpa_dense", "blockwise", "auto, keys given", "fla_moba"}
    assert max(max(row["relative_error"], row["relative_error_grad_q"]) for row in rows.values()) < 1e-5
    # what it has of FlashAttention, where its package is missing
    assert sys.modules["fla.ops.moba.parallel"]._flash_attn_varlen_forward is sparse_peers._fa2_forward

    def other(*tensors, **given):
        return stand_ins.parallel_moba(*tensors, **{**given, "topk": 2})

    monkeypatch.setattr(sys.modules["fla.ops.moba.parallel"], "parallel_moba", other)
    with pytest.raises(AssertionError, match="fla_moba at n=200: output and gradient are off by"):
        beside("topk_blocks(3, 16) & window(None, 0)", 32)


def test_moba_is_compared_by_the_means_that_it_rounds():
    k = torch.randn(1, 2, 70, 8, dtype=torch.bfloat16)
    found = sparse_peers._rounded_means(k, 32)
    assert found.shape == k.shape
    for some in (slice(0, 32), slice(32, 64)):
        assert torch.equal(found[:, :, some].float().mean(2), k[:, :, some].mean(2).float())


@pytest.mark.parametrize(
    ("name", "text", "heads", "reason"),
    [
        ("fla_nsa", "topk_blocks(3, 16)", (16, 1), "one choice for all query heads of a key head"),
        ("fla_nsa", "topk_blocks(3, 16, per='group')", (8, 1), "and there are 8"),
        ("fla_nsa", "topk_blocks(3, 16, per='group') | window(8, 0)", (16, 1), "takes topk_blocks(...) alone"),
        ("fla_moba", "topk_blocks(3, 16, 'bounds')", (4, 4), "alone, by means and for each head"),
        ("fla_moba", "topk_blocks(3, 16, 'mean', 16)", (4, 4), "alone, by means and for each head"),
        ("fla_moba", "topk_blocks(3, 16) | window(8, 0)", (4, 4), "is causal, and the pattern is not, or has more"),
        ("fla_moba", "topk_blocks(3, 16)", (4, 2), "has as many key heads as query heads"),
        ("fla_moba", "topk_blocks(1, 16)", (4, 4), "is dense attention where nothing is chosen"),
        ("fla_moba", "topk_blocks(3, 16)", (4, 4), "runs on a GPU, in bf16 or fp16"),
    ],
)
def test_choices_that_a_package_cannot_take_say_why(name, text, heads, reason):
    q, k = (torch.zeros(1, h, 100, 16, dtype=torch.bfloat16) for h in heads)
    pattern = Pattern.parse(f"({text}) & window(None, 0)")
    assert reason in sparse_peers.OF_CHOICES[name](name, stand_ins, pattern, q, k)
