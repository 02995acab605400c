"""sparse_longformer and sparse_led against Transformers' own classes and against the definition."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.models.hf import joined
from sparse_hf.models.longformer import global_rows
from sparse_hf.models.longformer.global_rows import GlobalRowsMixin
from sparse_hf.models.longformer.halves import halves
from sparse_hf.testing import AllocationInterceptor
from tests.crosses import slow_but_for
from tests.models.longformers import (
    HEADS,
    TARGET,
    VOCABULARY,
    Free,
    Operations,
    answers,
    draw,
    inputs,
    specification,
    stock_model,
)

# ours may err this many times as much as the stock class in float32 does, against the stock class in float64, plus roundings
SLACK, ROUNDING = 4, 2e-6
ALL_HEADS = [head for heads in HEADS.values() for head in heads]
TRAINED = ["LongformerForMaskedLM", "LEDForConditionalGeneration"]
DRAWS = [pytest.param(seed, marks=() if seed < 24 else pytest.mark.slow) for seed in range(224)]


def assert_as_exact(exact: dict, stock: dict, ours: dict):
    assert ours.keys() == stock.keys() and len(ours) > 10
    for name, right in exact.items():
        scale = right.abs().max().clamp(min=1)
        error, allowed = ((t[name].double() - right).abs().max() / scale for t in (ours, stock))
        assert error <= SLACK * allowed + ROUNDING, f"{name} errs by {error:.1e}, the stock class by {allowed:.1e}"


@pytest.mark.parametrize("seed", DRAWS)
@pytest.mark.parametrize("family", HEADS)
def test_equals_stock(family, seed, monkeypatch):
    case = draw(family, seed)
    stock = stock_model(case.head, case.windows, seed)
    ours = sparse_hf.sparsify(stock)
    assert type(ours).__name__ == f"Sparse{case.head}" and type(stock).__name__ == case.head
    batch = inputs(case.head, case.length, case.batch, case.side, case.marks, seed)
    found, plain = answers(ours, batch), answers(stock, batch)
    # the stock class casts its scores to float32, in which those of masked pairs in float64 are infinite: NaN gradients
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
    assert_as_exact(answers(copy.deepcopy(stock).double(), batch), plain, found)


PATTERNS = {
    "causal": "window(9, 0)",
    "causal, all that is marked": "(window(9, 0) | marked()) & window(None, 0)",
    "dilated": "window(12, 12) & stride(3) | marked()",
    "dilated per head": "per_head(window(4, 4) | marked(), window(8, 8) & stride(2) | marked(), "
    "window(12, 0) & stride(3) | marked(), (window(12, 0) | marked()) & window(None, 0))",
    "by position": "first(3) | chunk(16) | marked()",
    "keys only": "window(5, 5) | marked_keys()",
    "queries only": "window(5, 5) | marked_queries()",
    "dense": "window(None, None)",
}


@pytest.mark.cross
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("head", TRAINED)
def test_any_pattern_equals_the_definition(head, name, side, monkeypatch):
    pattern = PATTERNS[name]
    layers = {"decoder": "window(5, 0)"} if head.startswith("LED") else None
    ours = sparse_hf.sparsify(stock_model(head), pattern, layers=layers).double()
    batch = inputs(head, 77, 2, side, "few" if ours.config.uses_marks else "default")
    found = answers(ours, batch)
    monkeypatch.setattr(GlobalRowsMixin, "forward", specification)
    for key, wanted in answers(ours, batch).items():
        torch.testing.assert_close(found[key], wanted, msg=lambda m, key=key: f"{key}: {m}")


def test_halves_of_a_pattern():
    assert halves("window(2, 2) | marked()") == ("window(2, 2) | marked_keys()", "marked_queries()")
    assert halves("marked_queries() | window(2, 2)") == ("first(0) | window(2, 2)", "marked_queries()")
    assert halves("window(2, 2) | marked_keys()") == ("window(2, 2) | marked_keys()", None)
    cut = "(window(2, 2) | marked()) & window(None, 0)"
    assert halves(cut) == (cut.replace("marked", "marked_keys"), f"{cut} & marked_queries()")


@pytest.mark.parametrize("length", [4_352, pytest.param(12_928, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", TRAINED)
def test_no_tensor_has_two_lengths(head, length):
    positions = (
        {"max_encoder_position_embeddings": 13_000} if head.startswith("LED") else {"max_position_embeddings": 13_002}
    )
    model = stock_model(head, (128, 64))
    ours = sparse_hf.sparsify(type(model)(type(model.config)(**{**model.config.to_dict(), **positions}))).train()
    batch = inputs(head, length, 1, "right", "default")
    # one global token in each of a few blocks, and a question
    marks = torch.arange(length) % 1_500 == 7
    batch["global_attention_mask"] = (marks | (torch.arange(length) < 20))[None].long()
    with AllocationInterceptor(length) as seen:
        ours(**batch).loss.backward()
    assert not seen.quadratic and seen.calls > 1_000


# heads that mark by themselves and those that are trained without marks, in the fast suite; one of each in `make test`
SAMPLE = [("LongformerForQuestionAnswering", "default"), ("LEDForConditionalGeneration", "few")]
QUICK = [*SAMPLE, ("LongformerForMultipleChoice", "default"), ("LongformerForMaskedLM", "few")]
CASES = [(head, marks) for head in ALL_HEADS for marks in ("default", "few")]


@pytest.mark.compiles
@pytest.mark.parametrize(("head", "marks"), slow_but_for(QUICK, CASES, SAMPLE))
def test_compiled_as_one_graph(head, marks):
    torch._dynamo.reset()
    ours = sparse_hf.sparsify(stock_model(head))
    batch = inputs(head, 70, marks=marks)
    wanted = answers(ours, batch)
    found = answers(torch.compile(ours, fullgraph=True, backend="aot_eager"), batch)
    # a graph does not know whether anything is marked, so it has gradients of 0 where eager code has none
    for name, value in found.items():
        name = name.replace("_orig_mod.", "")
        torch.testing.assert_close(value, wanted.get(name, torch.zeros_like(value)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["LongformerModel", "LongformerForQuestionAnswering", "LEDModel"])
def test_exported(head):
    ours = sparse_hf.sparsify(stock_model(head))
    batch = inputs(head, 70)
    batch = {k: v for k, v in batch.items() if "positions" not in k} | ({"use_cache": False} if "LED" in head else {})
    program = torch.export.export(ours, (), batch, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**batch)[0], ours(**batch)[0])


@pytest.mark.parametrize("head", TRAINED)
def test_checkpointing_changes_no_gradient(head):
    name = "attention_dropout" if head.startswith("LED") else "attention_probs_dropout_prob"
    ours = sparse_hf.sparsify(stock_model(head, **{name: 0.3})).train()
    batch = inputs(head, 70)

    def gradients():
        torch.manual_seed(11)
        return torch.autograd.grad(ours(**batch).loss, list(ours.parameters()), allow_unused=True)

    plain = gradients()
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    for one, other in zip(plain, gradients(), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)
    assert not torch.equal(ours(**batch).loss, ours(**batch).loss)


@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_with_a_cache_without_and_as_stock(beams):
    stock = stock_model("LEDForConditionalGeneration")
    batch = {k: v for k, v in inputs("LEDForConditionalGeneration", 61).items() if k != "labels"}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": beams, "do_sample": False}
    ours = sparse_hf.sparsify(stock)
    found = ours.generate(**batch, **options)
    assert torch.equal(found, stock.generate(**batch, **options))
    assert torch.equal(found, ours.generate(**batch, **options, use_cache=False))
    near = sparse_hf.sparsify(stock, layers={"decoder": "window(2, 0) | first(1)"})
    found = near.generate(**batch, **options)
    assert torch.equal(found, near.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("head", ALL_HEADS)
def test_checkpoints_load_unchanged(head, tmp_path):
    stock, batch = stock_model(head), inputs(head, 50)
    stock.save_pretrained(tmp_path / "stock")
    sparse = getattr(sparse_hf, f"Sparse{head}")
    loaded, told = sparse.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert loaded.config.sparse_attention is None and loaded.config.layer_pattern(
        1, stack="encoder" if head.startswith("LED") else ""
    ) == ("window(4, 4) | marked()")
    sparse_hf.convert(tmp_path / "stock", tmp_path / "sparse", progress=False)
    converted = sparse.from_pretrained(tmp_path / "sparse")
    assert converted.config.sparse_attention == sparse_hf.sparsify(stock).config.sparse_attention
    with torch.no_grad():
        wanted = sparse_hf.sparsify(stock)(**batch)[0]
        for model in (loaded, converted):
            torch.testing.assert_close(model.eval()(**batch)[0], wanted)
    auto = transformers.AutoModel.from_pretrained(tmp_path / "sparse")
    assert type(auto).__name__ == ("SparseLEDModel" if head.startswith("LED") else "SparseLongformerModel")


@pytest.mark.parametrize("head", TRAINED)
def test_positions_grow(head, tmp_path):
    stock = stock_model(head)
    stock.save_pretrained(tmp_path / "stock")
    sparse_hf.convert(tmp_path / "stock", tmp_path / "sparse", max_length=400, progress=False)
    ours = getattr(sparse_hf, f"Sparse{head}").from_pretrained(tmp_path / "sparse").eval()
    config = ours.config
    if head.startswith("LED"):
        assert (config.max_encoder_position_embeddings, config.max_decoder_position_embeddings) == (400, 64)
    else:
        assert config.max_position_embeddings == 402
    assert ours(**inputs(head, 400)).loss.isfinite()
    batch = inputs(head, 90)
    torch.testing.assert_close(ours(**batch).loss, sparse_hf.sparsify(stock)(**batch).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", TRAINED)
def test_half_precision(head, dtype):
    stock, batch = stock_model(head), inputs(head, 70)
    exact = sparse_hf.sparsify(stock).double()(**batch).logits
    # rounded weights, and as many roundings as there are products on the way
    limit = 40 * torch.finfo(dtype).eps * exact.abs().max()
    logits = sparse_hf.sparsify(stock.to(dtype))(**batch).logits
    assert logits.dtype == dtype and (logits.double() - exact).abs().max() < limit


@pytest.mark.parametrize("head", ALL_HEADS)
def test_nothing_is_sticky(head):
    ours = sparse_hf.sparsify(stock_model(head))
    ours.config.problem_type = "single_label_classification"

    def everything():
        plain = {n: {k: v for k, v in vars(m).items() if not k.startswith("_")} for n, m in ours.named_modules()}
        return copy.deepcopy((ours.config.to_dict(), {n: {k: repr(v) for k, v in d.items()} for n, d in plain.items()}))

    before, batch = everything(), inputs(head, 50)
    first = ours(**batch)[0]
    ours(**inputs(head, 7, marks="none"))
    ours(**inputs(head, 90, marks="all"))
    assert everything() == before and torch.equal(ours(**batch)[0], first)


@pytest.mark.parametrize("head", TRAINED)
def test_attention_weights_come_from_the_reference_only(head):
    ours = sparse_hf.sparsify(stock_model(head))
    batch = inputs(head, 50)
    with pytest.raises(ValueError, match="attn_implementation='sparse_reference'"):
        ours(**batch, output_attentions=True)
    plain = ours(**batch)
    ours.set_attn_implementation("sparse_reference")
    outputs = ours(**batch, output_attentions=True)
    torch.testing.assert_close(outputs.logits, plain.logits, rtol=1e-4, atol=1e-5)
    weights = outputs.encoder_attentions if head.startswith("LED") else outputs.attentions
    real, marks = batch["attention_mask"].bool(), batch["global_attention_mask"].bool() & batch["attention_mask"].bool()
    assert len(weights) == 2 and weights[0].shape == (2, 4, 50, 50) and marks.any()
    torch.testing.assert_close(weights[1].sum(-1), real[:, None].expand(2, 4, 50).float())
    # a marked token sees all that is real, another one its window and what is marked
    places = torch.arange(50)
    near = (places - places[:, None]).abs() <= 8
    seen = (near | marks[:, :, None] | marks[:, None, :]) & real[:, :, None] & real[:, None, :]
    assert torch.equal(weights[0].amax(1) > 0, seen)


def test_token_ids_mark_beside_what_a_head_marks():
    stock = stock_model("LongformerForQuestionAnswering")
    batch = {k: v for k, v in inputs("LongformerForQuestionAnswering", 60, marks="default").items() if "posit" not in k}
    by_id = sparse_hf.sparsify(stock, global_token_ids=[9, 10])
    ids = batch["input_ids"]
    question = torch.arange(60) < (ids == 3).int().argmax(-1, keepdim=True)
    marks = question | torch.isin(ids, torch.tensor([9, 10]))
    assert (marks & ~question).any()
    wanted = sparse_hf.sparsify(stock)(**batch, global_attention_mask=marks.long())
    torch.testing.assert_close(by_id(**batch).start_logits, wanted.start_logits)


@pytest.mark.parametrize("head", [h for h in ALL_HEADS if not h.endswith(("Model", "QuestionAnswering"))])
def test_loss_is_the_share_of_all_labels(head):
    ours, batch = sparse_hf.sparsify(stock_model(head)), inputs(head, 50)
    plain = ours(**batch).loss
    torch.testing.assert_close(ours(**batch, num_items_in_batch=2 * batch["labels"].numel()).loss, plain / 2)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_forward_takes_its_arguments_as_stock(head):
    stock = stock_model(head)
    ours = sparse_hf.sparsify(stock)
    wanted = inspect.signature(type(stock).forward).parameters
    assert list(inspect.signature(type(ours).forward).parameters) == list(wanted)
    batch = inputs(head, 50)
    by_place = [batch.get(name) for name in list(wanted)[1:7]]
    named = {k: v for k, v in batch.items() if k not in list(wanted)[1:7]}
    torch.testing.assert_close(ours(*by_place, **named)[0], ours(**batch)[0])
    as_tuple, theirs = ours(**batch, return_dict=False), stock(**batch, return_dict=False)
    assert len(as_tuple) == len(theirs)
    torch.testing.assert_close(as_tuple[0], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", TRAINED)
def test_embeddings_given_instead_of_ids(head):
    stock = stock_model(head)
    batch = inputs(head, 53, side="none")
    states = stock.get_input_embeddings()(batch.pop("input_ids"))
    wanted = stock(inputs_embeds=states, **batch).logits
    torch.testing.assert_close(
        sparse_hf.sparsify(stock)(inputs_embeds=states, **batch).logits, wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("head", ["LongformerModel", "LongformerForSequenceClassification", "LEDModel"])
def test_older_marks_in_the_attention_mask_are_those_of_stock(head):
    stock, batch = stock_model(head), inputs(head, 50, side="right", marks="few")
    marks, real = batch.pop("global_attention_mask"), batch["attention_mask"]
    older = {**batch, "attention_mask": real + marks * real}
    assert (older["attention_mask"] == 2).any()
    ours = sparse_hf.sparsify(stock)
    found, wanted = ours(**older), stock(**older)
    if head == "LongformerModel":
        found, wanted = ([outputs[0][real.bool()]] for outputs in (found, wanted))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    for value in (-1, 3):
        wrong = real.clone()
        wrong[0, 3] = value
        with pytest.raises(ValueError, match=f"attention_mask holds {value}; it takes 0"):
            ours(**{**batch, "attention_mask": wrong})
    unmarked = sparse_hf.sparsify(stock, "window(4, 4)")
    with pytest.raises(
        ValueError, match=r"attention_mask marks global tokens, but no pattern of this model has marked"
    ):
        unmarked(**older)


@pytest.mark.parametrize("described", [True, False], ids=["with a pattern", "by its widths"])
@pytest.mark.parametrize("head", ["LongformerForMaskedLM", "LEDForConditionalGeneration"])
def test_dropped_layers_take_their_widths_along(head, described, tmp_path):
    """What the stock class saves then does not load: it wants a width for each layer."""
    model = sparse_hf.sparsify(stock_model(head))
    if not described:
        model.config.sparse_attention = None
    is_led = head.startswith("LED")
    owner, name = (model.led.encoder, "layers") if is_led else (model.longformer.encoder, "layer")
    before = model.config.attention_window
    setattr(owner, name, torch.nn.ModuleList([getattr(owner, name)[1]]))
    setattr(model.config, "encoder_layers" if is_led else "num_hidden_layers", 1)
    batch = inputs(head, 50)
    wanted = answers(model, batch)
    model.save_pretrained(tmp_path)
    assert model.config.attention_window == before
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.attention_window == before[1:2]
    for key, value in answers(loaded, batch).items():
        torch.testing.assert_close(value, wanted[key])


def test_fewer_layers_and_other_widths_asked_for_at_load(tmp_path):
    sparse_hf.sparsify(stock_model("LongformerModel")).save_pretrained(tmp_path)
    few = sparse_hf.SparseLongformerModel.from_pretrained(tmp_path, num_hidden_layers=1)
    assert len(few.encoder.layer) == len(few.config.attention_window) == 1
    for widths in (4, [4, 8]):
        # beside a pattern they change nothing, which is said
        sparse_hf.SparseLongformerModel.from_pretrained(tmp_path, attention_window=widths)


@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize("head", [h for h in HEADS["longformer"] if not h.endswith("Model")])
def test_heads_that_mark_run_with_patterns_without_marks(head, given, monkeypatch):
    ours = sparse_hf.sparsify(stock_model(head), "window(4, 4)")
    batch = inputs(head, 50, marks="default")
    if given == "embeddings":
        batch["inputs_embeds"] = ours.get_input_embeddings()(batch.pop("input_ids"))
    found = ours(**batch)
    monkeypatch.setattr(GlobalRowsMixin, "forward", specification)
    torch.testing.assert_close(found.loss, ours(**batch).loss)


def test_embeddings_are_classified_as_their_ids():
    head = "LongformerForSequenceClassification"
    ours, batch = sparse_hf.sparsify(stock_model(head)), inputs(head, 50, marks="default")
    ids = batch.pop("input_ids")
    positions = torch.where(batch["attention_mask"] > 0, 1 + batch["attention_mask"].cumsum(1), 1)
    states = ours.get_input_embeddings()(ids)
    found = ours(inputs_embeds=states, position_ids=positions, **batch).logits
    torch.testing.assert_close(found, ours(input_ids=ids, **batch).logits)
    marks = torch.ones(2, 49, dtype=torch.long)
    with pytest.raises(ValueError, match=r"global_attention_mask has shape \(2, 49\)"):
        ours(inputs_embeds=states, global_attention_mask=marks, **batch)


class _Doubled(torch.Tensor):
    """A weight that says half of what it means, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not torch.nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs)
        states, weight, *bias = args
        return function(states, 2 * weight.as_subclass(torch.Tensor), *bias)


