"""`evaluate` as a whole: its figures equal those of stock models, it refuses before it works, and it goes on where it stopped."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_hf import Pattern, convert, evaluate, sparsify
from sparse_hf.evaluation import Candidate, Settings
from sparse_hf.evaluation.probes.masked import hidden_tokens
from sparse_hf.evaluation.probes.table import PROBES
from sparse_hf.evaluation.texts import Sample
from sparse_hf.testing import AllocationInterceptor
from tests.evaluation.tiny import QUICK, TEXT, tiny_model, tokenizer
from tests.models.families import dense_model
from tests.oracle import dense_mask

PATTERN = "window(11, 0) | first(2)"


def run(model, patterns=PATTERN, texts=TEXT, **options):
    return evaluate(model, patterns, texts, tokenizer=tokenizer(), **{"settings": QUICK, **options}).result["probes"]


def ids_of(text: str = TEXT, length: int = QUICK.length) -> torch.Tensor:
    return torch.tensor([tokenizer()(text)["input_ids"][:length]])


@torch.no_grad()
def with_mask(dense, pattern: str, ids: torch.Tensor, **options):
    """The stock model under a mask of pairs."""
    allowed = dense_mask(pattern, ids.shape[1], ids.shape[1])
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return dense(input_ids=ids, attention_mask=mask, **options)


@torch.no_grad()
def test_answers_and_states_are_compared_with_the_stock_model():
    dense = tiny_model()
    found = run(dense, probes=["divergence", "perplexity"])
    ids, pairs = ids_of(), f"({PATTERN}) & window(None, 0)"
    outputs = [dense(ids, output_hidden_states=True), with_mask(dense, pairs, ids, output_hidden_states=True)]
    wanted, given = (output.logits[0].detach() for output in outputs)
    divergence = found["divergence"]["candidates"][PATTERN]
    p, q = wanted.log_softmax(-1), given.log_softmax(-1)
    assert divergence["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert divergence["same"] == pytest.approx(float((wanted.argmax(-1) == given.argmax(-1)).double().mean()))
    errors = [
        float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean())
        for a, b in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True)
    ]
    assert divergence["hidden_error"] == pytest.approx([float(e) for e in errors], rel=1e-3, abs=1e-6)
    assert divergence["hidden_error"][0] == 0 < divergence["hidden_error"][1]
    for name, logits in (("dense", wanted), (PATTERN, given)):
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
        assert found["perplexity"]["candidates"][name]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    # the first tokens see all that there is
    assert found["divergence"]["candidates"][PATTERN]["kl_by_position"][0] == pytest.approx(0, abs=1e-6)


def test_a_pattern_of_everything_loses_nothing():
    found = run(tiny_model(), {"all": "window(500, 0)"}, probes=["divergence", "perplexity", "coverage", "recall"])
    own = found["divergence"]["candidates"]["all"]
    assert own["kl"] == pytest.approx(0, abs=1e-7) and own["same"] == 1 and max(own["hidden_error"]) < 1e-5
    assert found["coverage"]["candidates"]["all"]["kept"] == pytest.approx(1)
    assert found["recall"]["candidates"]["all"]["loss"] == pytest.approx(
        found["recall"]["candidates"]["dense"]["loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    "head", ["BertModel", "MistralForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "AlbertModel"]
)
def test_coverage_is_that_of_the_weights_of_the_stock_model(head):
    # older versions of Gemma 2 leave their soft cap out but for eager attention
    dense = tiny_model(head, **({"n_positions": 512} if head == "GPT2LMHeadModel" else {}))
    dense.set_attn_implementation("eager")
    pattern = "window(9, 9) | first(2)"
    found = run(dense, pattern, probes=["coverage"])["coverage"]
    weights = torch.stack(dense(ids_of(), output_attentions=True).attentions)[:, 0].detach()
    is_causal = not head.startswith(("Bert", "Albert"))
    layers = sparsify(dense, pattern).config
    masks = torch.stack([dense_mask(layers.layer_pattern(i, is_causal), 96, 96)[0] for i in range(len(weights))])
    kept = (weights * masks).sum(-1).mean(-1)
    own = found["candidates"][pattern]
    torch.testing.assert_close(torch.tensor(own["by_head"]), kept, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(own["by_layer"]), kept.mean(1), rtol=1e-3, atol=1e-4)
    assert own["kept"] == pytest.approx(float(kept.mean()), rel=1e-3)
    lost = (weights * ~masks).sum((0, 1, 2))
    assert own["lost_on_first_tokens"] == pytest.approx(float(lost[:4].sum() / lost.sum()), abs=1e-3)
    distance = (torch.arange(96)[:, None] - torch.arange(96)).abs()
    near = (weights * ((distance >= 2) & (distance <= 3))).sum() / weights.sum()
    assert found["dense_by_distance"][2] == pytest.approx(float(near), rel=1e-3, abs=1e-6)


def test_coverage_of_chosen_keys_is_that_of_the_greatest_weights_of_the_stock_model():
    dense, pattern = tiny_model("MistralForCausalLM"), "topk(9) & window(None, 0)"
    found = run(dense, pattern, probes=["coverage"])["coverage"]
    dense.set_attn_implementation("eager")
    weights = torch.stack(dense(ids_of(), output_attentions=True).attentions)[:, 0].detach()
    kept = weights.topk(9).values.sum(-1).mean(-1)
    torch.testing.assert_close(torch.tensor(found["candidates"][pattern]["by_head"]), kept, rtol=1e-3, atol=1e-4)


def test_coverage_of_marked_tokens():
    dense, full_stop = tiny_model("BertModel"), tokenizer()(".")["input_ids"][0]
    settings = Settings(length=200, lengths=(200,), progress=False, global_token_ids=(full_stop,))
    found = run(dense, "window(2, 2) | marked()", probes=["coverage"], settings=settings)["coverage"]
    dense.set_attn_implementation("eager")
    ids = ids_of(length=200)
    weights = torch.stack(dense(ids, output_attentions=True).attentions)[:, 0].detach()
    mask = dense_mask("window(2, 2) | marked()", 200, 200, marks=ids == full_stop)
    kept = float((weights * mask).sum(-1).mean())
    assert found["candidates"]["window(2, 2) | marked()"]["kept"] == pytest.approx(kept, rel=1e-3)


def test_hidden_tokens_are_named_as_the_stock_model_names_them():
    dense = tiny_model("BertForMaskedLM")
    found = run(dense, "window(500, 500)", probes=["masked", "divergence"])["masked"]["candidates"]
    ids = ids_of()
    hidden = hidden_tokens(Sample("", 0, ids), tokenizer().all_special_ids, QUICK.seed)
    masked = ids.clone()
    masked[0, hidden] = tokenizer().mask_token_id
    logits = dense(masked).logits[0, hidden].detach()
    accuracy = float((logits.argmax(-1) == ids[0, hidden]).double().mean())
    loss = float(torch.nn.functional.cross_entropy(logits, ids[0, hidden]))
    for name in ("dense", "window(500, 500)"):
        assert found[name]["accuracy"] == pytest.approx(accuracy) and found[name]["loss"] == pytest.approx(
            loss, rel=1e-4
        )
    assert len(hidden) == round(0.15 * QUICK.length)


@torch.no_grad()
def test_embeddings_stand_beside_those_of_less_text():
    dense = tiny_model("BertModel")
    texts = [TEXT, TEXT[500:], TEXT[900:] + TEXT]
    settings = Settings(length=600, lengths=(64,), progress=False)
    found = run(dense, ["window(700, 700)", "window(4, 4)"], texts, probes=["embedding"], settings=settings)
    own = found["embedding"]["candidates"]
    ids = [ids_of(text, 600) for text in texts]
    whole = torch.nn.functional.normalize(torch.cat([dense(one).last_hidden_state.mean(1) for one in ids]), dim=-1)
    short = torch.nn.functional.normalize(
        torch.cat([dense(one[:, :512]).last_hidden_state.mean(1) for one in ids]), dim=-1
    )
    assert own["dense, truncated"]["cosine"] == pytest.approx(float((whole * short).sum(-1).mean()), rel=1e-4)
    assert own["window(700, 700)"]["cosine"] == pytest.approx(1) and own["dense"]["order"] == pytest.approx(1)
    assert set(own) == {"dense", "window(700, 700)", "window(4, 4)", "dense, truncated", "dense, in chunks"}


def test_the_model_stays_as_it_is():
    dense = tiny_model().train()
    config, before = copy.deepcopy(dense.config.to_dict()), {k: v.clone() for k, v in dense.state_dict().items()}
    names = dict(transformers_table())
    run(dense)
    assert dense.training and dense.config.to_dict() == config and dict(transformers_table()) == names
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert not any(module._forward_hooks for module in dense.modules())


def transformers_table():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}


def test_no_tensor_is_n_by_n():
    length = 1511
    settings = Settings(length=length, lengths=(length,), depths=(0.5,), tasks=("passkey",), progress=False)
    with AllocationInterceptor(length, block_sizes=()) as seen:
        run(
            tiny_model(), "window(63, 0) | first(4)", probes=["divergence", "perplexity", "coverage"], settings=settings
        )
    assert not seen.quadratic


class PassError(Exception):
    pass


def unwilling(head: str = "LlamaForCausalLM", **changes):
    """A model whose forward pass fails, and with it those of all candidates."""
    model = tiny_model(head, **changes)

    def refuse(*_):
        raise PassError

    model.base_model.register_forward_pre_hook(refuse)
    return model


REFUSED = [
    ({"texts": "short"}, "text 1 has 5 tokens, and 96 of each text are read"),
    ({"texts": ()}, "texts is empty"),
    ({"texts": [TEXT, " \n"]}, "text 2 is empty"),
    ({"patterns": ()}, "patterns is empty and the model is dense"),
    ({"patterns": "windw(3, 0)"}, "windw"),
    ({"patterns": ["window(3, 0)", "window(3, 0)"]}, "two candidates are named 'window(3, 0)'"),
    ({"patterns": {"dense": "window(3, 0)"}}, "give it another name"),
    ({"patterns": "a: ; 0=dense"}, "has no pattern"),
    ({"patterns": "window(3, 0); 0-9=dense"}, "outside the model"),
    ({"probes": ["masked"]}, "probe masked: SparseLlamaForCausalLM names no hidden tokens"),
    ({"probes": ["embedding"]}, "probe embedding: SparseLlamaForCausalLM makes no embeddings"),
    ({"probes": ["speed"]}, "there is no probe 'speed'; there are divergence"),
    ({"settings": Settings(length=96, tasks=("chess",))}, None),
    (
        {"settings": Settings(length=96, lengths=(64,)), "probes": ["recall"]},
        "probe recall: the facts of passkey alone take",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_bad_input_is_refused_before_any_pass(given, message):
    if message is None:
        given, message = {**given, "probes": ["recall"]}, "there is no task 'chess'; there are passkey"
    with pytest.raises(ValueError) as caught:
        run(unwilling(), **given)
    assert message in str(caught.value)


def test_no_length_is_advised_that_is_too_short():
    with pytest.raises(ValueError, match=r"text 1 has 5 tokens, and 96 of each text are read; give longer texts$"):
        run(unwilling(), texts="short")
    with pytest.raises(ValueError, match=r"or a smaller length \(--length \d\d\)$"):
        run(unwilling(), texts="x" * 50, settings=Settings(length=96, progress=False))


def test_positions_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="400 tokens are asked about, and .* has 300 positions; .*max_length=400"):
        run(unwilling("BertModel", max_position_embeddings=300), settings=Settings(length=400, progress=False))


def test_a_head_that_a_probe_needs():
    with pytest.raises(ValueError, match="probe perplexity: SparseBertModel predicts no next token"):
        run(unwilling("BertModel"), probes=["perplexity"])
    with pytest.raises(ValueError, match="has an encoder and a decoder"):
        run(tiny_model("BartForConditionalGeneration"))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"length": 3}, "length is 3"), ({"depths": (1.5,)}, "depths is"), ({"depths": ()}, "depths is"), ({"lengths": (4,)}, "lengths has 4"),
     ({"samples": 0}, "samples is 0"), ({"repeats": -1}, "repeats is -1"), ({"batch": 0}, "batch is 0"),
     ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32")],
)  # fmt: skip
def test_settings_outside_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def saved(folder: Path, **changes) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_folders_stand_beside_each_other(tmp_path):
    folder = saved(tmp_path / "dense")
    sparse = convert(folder, tmp_path / "sparse", PATTERN, progress=False)
    found = evaluate(folder, [PATTERN, sparse], TEXT, settings=QUICK, probes=["divergence"]).result["probes"][
        "divergence"
    ]
    assert found["candidates"]["sparse"] == found["candidates"][PATTERN]
    # a sparse model is a candidate itself
    own = evaluate(sparse, (), TEXT, settings=QUICK, probes=["divergence"]).result
    assert own["probes"]["divergence"]["candidates"]["as saved"]["kl"] == pytest.approx(
        found["candidates"][PATTERN]["kl"]
    )
    assert own["candidates"][1]["layers"] == [PATTERN] * 2


def test_a_folder_decodes_as_it_says(tmp_path):
    """Prompts by the pattern, answers as the dense model says them."""
    folder = saved(tmp_path / "dense")
    sparse = convert(folder, tmp_path / "sparse", PATTERN, decode="dense", progress=False)
    asked = {"settings": QUICK, "probes": ["recall"]}
    wanted = evaluate(folder, {"reader": f"{PATTERN}; decode=dense", "alone": PATTERN}, TEXT, **asked).result
    own = evaluate(sparse, (), TEXT, **asked).result["probes"]["recall"]["candidates"]["as saved"]
    wanted = wanted["probes"]["recall"]["candidates"]
    assert own == wanted["reader"] != wanted["alone"]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    folder = saved(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a dense LlamaForCausalLM; give a sparse checkpoint"):
        evaluate(folder, [folder], TEXT, settings=QUICK)
    other = convert(saved(tmp_path / "other"), tmp_path / "sparse", PATTERN, progress=False)
    text = (other / "tokenizer.json").read_text().replace('"<mask>"', '"<hidden>"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="has other tokens than that of the model"):
        evaluate(folder, [other], TEXT, settings=QUICK)
    deep = convert(saved(tmp_path / "deep", num_hidden_layers=3), tmp_path / "deeper", PATTERN, progress=False)
    with pytest.raises(ValueError, match="has another number of layers"):
        evaluate(folder, [deep], TEXT, settings=QUICK)


def test_texts_and_tokenizers_are_looked_at_before_weights_are_read(tmp_path):
    folder = saved(tmp_path / "model")
    other = convert(saved(tmp_path / "other"), tmp_path / "sparse", PATTERN, progress=False)
    text = (other / "tokenizer.json").read_text().replace('"<mask>"', '"<hidden>"')
    (other / "tokenizer.json").write_text(text)
    # whoever reads them says something else
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="has other tokens than that of the model"):
        evaluate(folder, [other], TEXT, settings=QUICK)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="text 1 has 5 tokens"):
        evaluate(folder, PATTERN, "short", settings=QUICK)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer in .*; give one as tokenizer="):
        evaluate(folder, PATTERN, TEXT, settings=QUICK)
    with pytest.raises(OSError, match="nothing"):
        evaluate(tmp_path / "nothing", PATTERN, TEXT, settings=QUICK)


def test_the_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"gives id \d+, and .* has 90 tokens; give the tokenizer of the model"):
        run(dense_model("LlamaForCausalLM", vocab_size=90).eval())


def test_questions_that_are_asked_together_make_no_difference(tmp_path):
    settings = replace(QUICK, tasks=("passkey", "pairs"), depths=(0.1, 0.5), lengths=(280, 600))
    alone, together = (
        run(tiny_model(), settings=replace(settings, batch=batch), probes=["recall"], out=tmp_path)["recall"]
        for batch in (1, 3)
    )
    assert together["lengths"] == alone["lengths"] == [280, 600]
    for name, found in alone["candidates"].items():
        other = together["candidates"][name]
        assert other["loss"] == pytest.approx(found["loss"], rel=1e-4) and other["recalled"] == found["recalled"]
        assert {task: len(cells) for task, cells in other["tasks"].items()} == {"passkey": 4, "pairs": 4}
    # four questions of each length to each of two; one that is left over is the same piece as alone
    asked = (len(json.loads(path.read_text())["what"]["asked"]) for path in (tmp_path / "pieces").iterdir())
    assert Counter(asked) == {1: 16, 3: 4}


def test_texts_are_files(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    assert run(tiny_model(), texts=tmp_path / "a.txt", probes=["perplexity"])
    with pytest.raises(FileNotFoundError, match="there is no text"):
        run(tiny_model(), texts=tmp_path / "c.txt")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        run(tiny_model(), texts=tmp_path / "b.txt")


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    model, probe, done = tiny_model(), type(PROBES["perplexity"]), []
    inner = probe.pieces

    def watched(self, setup):
        for piece in inner(self, setup):
            work = piece.work

            def counted(piece=piece, work=work):
                if len(done) == 1 and not (tmp_path / "allowed").exists():
                    raise KeyboardInterrupt
                done.append(piece.candidate)
                return work()

            yield type(piece)(**{**vars(piece), "work": counted})

    monkeypatch.setattr(probe, "pieces", watched)
    options = {"probes": ["perplexity"], "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        run(model, [PATTERN, "window(3, 0)"], **options)
    assert done == ["dense"] and not (tmp_path / "out" / "report.json").exists()
    (tmp_path / "allowed").touch()
    first = run(model, [PATTERN, "window(3, 0)"], **options)
    assert done == ["dense", PATTERN, "window(3, 0)"]
    # a further candidate costs its own pieces alone, and other weights everything
    assert (
        run(model, [PATTERN, "window(3, 0)", "window(5, 0)"], **options)["perplexity"]["candidates"][PATTERN]
        == (first["perplexity"]["candidates"][PATTERN])
    )
    assert done[3:] == ["window(5, 0)"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    run(model, [PATTERN], **options)
    assert done[4:] == ["dense", PATTERN]


def test_a_damaged_piece_is_made_anew(tmp_path):
    options = {"probes": ["perplexity"], "out": tmp_path}
    first = run(tiny_model(), **options)
    for path in (tmp_path / "pieces").glob("*.json"):
        path.write_text(path.read_text()[:20])
    assert run(tiny_model(), **options) == first


def test_candidates_are_read_from_text():
    assert Candidate.read("wide: window(9, 0) | first(1); 0-/2=dense") == Candidate(
        "wide", Pattern.parse("window(9, 0) | first(1)"), "0-/2=dense"
    )
    assert Candidate.read("window(9, 0)").name == "window(9, 0)"


def test_samples_are_spaced_over_a_text():
    settings = Settings(length=96, lengths=(96,), samples=3, progress=False)
    found = evaluate(
        tiny_model(), PATTERN, TEXT, tokenizer=tokenizer(), settings=settings, probes=["perplexity"]
    ).result
    room = len(tokenizer()(TEXT)["input_ids"]) - 96
    assert [text["name"] for text in found["texts"]] == [
        "text 1",
        f"text 1 from token {round(room / 2):,}",
        f"text 1 from token {room:,}",
    ]


def test_the_result_is_json_without_gaps():
    result = evaluate(tiny_model(), PATTERN, TEXT, tokenizer=tokenizer(), settings=QUICK).result
    assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(json.dumps(result))
    assert set(result["probes"]) == {"divergence", "perplexity", "longppl", "coverage", "recall", "cost"}
    assert set(result["left_out"]) == {"masked", "embedding"}
    cost = result["probes"]["cost"]["candidates"]
    # 2 layers of 2 heads of 8 numbers, keys and values; of 260 tokens the window and the sinks are held, and a few slots
    of_token = 2 * 2 * 8 * 2 * 4
    assert cost["dense"][0]["cache_bytes"] == 260 * of_token
    assert (11 + 1 + 2) * of_token <= cost[PATTERN][0]["cache_bytes"] <= 40 * of_token
    assert math.isfinite(result["seconds"]["of_this_run"])
