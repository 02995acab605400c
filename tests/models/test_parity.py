"""Sparse models against the stock ones of Transformers: every head, padding on both sides, train and eval."""

from __future__ import annotations

import pytest
import torch
import transformers

import sparse_hf
from tests import oracle
from tests.models.families import BATCH, HEADS, LENGTH, PADDED, VOCABULARY, dense_model, inputs

LIMIT = 2e-5
PATTERN = "window(20, 20) | first(3) | marked()"


def real_part(outputs, batch) -> dict[str, torch.Tensor]:
    """What a user reads: losses, and states and logits of real tokens."""
    real = batch["attention_mask"].bool().flatten(0, -2)
    found = {}
    for name, value in outputs.items():
        # a left-padded row pools padding
        if isinstance(value, torch.Tensor) and (name != "pooler_output" or real[:, 0].all()):
            found[name] = value[real] if value.shape[:2] == real.shape else value
    return found


def assert_same(one, other, batch):
    one, other = real_part(one, batch), real_part(other, batch)
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=LIMIT, atol=LIMIT, msg=lambda m, name=name: f"{name}: {m}"
        )


def explicit_mask(batch, marks, is_causal: bool) -> torch.Tensor:
    """The pattern's pairs as the additive 4-D mask that stock models take."""
    real = batch["attention_mask"].flatten(0, -2).bool()
    mask = oracle.dense_mask(PATTERN, LENGTH, LENGTH, real, marks=marks)
    if is_causal:
        mask = mask & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


def random_marks(rows: int) -> torch.Tensor:
    return (torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.03).long()


@pytest.mark.parametrize(("head", "side"), PADDED)
def test_dense_pattern_equals_stock(head, side):
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    assert type(sparse).__name__ == f"Sparse{head}" and type(dense).__name__ == head
    batch = inputs(head, side)
    with torch.no_grad():
        assert_same(dense(**batch), sparse(**batch), batch)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("head", "side"), PADDED)