class _Twice(torch.nn.Linear):
    """An adapter in place of a linear layer."""

    def forward(self, states):
        return 2 * super().forward(states)


def _twice_by_hook(module, _, out):
    return 2 * out


# what doubles a projection's answer without any trace in its `weight` -> how it is put there
DOUBLED = {
    "a weight of a subclass": lambda m: setattr(
        m, "weight", torch.nn.Parameter(_doubled(m.weight), requires_grad=False)
    ),
    "a forward hook": lambda m: m.register_forward_hook(_twice_by_hook),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: 2 * torch.nn.Linear.forward(m, x)),
    "a class of its own": lambda m: setattr(m, "__class__", _Twice),
}


def _doubled(weight):
    return weight.detach().as_subclass(_Doubled)


@pytest.mark.parametrize("is_host_bound", [False, True])
@pytest.mark.parametrize("way", DOUBLED)
@pytest.mark.parametrize("name", ["query", "value", "query_global", "key_global", "value_global"])
def test_projections_are_called_unless_their_weights_say_all(name, way, is_host_bound, monkeypatch):
    """Quantized weights (torchao, in Longformer and LED), adapters, hooks: rows of marked tokens read weights by hand."""
    monkeypatch.setattr(global_rows, "is_host_bound", lambda states: is_host_bound)
    ours, batch = sparse_hf.sparsify(stock_model("LongformerModel")), inputs("LongformerModel", 50, marks="one")
    other = copy.deepcopy(ours)
    for model, scale in ((ours, 2), (other, 1)):
        module = getattr(model.encoder.layer[0].attention.self, name)
        if way == "a weight of a subclass":
            torch.nn.init.zeros_(module.bias)
        if scale == 2:
            module.weight.data *= 2
            module.bias.data *= 2
        else:
            DOUBLED[way](module)
    with torch.no_grad():
        torch.testing.assert_close(other(**batch)[0], ours(**batch)[0])


