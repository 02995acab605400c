"""What every family must do, of those that are sparse by themselves, with the pattern that their configuration implies."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import sparse_hf
from tests.models import bigbirds, longformers

HEADS = (
    "LongformerForMaskedLM",
    "LEDForConditionalGeneration",
    "BigBirdForMaskedLM",
    "BigBirdPegasusForConditionalGeneration",
)
LENGTH = 75


def sparse_model(head: str, **changes):
    if "BigBird" in head:
        values = {"block_size": 4, "num_random_blocks": 2, **changes}
        return sparse_hf.sparsify(bigbirds.Case(bigbirds.HEADS[head], 0, head, **values).stock).eval()
    return sparse_hf.sparsify(longformers.stock_model(head, **changes))


def inputs(head: str, length: int = LENGTH, labels: bool = True) -> dict[str, torch.Tensor]:
    """A row padded on the right, a few marked tokens, and labels everywhere but on padding."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(longformers.SEPARATOR + 1, longformers.VOCABULARY, (2, length), generator=generator)
    real = torch.ones_like(ids)
    real[0, -length // 3 :] = 0
    marks = torch.zeros_like(ids)
    marks[:, [0, length // 4]] = 1
    batch = {"input_ids": ids * real + (1 - real), "attention_mask": real, "global_attention_mask": marks}
    if head.endswith("ForConditionalGeneration"):
        target = torch.randint(4, longformers.VOCABULARY, (2, 11), generator=generator)
        return batch | ({"labels": target} if labels else {"decoder_input_ids": target, "use_cache": False})
    return batch | ({"labels": ids.masked_fill(real == 0, -100)} if labels else {})


def gradients(model, batch) -> list[torch.Tensor]:
    grads = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("head", HEADS)
def test_checkpointing_changes_no_gradient(head):
    rates = {"attention_dropout": 0.3} if "Generation" in head else {"attention_probs_dropout_prob": 0.3}
    model, batch = sparse_model(head, **rates).train(), inputs(head)

    def drawn():
        torch.manual_seed(11)
        return gradients(model, batch)

    plain = drawn()
    # stock BigBird says that it supports none, though its layers do
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for one, other in zip(plain, drawn(), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(model(**batch).loss, model(**batch).loss)


@pytest.mark.compiles
@pytest.mark.parametrize("head", HEADS)
def test_compiled_as_one_graph(head):
    torch._dynamo.reset()
    model, batch = sparse_model(head), inputs(head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients(compiled, batch), gradients(model, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_exported_with_a_free_length(head, tmp_path):
    model, batch = sparse_model(head), inputs(head, labels=False)
    length = torch.export.Dim("length", min=2, max=200)
    of_text = ("input_ids", "attention_mask", "global_attention_mask")
    shapes = {name: {1: length} if name in of_text else None for name in batch}
    with torch.no_grad():
        program = torch.export.export(model, (), batch, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for given in (batch, inputs(head, 32, labels=False), inputs(head, 141, labels=False)):
            torch.testing.assert_close(loaded(**given)[0], model(**given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded(head, tmp_path):
    model, batch = sparse_model(head), inputs(head)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForMaskedLM if "Masked" in head else transformers.AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.config.sparse_attention == model.config.sparse_attention
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_forward_and_backward(head, dtype):
    # weights that the half type holds, so that what differs are the roundings on the way
    exact = sparse_model(head).to(dtype).double()
    half, batch = copy.deepcopy(exact).to(dtype), inputs(head)
    found, wanted = half(**batch), exact(**batch)
    assert found.logits.dtype == dtype and found.logits.isfinite().all()
    real = batch["attention_mask"].bool()
    logits = (t[real] if t.shape[:2] == real.shape else t for t in (found.logits, wanted.logits))
    assert_near(*logits, 40 * torch.finfo(dtype).eps)
    # all of them together: those of a key's bias are zero but for roundings
    found, wanted = (torch.cat([g.flatten() for g in gradients(model, batch)]) for model in (half, exact))
    assert found.isfinite().all()
    assert_near(found, wanted, 40 * torch.finfo(dtype).eps)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    """Off by no more than this share of the length of the whole."""
    assert (found.double() - wanted).norm() <= share * wanted.norm()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("head", [head for head in HEADS if head.endswith("ForConditionalGeneration")])
def test_generates_the_same_with_a_cache_and_without(head, beams):
    model, batch = sparse_model(head), inputs(head)
    del batch["labels"]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": beams, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))
