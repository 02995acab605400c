"""sparse_perceiver against Transformers' own classes and against the definition."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.models.hf.config import IMPLEMENTATIONS
from sparse_hf.models.perceiver.cross_attention import attend_across, attend_across_with_weights
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.crosses import sampled, slow_but_for
from tests.models.perceivers import (
    COMPOSED,
    HEADS,
    KINDS,
    OUTPUTS,
    POSITIONS,
    SIDES,
    TEXTS,
    VOCABULARY,
    answers,
    as_double,
    assert_as_exact,
    draw,
    for_stock,
    inputs,
    stock_model,
)

DRAWS = [pytest.param(seed, marks=() if seed < 27 else pytest.mark.slow) for seed in range(225)]
TRAINED = ["PerceiverForMaskedLM", "PerceiverForSequenceClassification"]
WITH_LOSS = [
    head for head in HEADS if head not in ("PerceiverModel", "PerceiverForOpticalFlow") and "Multi" not in head
]


@pytest.mark.parametrize("seed", DRAWS)
def test_equals_stock(seed):
    case = draw(seed)
    stock = stock_model(case.kind, seed, **case.sizes)
    ours = sparse_hf.sparsify(stock)
    assert type(ours).__name__ == f"Sparse{type(stock).__name__}"
    batch = inputs(case.kind, case.length, case.batch, case.side, seed)
    theirs = for_stock(case.kind, batch)
    exact = answers(copy.deepcopy(stock).double(), as_double(theirs))
    assert_as_exact(exact, answers(stock, theirs), answers(ours, batch))


@pytest.mark.cross
@pytest.mark.parametrize("pattern", ["window(2, 2)", "chunk(4, 0, 0) | first(1)", "per_head(window(1, 4), stride(3))"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_attend_by_their_pattern(kind, pattern, monkeypatch):
    ours = sparse_hf.sparsify(stock_model(kind), pattern, layers="1=window(3, 3)").double()
    batch = as_double(inputs(kind))
    found = answers(ours, batch)
    called = []

    def defined(config, qkv, text, batch, *, dropout, wants_weights):
        called.append(text)
        length = qkv[0].shape[2]
        return oracle.attention(*qkv, oracle.dense_mask(text, length, length))[0], None

    monkeypatch.setattr("sparse_hf.models.perceiver.modeling.attend_by_pattern", defined)
    for name, wanted in answers(ours, batch).items():
        torch.testing.assert_close(found[name], wanted, msg=lambda m, name=name: f"{name}: {m}")
    # two blocks of the same two layers
    assert called == [pattern, "window(3, 3)"] * 2


def test_logits_are_the_first_rows_of_stock():
    stock = stock_model("PerceiverForMaskedLM")
    ours = sparse_hf.sparsify(stock)
    for length in (1, 37, POSITIONS):
        ids = inputs("PerceiverForMaskedLM", length)["input_ids"]
        found, wanted = ours(ids).logits, stock(ids).logits
        assert found.shape[1] == length and wanted.shape[1] == POSITIONS
        torch.testing.assert_close(found, wanted[:, :length], rtol=1e-5, atol=1e-5)
    # another decoder's queries are no tokens of the input, and stay as many as they are
    assert sparse_hf.sparsify(stock_model(COMPOSED))(**inputs(COMPOSED, 3)).logits.shape[1] == OUTPUTS


def test_padding_changes_nothing():
    ours = sparse_hf.sparsify(stock_model("PerceiverForMaskedLM"))
    batch = inputs("PerceiverForMaskedLM", 40)
    batch["attention_mask"] = (torch.arange(40) < 29).long().expand(2, -1)
    short = ours(batch["input_ids"][:, :29]).logits
    torch.testing.assert_close(ours(**batch).logits[:, :29], short, rtol=1e-5, atol=1e-5)
    # a row of nothing but padding is finite, forward and backward
    batch["attention_mask"] = torch.tensor([[0], [1]]).expand(2, 40)
    assert all(value.isfinite().all() for value in answers(ours, batch).values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("queries, keys", [(40, 777), (300, 50), (1, 1), (130, 129)])
def test_cross_attention_equals_its_definition(queries, keys, dropout, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((queries, 8), (keys, 8), (keys, 12)))
    real = torch.rand(2, keys) < 0.7
    real[0] = False
    for mask in (None, real):
        found = attend_across(q, k, v, mask, dropout)
        wanted = attend_across_with_weights(q, k, v, mask)[0]
        if not dropout:
            torch.testing.assert_close(found, wanted)
        elif keys > 1:
            means = [attend_across(q, k, v, mask, dropout) for _ in range(60)]
            assert (torch.stack(means).mean(0) - wanted).abs().mean() < 0.1 * v.abs().mean()
            assert not torch.equal(means[0], means[1])


# no dimension of the models, and no number of blocks, is one of these
LATENTS, INPUTS = 150, 16_500


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head", TRAINED)
def test_no_tensor_has_two_lengths(head, dropout):
    changes = {"num_latents": LATENTS, "max_position_embeddings": INPUTS, "attention_probs_dropout_prob": dropout}
    ours = sparse_hf.sparsify(stock_model(head, **changes)).train()
    batch = inputs(head, INPUTS, 1)
    with AllocationInterceptor((INPUTS, LATENTS)) as seen:
        ours(**batch).loss.backward()
    assert not seen.quadratic and seen.calls > 300


@pytest.mark.parametrize("head", ["PerceiverForOpticalFlow", "PerceiverForImageClassificationFourier"])
def test_images_make_no_tensor_of_latents_times_pixels(head):
    # no number of blocks is a number of channels
    height, width = 100, 170
    ours = sparse_hf.sparsify(stock_model(head, num_latents=LATENTS, train_size=(height, width)))
    flow = "Flow" in head
    images = torch.randn(1, 2, 27, height, width) if flow else torch.randn(1, 3, height, width)
    with AllocationInterceptor((height * width, LATENTS)) as seen:
        ours(images).logits.sum().backward()
    assert not seen.quadratic


@pytest.mark.compiles
@pytest.mark.parametrize("kind", slow_but_for(TEXTS, KINDS, sample=TEXTS[:1]))
def test_compiled(kind):
    torch._dynamo.reset()
    ours, batch = sparse_hf.sparsify(stock_model(kind)), inputs(kind)
    # Transformers counts pixels with numpy, at which a graph ends
    whole = kind in TEXTS or kind == "PerceiverModel"
    compiled = torch.compile(ours, fullgraph=whole, backend="aot_eager")
    found = compiled(**batch)
    wanted = ours(**batch)
    loss = "logits" if wanted.get("loss") is None else "loss"
    if isinstance(wanted.get(loss), torch.Tensor):
        torch.testing.assert_close(found[loss], wanted[loss], rtol=1e-4, atol=1e-5)
        found[loss].sum().backward()
    torch.testing.assert_close(found.get("last_hidden_state"), wanted.get("last_hidden_state"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sampled(KINDS[::3], KINDS))
def test_exported(kind):
    ours = sparse_hf.sparsify(stock_model(kind))
    batch = {name: value for name, value in inputs(kind).items() if name != "labels"}
    program = torch.export.export(ours, (), batch, strict=False)
    with torch.no_grad():
        found, wanted = program.module()(**batch), ours(**batch)
    name = "last_hidden_state" if kind == "PerceiverModel" else "logits"
    torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("head", WITH_LOSS)
def test_checkpointing_changes_no_gradient(head):
    ours = sparse_hf.sparsify(stock_model(head, attention_probs_dropout_prob=0.3)).train()
    batch = inputs(head)

    def gradients():
        torch.manual_seed(11)
        return torch.autograd.grad(ours(**batch).loss, list(ours.parameters()))

    plain = gradients()
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    assert any(getattr(module, "gradient_checkpointing", False) for module in ours.modules())
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(ours(**batch).loss, ours(**batch).loss)


@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_load_unchanged(head, tmp_path):
    stock, batch = stock_model(head), inputs(head)
    stock.save_pretrained(tmp_path / "stock")
    sparse = getattr(sparse_hf, f"Sparse{head}")
    loaded, told = sparse.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    sparse_hf.convert(tmp_path / "stock", tmp_path / "sparse", progress=False)
    converted = sparse.from_pretrained(tmp_path / "sparse")
    assert converted.config.sparse_attention == sparse_hf.sparsify(stock).config.sparse_attention
    assert set(converted.state_dict()) == set(stock.state_dict())
    wanted = answers(sparse_hf.sparsify(stock), batch)
    for model in (loaded, converted):
        for name, value in answers(model.eval(), batch).items():
            torch.testing.assert_close(value, wanted[name])


@pytest.mark.parametrize("head", HEADS)
def test_auto_classes_find_the_head(head, tmp_path):
    sparse_hf.sparsify(stock_model(head)).save_pretrained(tmp_path)
    autos = {
        "Model": transformers.AutoModel,
        "MaskedLM": transformers.AutoModelForMaskedLM,
        "SequenceClassification": transformers.AutoModelForSequenceClassification,
    }
    auto = next((a for end, a in autos.items() if head.endswith(end)), None)
    if "Image" in head:
        auto = transformers.AutoModelForImageClassification
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert config.auto_map["AutoModelForImageClassification"].endswith(f".Sparse{head}")
    if auto is None:
        pytest.skip("Transformers has no Auto class for it")
    assert type(auto.from_pretrained(tmp_path)).__name__ == f"Sparse{head}"


@pytest.mark.parametrize("head", TRAINED)
def test_positions_grow(head, tmp_path):
    stock = stock_model(head)
    stock.save_pretrained(tmp_path / "stock")
    sparse_hf.convert(tmp_path / "stock", tmp_path / "sparse", max_length=400, progress=False)
    ours = getattr(sparse_hf, f"Sparse{head}").from_pretrained(tmp_path / "sparse").eval()
    assert ours.config.max_position_embeddings == 400
    assert ours(**inputs(head, 400)).loss.isfinite()
    batch = inputs(head, 50)
    torch.testing.assert_close(ours(**batch).loss, sparse_hf.sparsify(stock)(**batch).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("head", TRAINED)
def test_half_precision(head, dropout, dtype):
    stock, batch = stock_model(head, attention_probs_dropout_prob=dropout), inputs(head)
    exact = sparse_hf.sparsify(stock).double()(**batch).logits
    # rounded weights, and as many roundings as there are products on the way
    limit = 60 * torch.finfo(dtype).eps * exact.abs().max()
    ours = sparse_hf.sparsify(stock.to(dtype))
    logits = ours(**batch).logits
    assert logits.dtype == dtype and (logits.double() - exact).abs().max() < limit
    ours.train()(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_sticky(kind):
    ours, batch = sparse_hf.sparsify(stock_model(kind)), inputs(kind)
    ours.config.problem_type = "single_label_classification"

    def everything():
        plain = {n: {k: v for k, v in vars(m).items() if not k.startswith("_")} for n, m in ours.named_modules()}
        return copy.deepcopy((ours.config.to_dict(), {n: {k: repr(v) for k, v in d.items()} for n, d in plain.items()}))

    before = everything()
    first = answers(ours, batch)
    for side in SIDES:
        answers(ours, inputs(kind, 7, 1, side))
    assert everything() == before
    for name, value in answers(ours, batch).items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_weights_come_from_the_reference_only(kind):
    stock, batch = stock_model(kind), inputs(kind)
    ours = sparse_hf.sparsify(stock)
    with pytest.raises(ValueError, match="attn_implementation='sparse_reference'"):
        ours(**batch, output_attentions=True)
    ours.set_attn_implementation("sparse_reference")
    stock.set_attn_implementation("eager")
    found, wanted = (m(**b, output_attentions=True) for m, b in ((ours, batch), (stock, for_stock(kind, batch))))
    assert len(found.attentions) == len(wanted.attentions) == 4
    assert len(found.cross_attentions) == len(wanted.cross_attentions) == (1 if kind == "PerceiverModel" else 2)
    for name in ("attentions", "cross_attentions"):
        for one, other in zip(found[name], wanted[name], strict=True):
            torch.testing.assert_close(one, other[:, :, : one.shape[2]], rtol=1e-4, atol=1e-5)
    # a mask of pairs, and none
    sparse = sparse_hf.sparsify(stock, "window(2, 2)")
    sparse.set_attn_implementation("sparse_reference")
    seen = sparse(**batch, output_attentions=True).attentions[0][0, 0] > 0
    place = torch.arange(13)
    assert torch.equal(seen, (place - place[:, None]).abs() <= 2)


@pytest.mark.parametrize("head", WITH_LOSS)
def test_loss_is_the_share_of_all_labels(head):
    ours, batch = sparse_hf.sparsify(stock_model(head)), inputs(head)
    plain = ours(**batch).loss
    torch.testing.assert_close(ours(**batch, num_items_in_batch=2 * batch["labels"].numel()).loss, plain / 2)


@pytest.mark.parametrize("head", TRAINED)
def test_trainer_trains(head, tmp_path):
    ours = sparse_hf.sparsify(stock_model(head, attention_probs_dropout_prob=0.1))
    # texts of one length, below the table's: the stock class fails on their labels
    batch = inputs(head, 29, 8, "none")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4,
        learning_rate=3e-3, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, **{checkpointing: True},
    )  # fmt: skip
    trainer = transformers.Trainer(ours, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("count", [105, 90])
@pytest.mark.parametrize("kind", TEXTS)
def test_vocabulary_grows_and_shrinks(kind, count, tmp_path):
    """Transformers looks for latents where words are, and fails."""
    stock, batch = stock_model(kind), inputs(kind)
    name = "inputs" if "inputs" in batch else "input_ids"
    batch = {k: v if v.is_floating_point() else v.clamp(max=89) for k, v in batch.items()}
    ours = sparse_hf.sparsify(stock)
    wanted = sparse_hf.sparsify(stock)(**batch)[0 if "labels" not in batch else 1]
    words = ours.resize_token_embeddings(count)
    found = ours(**batch)[0 if "labels" not in batch else 1]
    shared = min(count, found.shape[-1]) if kind == "PerceiverForMaskedLM" else found.shape[-1]
    torch.testing.assert_close(found[..., : min(shared, VOCABULARY)], wanted[..., : min(shared, VOCABULARY)])
    assert words.num_embeddings == ours.config.vocab_size == count
    if kind != "PerceiverForMaskedLM":
        return
    assert found.shape[-1] == count
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, ours(**batch).logits)
    batch[name][0, 0] = count - 1
    assert ours(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TEXTS])
def test_what_reads_no_text_has_no_vocabulary(kind):
    with pytest.raises(NotImplementedError, match="reads no text here"):
        sparse_hf.sparsify(stock_model(kind)).resize_token_embeddings(105)


def _forward(head: str, **changes):
    return lambda: sparse_hf.sparsify(stock_model(head))(**{**inputs(head), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_forward("PerceiverForMaskedLM", input_ids=torch.ones(1, 65, dtype=torch.long)), "65 tokens; the table of positions has 64"),
        (_forward("PerceiverForMaskedLM", input_ids=torch.full((2, 9), 97)), "input_ids hold 97; the vocabulary is 0 to 96"),
        (_forward("PerceiverModel", attention_mask=torch.ones(2, 36)), r"attention_mask has shape \(2, 36\)"),
        (_forward("PerceiverModel", attention_mask=torch.ones(2, 1, 13, 37)), r"attention_mask has shape \(2, 1, 13, 37\)"),
        (_forward("PerceiverModel", global_attention_mask=torch.ones(2, 37)), "latents, of which .* are no tokens"),
        (lambda: sparse_hf.sparsify(stock_model("PerceiverModel"), "window(2, 2) | marked()"), "are no tokens"),
        (lambda: sparse_hf.sparsify(stock_model("PerceiverModel"), "window(2, 2)", global_token_ids=[3]), "are no tokens"),
        (lambda: sparse_hf.sparsify(stock_model("PerceiverModel"), "window(5, 0) | first(2) & window(None, 0)"), "is causal"),
        (lambda: sparse_hf.sparsify(stock_model("PerceiverModel"), "per_head(window(2, 2), window(3, 0))"), "is causal"),
        (lambda: sparse_hf.sparsify(stock_model("PerceiverModel"), "window(2, 2)", layers="2=dense"), "outside the model"),
        (lambda: sparse_hf.sparsify(stock_model("PerceiverModel"), layers={"decoder": "window(2, 2)"}), "one stack of layers"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_family_is_found_by_name():
    assert sparse_hf.family_of("perceiver").implies_pattern and len(HEADS) == 8
    assert IMPLEMENTATIONS["sparse"] == "auto"