class _Wrapped(torch.nn.Module):
    """A projection whose weights nobody can read, as those of quantizers."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def _gathered(linear):
    """A projection whose weight is there while it is called, and at no other time (DeepSpeed's ZeRO-3)."""
    whole, linear.weight.data = linear.weight.data, torch.empty(0)
    linear.register_forward_pre_hook(lambda module, _: setattr(module.weight, "data", whole))
    linear.register_forward_hook(lambda module, _, out: setattr(module.weight, "data", torch.empty(0)))
    return linear


@pytest.mark.parametrize("is_host_bound", [False, True])
@pytest.mark.parametrize("change", [_Wrapped, _gathered])
@pytest.mark.parametrize("head", ["LongformerModel", "LEDModel"])
def test_projections_without_readable_weights(head, change, is_host_bound, monkeypatch):
    monkeypatch.setattr(global_rows, "is_host_bound", lambda states: is_host_bound)
    ours, batch = sparse_hf.sparsify(stock_model(head)).eval(), inputs(head, 50, marks="one")
    with torch.no_grad():
        right = ours(**batch)[0]
        for module in ours.modules():
            if isinstance(module, GlobalRowsMixin):
                for name in global_rows.LOCAL + global_rows.GLOBAL:
                    setattr(module, name, change(getattr(module, name)))
        torch.testing.assert_close(ours(**batch)[0], right, rtol=1e-5, atol=1e-5)


def test_what_autograd_differentiates_is_left_to_it(monkeypatch):
    """One node would run its forward pass a second time."""
    monkeypatch.setattr(global_rows, "is_host_bound", lambda states: True)
    monkeypatch.setattr(global_rows, "joined_attention", None)
    ours, batch = sparse_hf.sparsify(stock_model("LongformerModel")), inputs("LongformerModel", 50, marks="few")
    ours.set_attn_implementation("sparse_reference")
    found = ours(**batch)[0]
    monkeypatch.setattr(global_rows, "is_host_bound", lambda states: False)
    torch.testing.assert_close(found, ours(**batch)[0])


@pytest.mark.parametrize("is_host_bound", [False, True])
# stock writes to what `query` and `query_global` gave, which torch refuses where they have such hooks
@pytest.mark.parametrize("name", ["key", "value", "key_global", "value_global"])
def test_backward_hooks_of_projections_are_called_as_in_stock(name, is_host_bound, monkeypatch):
    monkeypatch.setattr(global_rows, "is_host_bound", lambda states: is_host_bound)
    stock, batch = stock_model("LongformerModel"), inputs("LongformerModel", 50, side="none", marks="one")
    found = []
    for model in (stock, sparse_hf.sparsify(stock)):
        module, grads = getattr(model.encoder.layer[1].attention.self, name), []
        handle = module.register_full_backward_hook(lambda _, __, out, grads=grads: grads.append(out[0]))
        model(**batch)[0].square().sum().backward()
        handle.remove()
        found.append(grads)
    assert len(found[0]) == len(found[1]) == 1
    torch.testing.assert_close(found[1][0].norm(), found[0][0].norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.cross("seed")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", HEADS)
def test_equals_stock_where_a_gpu_waits_for_the_host(family, seed, monkeypatch):
    """One product for all projections, and marked rows by dense attention, at any number of marks."""
    monkeypatch.setattr(global_rows, "is_host_bound", lambda states: True)
    test_equals_stock(family, seed, monkeypatch)


@pytest.mark.parametrize("marks", ["one", "many"])
def test_short_texts_take_fewer_operations_where_a_gpu_waits(marks, monkeypatch):
    ours, counts = sparse_hf.sparsify(stock_model("LongformerModel")), []
    batch = inputs("LongformerModel", 60, side="none", marks=marks)
    monkeypatch.setattr(global_rows, "attend_by_pattern", lambda config, qkv, *_, **__: (sum(qkv), None))
    monkeypatch.setattr(joined, "route", lambda call, name: Free())
    for is_host_bound in (False, True):
        monkeypatch.setattr(global_rows, "is_host_bound", lambda states, found=is_host_bound: found)
        ours.zero_grad()
        with Operations() as seen:
            ours(**batch)[0].sum().backward()
        counts.append(seen.count)
    assert counts[1] < 0.7 * counts[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_joined_projections_keep_the_precision_of_separate_ones(autocast, monkeypatch):
    stock, batch = stock_model("LongformerForMaskedLM"), inputs("LongformerForMaskedLM", 70, marks="few")
    exact = answers(copy.deepcopy(stock).double(), batch) if not autocast else answers(stock, batch)
    errors = []
    for is_host_bound in (False, True):
        monkeypatch.setattr(global_rows, "is_host_bound", lambda states, found=is_host_bound: found)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = answers(sparse_hf.sparsify(copy.deepcopy(stock)), batch)
        errors.append(
            max(float((found[k].double() - v).norm() / v.norm()) for k, v in exact.items() if v.norm() > 1e-3)
        )
    assert errors[1] <= 1.5 * errors[0] + 1e-6


PACKED = {"window and marks": "window(4, 4) | marked()", "by position": "first(2) | chunk(8) | marked()"}


@pytest.mark.parametrize("dropped", [0.0, 1e-9])
@pytest.mark.parametrize("marks", ["none", "few"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_give_what_they_give_apart(name, marks, dropped):
    """Positions tell Longformer's documents apart, in rows of marked tokens too, as they do in BERT."""
    stock = stock_model("LongformerForMaskedLM", attention_probs_dropout_prob=dropped)
    ours = sparse_hf.sparsify(stock, PACKED[name]).train(dropped > 0)
    lengths, offset = (20, 31, 9), 2
    batch = inputs("LongformerForMaskedLM", sum(lengths), batch=2, side="none", marks=marks, seed=3)
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1) + offset
    # padding behind the last document of a row
    batch["attention_mask"] = (torch.arange(60)[None] < torch.tensor([[60], [55]])).long()
    packed, begin = ours(**batch).logits, 0
    for length in lengths:
        own = {k: v[:, begin : begin + length] for k, v in batch.items() if k != "labels"}
        real = own["attention_mask"].bool()
        torch.testing.assert_close(
            packed[:, begin : begin + length][real], ours(**own).logits[real], rtol=1e-4, atol=1e-4
        )
        begin += length


@pytest.mark.parametrize("head", TRAINED)
def test_processes_whose_batches_have_no_marks_have_gradients(head, monkeypatch):
    """Data parallelism waits for gradients of all parameters from all processes (DDP, FSDP)."""
    ours = sparse_hf.sparsify(stock_model(head)).train()
    batch = inputs(head, 50, marks="none")

    def missing():
        ours.zero_grad()
        ours(**batch).loss.backward()
        return {name for name, p in ours.named_parameters() if p.grad is None}

    alone, plain = missing(), ours(**batch).loss
    assert alone and all("_global" in name for name in alone)
    monkeypatch.setattr(global_rows, "owes_gradients", lambda module: True)
    assert not missing() and torch.equal(ours(**batch).loss, plain)
    assert not any(p.grad.any() for name, p in ours.named_parameters() if name in alone)


@pytest.mark.parametrize("size", [7, 64])
def test_feed_forward_in_chunks_that_need_not_divide_the_length(size):
    stock, batch = stock_model("LongformerModel"), inputs("LongformerModel", 50)
    wanted = sparse_hf.sparsify(stock)(**batch)[0]
    ours = sparse_hf.sparsify(stock_model("LongformerModel", chunk_size_feed_forward=size))
    torch.testing.assert_close(ours(**batch)[0], wanted)


def _forward(head: str, **changes):
    return lambda: sparse_hf.sparsify(stock_model(head))(**{**inputs(head, 50, marks="default"), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_forward("LongformerModel", attention_mask=torch.ones(2, 1, 50, 50)), r"attention_mask has shape \(2, 1, 50, 50\)"),
        (_forward("LongformerModel", inputs_embeds=torch.ones(2, 50, 32)), "either input_ids or inputs_embeds"),
        (_forward("LongformerForQuestionAnswering", input_ids=torch.full((2, 50), 7)), "has no separator"),
        (lambda: sparse_hf.sparsify(stock_model("LongformerModel"), "window(4, 4)")(
            **inputs("LongformerModel", 50)), r"add `\| marked\(\)`"),
        (lambda: sparse_hf.sparsify(stock_model("LEDModel"), "window(4, 4) | marked()"), "give the decoder a pattern of its own"),
        (lambda: sparse_hf.sparsify(stock_model("LEDModel"), layers={"decoder": "window(4, 0) | marked_keys()"}),
         "give the decoder a pattern of its own"),
        (lambda: sparse_hf.sparsify(transformers.BertModel(transformers.BertConfig(
            hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9))),
         "sparse_bert implies no pattern; give one"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conversion_of_a_dense_family_needs_a_pattern(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="sparse_bert implies no pattern; give one"):
        sparse_hf.convert(tmp_path / "bert", tmp_path / "out", progress=False)


def test_families_are_found_by_name():
    for family in HEADS:
        assert sparse_hf.family_of(family).implies_pattern and sparse_hf.family_of(f"sparse_{family}").implies_pattern
    assert TARGET < VOCABULARY


def test_marked_rows_keep_no_more_for_the_backward_pass():
    ours, length = sparse_hf.sparsify(stock_model("LongformerModel")), 200
    least = length * ours.config.hidden_size

    def kept(marks: str) -> int:
        held = {}

        def pack(t):
            held[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            answer = ours(**inputs("LongformerModel", length, marks=marks)).last_hidden_state
        assert answer.requires_grad
        return sum(t.untyped_storage().nbytes() // t.element_size() >= least for t in held.values())

    assert kept("one") == kept("none") > 10


def test_a_head_that_a_checkpoint_lacks_has_no_bias(tmp_path):
    sparse_hf.sparsify(stock_model("LongformerModel")).save_pretrained(tmp_path)
    for _ in range(5):
        # memory that is about to be handed out
        del [torch.full((VOCABULARY,), torch.nan) for _ in range(50)][:]
        model = sparse_hf.SparseLongformerForMaskedLM.from_pretrained(tmp_path)
        assert not model.lm_head.bias.any() and model.lm_head.decoder.bias is model.lm_head.bias
