"""`bench generate`: what is compared before it is timed, what a time is, and that nothing broken ends a run."""

from __future__ import annotations

import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from sparse_hf.bench import Generation, clock, generate, generate_cases, generate_exact, profile, run_generate
from sparse_hf.cli import app
from sparse_hf.models import sparsify

TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97,
}  # fmt: skip
PATTERN = "window(20, 0) | first(4)"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(generate_cases.SHAPES, "tiny", TINY)
    monkeypatch.setattr(generate_exact, "COMPARED_LENGTHS", (12, 40))
    # before memory is measured; over all that a session of tests holds it takes a quarter of a second each time
    monkeypatch.setattr("sparse_hf.bench.measure.gc.collect", lambda: 0)


def asked(*contexts: tuple[int, int], **given) -> Generation:
    return Generation(contexts, "tiny", PATTERN, **{"tokens": 8, **given})


def test_every_case_is_compared_timed_and_drawn(tmp_path):
    contexts = ["--contexts", "50x2,50,70", "--shape", "tiny", "--pattern", PATTERN, "--tokens", "8", "--device", "cpu"]
    done = CliRunner().invoke(
        app, ["bench", "generate", *contexts, "--out", str(tmp_path / "r.json")], catch_exceptions=False
    )
    assert done.exit_code == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    # at 12 tokens the pattern lacks nothing
    assert {found["tokens"] for found in result["checked"].values()} == {40}
    assert all(found["error"] < 1e-5 and "failed" not in found for found in result["checked"].values())
    rows = result["rows"]
    assert [(row["n"], row["rows"]) for row in rows[::6]] == [(50, 1), (70, 1), (50, 2)] and len(rows) == 18
    # an assistant drafts for one row at a time
    refused = rows.pop()
    assert (refused["case"], refused["rows"]) == ("draft", 2) and "only supported for batch_size = 1" in refused[
        "failed"
    ]
    rows = [row for row in rows if row["case"] != "draft"]
    assert not [row for row in rows if row.get("failed")]
    assert all(row["calls"] == 2 and row["tokens"] == 8 and row["token_s"] > 0 and row["prefill_s"] > 0 for row in rows)
    # keys and values of 2 layers and 2 heads of 16; of the last token nothing is computed
    token = 2 * 2 * 2 * 16 * 4
    held = {row["case"]: row["cache_bytes"] for row in rows if (row["n"], row["rows"]) == (70, 1)}
    assert held["dynamic"] == held["dense-dynamic"] == token * 77
    assert held["static"] >= token * 77
    streamed = {row["cache_bytes"] for row in rows if row["case"] == "streaming" and row["rows"] == 1}
    assert len(streamed) == 1 and streamed.pop() < token * 60
    ours = [row for row in rows if row["kind"] == "ours"]
    assert all(set(row["times_faster"]) == {"dense-dynamic", "dense-static"} for row in ours)
    assert result["weights_bytes"] and result["environment"]["versions"]["transformers"]
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_a_wrong_case_has_rows_that_say_so(monkeypatch):
    monkeypatch.setattr(generate_cases, "sparsify", lambda model, pattern: sparsify(model, "window(17, 0) | first(4)"))
    made = generate_exact._mask
    monkeypatch.setattr(generate_exact, "_mask", lambda text, *rest: made(PATTERN, *rest))
    result = run_generate(asked((50, 1), cases=("dense-dynamic", "dynamic")), "cpu")
    dense, ours = result["rows"]
    assert "failed" not in dense and ours["failed"].startswith("wrong: logits are off by")
    assert result["checked"]["dynamic"]["error"] > result["checked"]["dynamic"]["bound"]


def test_a_broken_case_ends_no_run(monkeypatch):
    monkeypatch.setitem(generate_cases.CASES, "static", generate_cases.Case("broken", "ours", "no_such_cache"))
    result = run_generate(asked((50, 1), cases=("static", "dynamic")), "cpu")
    assert [row.get("failed") for row in result["rows"]] == [result["checked"]["static"]["failed"], None]
    assert "no_such_cache" in result["rows"][0]["failed"]


