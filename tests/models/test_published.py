"""What every family must do, of those that are sparse by themselves, with the pattern that their configuration implies."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import sparse_hf
from tests.crosses import sampled
from tests.models import bigbirds, families, longformers

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
@pytest.mark.parametrize("head", sampled(HEADS[2:3], HEADS))
def test_compiled_as_one_graph(head):
    torch._dynamo.reset()
    model, batch = sparse_model(head), inputs(head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients(compiled, batch), gradients(model, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", sampled(HEADS[1:2], HEADS))
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


# where embeddings of words are, and what a checkpoint holds beside them; Reformer's and Perceiver's have tests of their own
@pytest.mark.parametrize("count", [103, 90])
@pytest.mark.parametrize("head", [*HEADS, "LongformerForTokenClassification"])
def test_resized_and_saved(head, count, tmp_path):
    model, batch = sparse_model(head), inputs(head, labels=False)
    batch["input_ids"] = batch["input_ids"].clamp(max=89)
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = batch["decoder_input_ids"].clamp(max=89)
    before = model(**batch).logits
    model.resize_token_embeddings(count)
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()(**batch).logits
    assert torch.equal(found, model(**batch).logits)
    shared = min(found.shape[-1], before.shape[-1])
    torch.testing.assert_close(found[..., :shared], before[..., :shared])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_loaded_in_half_precision(head, dtype, tmp_path):
    sparse_model(head).save_pretrained(tmp_path)
    auto = transformers.AutoModelForMaskedLM if "Masked" in head else transformers.AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded(**inputs(head, labels=False)).logits.dtype == dtype


@pytest.mark.parametrize("head", HEADS)
def test_trains_under_another_default_dtype(head):
    rates = {"attention_dropout": 0.1} if "Generation" in head else {"attention_probs_dropout_prob": 0.1}
    model = sparse_model(head, **rates).train()
    torch.set_default_dtype(torch.float64)
    try:
        loss = model(**inputs(head)).loss
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32 and loss.isfinite()


# decoders with a table of positions, alone and behind an encoder -> tokens that they have rows for
TABLES = {
    "LEDForConditionalGeneration": (lambda: longformers.stock_model("LEDForConditionalGeneration"), 64),
    "BigBirdPegasusForConditionalGeneration": (None, 512),
    "BartForConditionalGeneration": (None, 40),
    "MBartForConditionalGeneration": (None, 40),
    "PegasusForConditionalGeneration": (None, 40),
    "GPT2LMHeadModel": (None, 40),
    "OPTForCausalLM": (None, 40),
}
LIMITS = {"GPT2LMHeadModel": "n_positions"}


def limited(head: str):
    make, most = TABLES[head]
    if make is not None:
        return sparse_hf.sparsify(make(), **families.pattern_layers(head)), most
    if head.startswith("BigBird"):
        return sparse_model(head), sparse_model(head).config.max_position_embeddings
    stock = families.dense_model(head, **{LIMITS.get(head, "max_position_embeddings"): most})
    return sparse_hf.sparsify(stock, "window(9, 0)"), most


@pytest.mark.cross
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("head", [head for head in TABLES if not head.startswith("BigBird")])
def test_generating_ends_with_the_table_of_positions(head, padded):
    """With a cache the model sees one token at a time, and torch would find no row for it."""
    model, most = limited(head)
    ids = torch.randint(4, 90, (2, 20))
    real = torch.ones_like(ids)
    real[0, :5] = 1 - int(padded)
    batch = {"input_ids": ids * real + model.config.pad_token_id * (1 - real), "attention_mask": real}
    begun = 1 if model.config.is_encoder_decoder else 20
    options = {"do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    found = model.generate(**batch, max_new_tokens=most - begun, min_new_tokens=most - begun, **options)
    assert found.shape[1] == most
    with pytest.raises(ValueError, match="position"):
        model.generate(**batch, max_new_tokens=most + 9, min_new_tokens=most + 9, **options)


@pytest.mark.parametrize("head", [head for head in TABLES if head.endswith("ForConditionalGeneration")])
def test_targets_end_with_the_table_of_positions(head):
    model, most = limited(head)
    text = torch.randint(4, 90, (1, 12))
    long = torch.randint(4, 90, (1, most + 1))
    message = f"a target has {most + 1} tokens; .* has positions for {most} in its decoder"
    for name in ("labels", "decoder_input_ids"):
        with pytest.raises(ValueError, match=message):
            model(text, **{name: long})
    states = torch.zeros(1, most + 1, model.config.d_model)
    with pytest.raises(ValueError, match=message):
        model(text, decoder_inputs_embeds=states)
    assert model(text, labels=long[:, :9]).loss.isfinite()


@pytest.mark.parametrize("head", ["LEDModel", "LEDForQuestionAnswering"])
def test_a_text_that_is_made_a_target_must_fit(head):
    """Without decoder ids they are made of the text, for which the encoder has more positions."""
    model = sparse_hf.sparsify(longformers.stock_model(head))
    with pytest.raises(
        ValueError, match="no decoder_input_ids are given, so that they are made of the text, which has 100"
    ):
        model(torch.randint(4, 90, (2, 100)))
    assert model(torch.randint(4, 90, (2, 60)))[0].isfinite().all()


@pytest.mark.parametrize(
    "head",
    ["BertModel", "ElectraModel", "RobertaModel", "BigBirdModel", "LongformerModel", "AlbertModel", "GPT2LMHeadModel"],
)
def test_token_types_are_those_of_the_configuration(head):
    if head == "LongformerModel":
        model = sparse_hf.sparsify(longformers.stock_model(head, type_vocab_size=1))
    else:
        pattern = None if head.startswith("BigBird") else "window(9, 9)"
        model = sparse_hf.sparsify(families.dense_model(head), pattern)
    # GPT-2 looks types up in the table of ids
    count = model.config.vocab_size if head.startswith("GPT2") else model.config.type_vocab_size
    ids = torch.randint(4, 90, (2, 20))
    model(ids, token_type_ids=torch.full_like(ids, count - 1))
    for value in (count, -1):
        with pytest.raises(ValueError, match=f"token_type_ids hold {value}; .* has the types 0 to {count - 1}"):
            model(ids, token_type_ids=torch.full_like(ids, value))


@pytest.mark.parametrize("head", [head for head in HEADS if head.endswith("ForConditionalGeneration")])
def test_ids_of_the_target_are_those_of_the_vocabulary(head):
    model, batch = sparse_model(head), inputs(head, labels=False)
    batch["decoder_input_ids"][0, 3] = model.config.vocab_size
    with pytest.raises(ValueError, match="decoder_input_ids hold"):
        model(**batch)