def test_pattern_equals_stock_under_the_same_mask(head, side, mode):
    dense = dense_model(head).train(mode == "train")
    sparse = sparse_hf.sparsify(dense, PATTERN).train(mode == "train")
    batch = inputs(head, side)
    marks = random_marks(batch["attention_mask"].flatten(0, -2).shape[0])
    masked = {**batch, "attention_mask": explicit_mask(batch, marks, head.startswith("Llama"))}
    if head == "BertForMultipleChoice":
        # it flattens two-dimensional masks only, so the inner model and its head are called as it does
        flat = {k: v.flatten(0, 1) for k, v in batch.items() if v.ndim == 3}
        pooled = dense.bert(**{**flat, "attention_mask": masked["attention_mask"]}).pooler_output
        ours = sparse(**batch, global_attention_mask=marks.view(BATCH, 2, LENGTH))
        torch.testing.assert_close(ours.logits, dense.classifier(pooled).view(BATCH, 2), rtol=LIMIT, atol=LIMIT)
        return
    theirs, ours = dense(**masked), sparse(**batch, global_attention_mask=marks)
    assert_same(theirs, ours, batch)
    if theirs.get("loss") is not None:
        wanted = torch.autograd.grad(theirs.loss, list(dense.parameters()), allow_unused=True)
        found = torch.autograd.grad(ours.loss, list(sparse.parameters()), allow_unused=True)
        for one, other in zip(wanted, found, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_explicit_mask_on_a_sparse_model_is_honoured(head):
    dense = dense_model(head)
    batch = inputs(head)
    masked = {**batch, "attention_mask": explicit_mask(batch, None, head.startswith("Llama"))}
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    assert_same(dense(**masked), sparse(**masked), batch)
    with pytest.raises(ValueError, match="is a bias"):
        sparse(**{**masked, "attention_mask": masked["attention_mask"].clamp(min=-1)})


@pytest.mark.parametrize("head", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_checkpointing_changes_no_gradient(head):
    sparse = sparse_hf.sparsify(dense_model(head, attention_dropout=0.2) if "Llama" in head else
                                dense_model(head, attention_probs_dropout_prob=0.2), PATTERN).train()  # fmt: skip
    batch = inputs(head)

    def gradients():
        torch.manual_seed(11)
        loss = sparse(**batch).loss
        return torch.autograd.grad(loss, [p for p in sparse.parameters() if p.requires_grad], allow_unused=True)

    plain = gradients()
    sparse.gradient_checkpointing_enable() if not hasattr(sparse, "activation_checkpointing_enable") else (
        sparse.activation_checkpointing_enable()
    )
    again = gradients()
    assert any(g is not None and g.abs().sum() > 0 for g in plain)
    for one, other in zip(plain, again, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_compiled_as_one_graph(head):
    sparse = sparse_hf.sparsify(dense_model(head), PATTERN)
    batch = inputs(head)
    eager = sparse(**batch)
    wanted = torch.autograd.grad(eager.loss, list(sparse.parameters()), allow_unused=True)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")(**batch)
    assert_same(eager, compiled, batch)
    found = torch.autograd.grad(compiled.loss, list(sparse.parameters()), allow_unused=True)
    for one, other in zip(wanted, found, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded_by_the_auto_class(head, tmp_path):
    sparse = sparse_hf.sparsify(dense_model(head), PATTERN, layers="0=dense", global_token_ids=[5])
    sparse.save_pretrained(tmp_path)
    auto = "AutoModel" + head.removeprefix("Bert").removeprefix("Llama").removeprefix("Model")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is type(sparse) and loaded.config._attn_implementation == "sparse"
    assert loaded.config.sparse_attention["patterns"] == {"dense": "window(None, None)", "sparse": PATTERN}
    batch = inputs(head)
    with torch.no_grad():
        assert_same(sparse(**batch), loaded.eval()(**batch), batch)


def test_weights_are_shared_and_the_dense_model_is_untouched():
    dense = dense_model("LlamaForCausalLM")
    before = dense(**inputs("LlamaForCausalLM")).logits
    sparse = sparse_hf.sparsify(dense, "window(3, 0)")
    assert all(a is b for a, b in zip(dense.parameters(), sparse.parameters(), strict=True))
    assert sparse.lm_head.weight is dense.lm_head.weight and type(sparse.model).__name__ == "SparseLlamaModel"
    assert type(dense.model).__name__ == "LlamaModel" and dense.config._attn_implementation == "sdpa"
    torch.testing.assert_close(dense(**inputs("LlamaForCausalLM")).logits, before)


def test_token_ids_mark_what_the_mask_marks():
    dense = dense_model("BertModel")
    batch = inputs("BertModel")
    by_id = sparse_hf.sparsify(dense, "window(5, 5) | marked()", global_token_ids=[7, 8])
    by_mask = sparse_hf.sparsify(dense, "window(5, 5) | marked()")
    marks = torch.isin(batch["input_ids"], torch.tensor([7, 8])).long()
    assert marks.any()
    assert_same(by_id(**batch), by_mask(**batch, global_attention_mask=marks), batch)
    plain = by_mask(**batch).last_hidden_state
    assert not torch.allclose(plain, by_id(**batch).last_hidden_state, atol=1e-4)


def test_stock_names_never_make_it_dense(tmp_path):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(3, 0)")
    batch = inputs("LlamaForCausalLM")
    wanted = sparse(**batch)
    sparse.save_pretrained(tmp_path)
    for name, meaning in {"sdpa": "sparse", "eager": "sparse_reference"}.items():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert loaded.config._attn_implementation == meaning
        assert_same(wanted, loaded(**batch), batch)
        sparse.set_attn_implementation(name)
        sparse.model.set_attn_implementation(name)
        assert sparse.config._attn_implementation == meaning
        assert_same(wanted, sparse(**batch), batch)
    for name in ("flex_attention", "flash_attention_2"):
        with pytest.raises(ValueError, match="the sparse ones are sparse, sparse_reference"):
            sparse.set_attn_implementation(name)


def test_attention_weights_come_from_the_reference_only():
    sparse = sparse_hf.sparsify(dense_model("BertModel"), "window(3, 3)")
    batch = inputs("BertModel")
    with pytest.raises(ValueError, match="attn_implementation='sparse_reference'"):
        sparse(**batch, output_attentions=True)
    sparse.set_attn_implementation("sparse_reference")
    weights = sparse(**batch, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (BATCH, 4, LENGTH, LENGTH)
    torch.testing.assert_close(weights[0][1].sum(-1), torch.ones(4, LENGTH))
    assert (weights[0][1, :, 0, 4:] == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, b: m(**b, global_attention_mask=torch.ones_like(b["input_ids"])), ValueError, r"add `\| marked\(\)`"),
        (lambda m, b: sparse_hf.sparsify(m, "windw(1, 0)"), ValueError, "unknown word 'windw'"),
        (lambda m, b: sparse_hf.sparsify(m, "window(1, 0)", layers="0-9=dense"), ValueError, "which has layers 0-1"),
        (lambda m, b: sparse_hf.sparsify(m, "window(1, 0)", layers=["first(1)"]), ValueError, "has 1 patterns; the model has 2"),
        (lambda m, b: sparse_hf.sparsify(m, "per_head(first(1), first(2))"), ValueError, "names 2 patterns; the model has 4 heads"),
        (lambda m, b: sparse_hf.sparsify(m, "first(1)", global_token_ids=[3]), ValueError, r"no pattern has marked\(\)"),
        (lambda m, b: sparse_hf.SparseLlamaConfig(sparse_attention={"later": 1}), ValueError, "A newer sparse_hf"),
        (lambda m, b: sparse_hf.SparseLlamaConfig(num_hidden_layers=2, sparse_attention={"patterns": {}, "layers": ["x"]}),
         ValueError, "has 1 entries; the model has 2 layers"),
        (lambda m, b: sparse_hf.SparseLlamaConfig(num_hidden_layers=1, sparse_attention={"patterns": {}, "layers": ["x"]}),
         ValueError, r"names \['x'\]; the patterns are \[\]"),
        (lambda m, b: sparse_hf.sparsify(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)), "first(1)"),
         ValueError, "'gpt2' has no sparse counterpart; supported are bert, llama"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(3, 0)")
    with pytest.raises(error, match=message):
        call(sparse, inputs("LlamaForCausalLM"))


def test_vocabulary_is_of_the_expected_size():
    # a wrong test table would compare nothing
    assert inputs("BertModel")["input_ids"].max() < VOCABULARY