def test_a_pattern_that_no_streaming_cache_holds_is_a_row(monkeypatch):
    result = run_generate(Generation(((50, 1),), "tiny", "stride(3)", ("streaming", "dynamic"), 8), "cpu")
    streaming, dynamic = result["rows"]
    assert "StreamingCache" in streaming["failed"] and "failed" not in dynamic


def test_memory_that_is_not_there_is_a_row(monkeypatch):
    figures = generate._figures

    def scarce(models, row, asked):
        return figures(models, row, asked) if row["n"] < 60 else torch.empty(1 << 50)

    monkeypatch.setattr(generate, "_figures", scarce)
    result = run_generate(asked((50, 1), (60, 1), (70, 1), cases=("dynamic",)), "cpu")
    assert [row.get("failed") for row in result["rows"]] == [None, "out of memory", "out of memory"]


def test_longer_prompts_than_one_that_took_too_long_are_not_run():
    result = run_generate(asked((50, 1), (70, 1), (50, 2), cases=("dynamic",), budget_s=1e-9), "cpu")
    first, longer, rows = (row.get("failed") for row in result["rows"])
    assert first == rows and first.startswith("OvertimeError: stopped after 1 tokens") and longer == first


def test_what_takes_longer_than_its_limit_is_interrupted():
    with pytest.raises(clock.OvertimeError, match="stopped after 0 s"), clock.time_limit(0.01):
        threading.Event().wait(60)
    with clock.time_limit(60):
        pass


def test_times_are_read_from_the_clock():
    def read(*gaps: float, counts: list[int] | None = None) -> clock.Times:
        times = [0.0]
        for gap in gaps:
            times.append(times[-1] + gap)
        counts = counts or [0] + [1] * len(gaps)
        return clock.read_times(SimpleNamespace(times=times, counts=counts, tokens=sum(counts)))

    # 2 seconds until the first token, then 4 gaps in which it settles
    taken = read(2.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0)
    assert (taken.prefill_s, taken.token_s, taken.settling_s, taken.slowest_s, taken.tokens) == (2.0, 1.0, 8.0, 3.0, 8)
    assert read(2.0, 9.0, 1.0).token_s is None
    # two drafts behind those that settle, of which 3 tokens and 1 were right: 8 seconds for 4 tokens
    taken = read(2.0, 1.0, 1.0, 1.0, 1.0, 6.0, 2.0, counts=[0, 5, 1, 1, 1, 1, 3, 1])
    assert (taken.token_s, taken.tokens_a_pass, taken.tokens, taken.settling_s) == (2.0, 2.0, 13, -4.0)


def test_generation_stops_behind_its_tokens_or_its_budget(monkeypatch):
    now = SimpleNamespace(times=[0.0], tokens=0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 5.0)
    ids = torch.zeros(3, 4, dtype=torch.long)
    assert clock.Stop(now, 1, 9.0)(ids, None).tolist() == [True] * 3
    assert clock.Stop(now, 2, 9.0)(ids, None).tolist() == [False] * 3
    assert clock.Stop(now, 2, 4.0)(ids, None).tolist() == [True] * 3


def test_drafts_are_counted_beside_the_dense_model_alone():
    result = run_generate(asked((50, 1), cases=("dense-dynamic", "draft"), tokens=64, draft_tokens=3), "cpu")
    dense, draft = result["rows"]
    assert draft["kind"] == "drafted" and draft["same_tokens"] == draft["compared_tokens"] == 64
    assert 1 <= draft["tokens_a_pass"] <= 4 and set(draft["times_faster"]) == {"dense-dynamic"}
    assert "same_tokens" not in dense and "given" not in draft and "first_other" not in draft


def test_how_close_another_token_was_is_told(monkeypatch):
    made = generate._generate

    def with_another_token(models, case, ids, *args, **given):
        out = made(models, case, ids, *args, **given)
        if case.kind == "drafted" and "streamer" in given:
            out.sequences[0, ids.shape[1] + 3] = 5
        return out

    monkeypatch.setattr(generate, "_generate", with_another_token)
    cases = ("dense-dynamic", "dense-static", "draft")
    _, static, draft = run_generate(asked((50, 1), cases=cases, tokens=64, draft_tokens=3), "cpu")["rows"]
    assert static["same_tokens"] == static["compared_tokens"] == 64 and "first_other" not in static
    assert draft["same_tokens"] == 3 and draft["first_other"]["margin"] > 10 * draft["first_other"]["spacing"] > 0


def test_other_tokens_than_the_dense_models_are_told(monkeypatch):
    monkeypatch.setattr(
        generate, "_margin", lambda models, context, right, other: {"tokens": (right.tolist(), int(other))}
    )
    given = {(50, 1): torch.tensor([[1, 2, 3, 4]])}
    row = {"n": 50, "rows": 1, "kind": "drafted", "given": torch.tensor([[1, 2, 9, 4, 5]])}
    generate._compare_tokens(None, row, given)
    assert (row["same_tokens"], row["compared_tokens"]) == (2, 4)
    assert row["first_other"] == {"tokens": ([1, 2, 3], 9)}


def test_a_token_is_taken_apart():
    result = run_generate(asked((50, 1), cases=("streaming",), tokens=32, profiles=True), "cpu")
    seen = result["rows"][0]["profile"]
    assert seen["tokens"] == seen["passes"] == profile.PROFILED
    names = {row["name"]: row["calls"] for row in seen["by_name"]}
    # in each of 2 layers 7 products with weights, and the one for the words
    assert names["aten::mm"] == 15 and seen["operations"] > 100
    assert seen["device_s"] == pytest.approx(sum(seen["groups"].values())) and seen["groups"]["weights"] > 0


def test_a_profile_that_fails_leaves_the_figures(monkeypatch):
    monkeypatch.setattr(profile.ProfilingClock, "figures", lambda self: 1 / 0)
    row = run_generate(asked((50, 1), cases=("dynamic",), profiles=True), "cpu")["rows"][0]
    assert row["token_s"] > 0 and row["profile"]["failed"].startswith("ZeroDivisionError")


def test_prompts_are_pieces_of_a_text():
    models = generate_cases.Models(SimpleNamespace(device="cpu"), None, torch.arange(10))
    assert models.prompt(3, 4).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="the text has 10 tokens, and a prompt of 11 is asked for"):
        models.prompt(1, 11)
    with pytest.raises(ValueError, match="a text needs a tokenizer, which the shape 'tiny' has not"):
        generate_cases.load_models("tiny", PATTERN, 100, "fp32", torch.device("cpu"), "a.txt")


def test_a_folder_is_loaded(tmp_path):
    models = generate_cases.load_models("tiny", PATTERN, 100, "fp32", torch.device("cpu"))
    models.dense.save_pretrained(tmp_path / "dense")
    models.ours.save_pretrained(tmp_path / "ours")
    loaded = generate_cases.load_models(str(tmp_path / "dense"), PATTERN, 100, "bf16", torch.device("cpu"))
    weight = loaded.ours.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16 and weight is loaded.dense.get_input_embeddings().weight
    assert loaded.dense.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ValueError, match="is sparse already; give the dense model"):
        generate_cases.load_models(str(tmp_path / "ours"), PATTERN, 100, "fp32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"cases": ("x",)}, "unknown cases ['x']; the known ones are dense-dynamic"),
        ({"tokens": 2}, "tokens is 2; it must be at least 6"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"draft_tokens": 0}, "draft_tokens is 0; it must be at least 1"),
        ({"contexts": ()}, "contexts need at least one entry"),
        ({"contexts": ((0, 1),)}, "contexts need at least one entry, and each at least 1 token"),
        ({"pattern": "windw(1, 2)"}, "unknown word 'windw'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Generation(**{"contexts": ((50, 1),), "model": "tiny", **given})
