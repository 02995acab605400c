"""sparse_reformer against Transformers' own classes and against the definition."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.testing import AllocationInterceptor
from tests.crosses import sampled, slow_but_for
from tests.models import families, published_ranks
from tests.models.reformers import HEADS, Hashes, answers, draw, exact, inputs, replica, stock_answers, stock_model

# ours may err this many times as much as the stock class in float32 does, against the stock class in float64, plus roundings
SLACK, ROUNDING = 4, 1e-5
TRAINED = ["ReformerModelWithLMHead", "ReformerForMaskedLM"]
DRAWS = [pytest.param(seed, marks=() if seed < 20 else pytest.mark.slow) for seed in range(220)]


@pytest.mark.parametrize("seed", DRAWS)
def test_equals_stock(seed, monkeypatch):
    case = draw(seed)
    stock = stock_model(case.head, seed, **case.values)
    ours = sparse_hf.sparsify(stock)
    assert type(ours).__name__ == f"Sparse{case.head}" and type(stock).__name__ == case.head
    for module in ours.modules():
        # the stock class takes chunks that divide the length only
        for name in ("chunk_size_feed_forward", "chunk_size_lm_head"):
            if name in vars(module):
                setattr(module, name, 7 * (seed % 2))
    batch, hashes = inputs(case.head, case.length, case.side, seed), Hashes(monkeypatch)
    truth = hashes.run(stock_answers, exact(stock), batch)
    plain = hashes.run(stock_answers, stock, batch)
    found = hashes.run(answers, ours.train(), batch)
    assert found.keys() == plain.keys() and len(found) > 10
    for name, right in truth.items():
        scale = right.abs().max().clamp(min=1)
        error, allowed = ((t[name].double() - right).abs().max() / scale for t in (found, plain))
        assert error <= SLACK * allowed + ROUNDING, f"{name} errs by {error:.1e}, the stock class by {allowed:.1e}"


@pytest.mark.parametrize("head", HEADS)
def test_a_row_padded_on_the_left_is_the_row_alone(head):
    ours = sparse_hf.sparsify(stock_model(head, is_decoder=head == "ReformerModelWithLMHead"))
    alone = inputs(head, 61, "none", batch=1)
    pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    alone["attention_mask"] = torch.ones(1, 61, dtype=torch.long)
    padded = {k: torch.nn.functional.pad(v, (23, 0), value=pad[k]) if v.ndim == 2 else v for k, v in alone.items()}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted, found = (ours(**b, output_hidden_states=True).hidden_states[-1] for b in (alone, padded))
    torch.testing.assert_close(found[:, 23:], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [{}, {"num_hashes": 3, "num_buckets": None}, {"is_decoder": True}])
def test_reversible_layers_give_what_layers_that_keep_states_give(values):
    dropped = dict.fromkeys(("hidden_dropout_prob", "local_attention_probs_dropout_prob"), 0.2)
    layers = ["local", "lsh", "lsh"]
    stock = stock_model("ReformerModel", attn_layers=layers, lsh_attention_probs_dropout_prob=0.3, **dropped, **values)
    ours = sparse_hf.sparsify(stock).double().train()
    batch = inputs("ReformerModel", 77)

    def gradients(**more):
        torch.manual_seed(7)
        states = ours(**batch, **more).last_hidden_state
        return states, *torch.autograd.grad(states.square().sum(), list(ours.parameters()))

    for found, wanted in zip(gradients(), gradients(output_hidden_states=True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_depth_keeps_no_activations():
    kept = {}
    for depth in (2, 8):
        ours = sparse_hf.sparsify(stock_model("ReformerModel", attn_layers=["local"] * depth)).train()
        batch, sizes = inputs("ReformerModel", 200), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t) or t, lambda t: t):
            ours(**batch)
        parameters = {p.data_ptr() for p in ours.parameters()}
        kept[depth] = sum(t.numel() for t in sizes if t.data_ptr() not in parameters)
    assert kept[2] == kept[8]


@pytest.mark.parametrize("length", [4_352, pytest.param(16_640, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", TRAINED)
def test_no_tensor_has_two_lengths(head, length):
    own = {"axial_pos_embds": True, "axial_pos_shape": [130, 136], "num_hashes": 2, "num_buckets": None}
    sizes = {"local_attn_chunk_length": 60, "lsh_attn_chunk_length": 60, "max_position_embeddings": 17_000}
    ours = sparse_hf.sparsify(stock_model(head, **own, **sizes)).train()
    batch = inputs(head, length, batch=1)
    with AllocationInterceptor(length) as seen:
        ours(**batch).loss.backward()
    assert not seen.quadratic and seen.calls > 500


@pytest.mark.compiles
@pytest.mark.parametrize("checkpointing", sampled([True], [False, True]))
@pytest.mark.parametrize("head", slow_but_for(TRAINED[:1], HEADS))
def test_compiled_as_one_graph(head, checkpointing):
    torch._dynamo.reset()
    # in float64, because reversible layers compute their states again, and a graph does not
    ours, batch = sparse_hf.sparsify(stock_model(head)).double().train(), inputs(head, 70)
    wanted = answers(ours, batch)
    if checkpointing:
        getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for name, value in answers(compiled, batch).items():
        torch.testing.assert_close(value, wanted[name.replace("_orig_mod.", "")], rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("interpreted")
def test_compiled_with_the_kernels_that_cuda_graphs_hold():
    torch._dynamo.reset()
    found = []

    def look(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    ours = sparse_hf.sparsify(stock_model("ReformerModel", lsh_attn_chunk_length=16, attn_layers=["lsh"]))
    batch = inputs("ReformerModel", 40, "none")
    compiled = torch.compile(ours, fullgraph=True, backend=look)
    for value, right in zip(_first_and_gradients(compiled, batch), _first_and_gradients(ours, batch), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
    assert "sparse_hf.chunked_attention_recorded.default" in found


def _first_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    first = model(**batch)[0]
    # what is behind a layer norm has almost no gradient of its mean or square
    first.cos().sum().backward()
    return [first.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("head", ["ReformerModel", *TRAINED])
def test_one_cuda_graph_holds_any_buckets(head, rounds):
    torch._dynamo.reset()
    skips = torch._dynamo.utils.counters["inductor"]
    # hashed first, where nothing has been rounded yet in one way or the other that could bring a token into another bucket
    sizes = {"lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "attn_layers": ["lsh", "local"]}
    own = {"num_hashes": rounds, "num_buckets": [2, 4], "hash_seed": 3}
    ours, before = sparse_hf.sparsify(stock_model(head, **own, **sizes)).cuda().train(), skips["cudagraph_skips"]
    step = torch.compile(ours, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        batch = {name: t.cuda() for name, t in inputs(head, 150, "none", seed).items()}
        torch.compiler.cudagraph_mark_step_begin()
        for value, right in zip(_first_and_gradients(step, batch), _first_and_gradients(ours, batch), strict=True):
            assert (value - right).norm() <= 1e-3 * right.norm().clamp(min=1e-3)
    assert skips["cudagraph_skips"] == before


@pytest.mark.parametrize("head", ["ReformerModel", *TRAINED])
def test_exported(head):
    ours = sparse_hf.sparsify(stock_model(head))
    batch = {k: v for k, v in inputs(head, 70).items() if k != "labels"} | {"use_cache": False}
    batch = batch if head != "ReformerForMaskedLM" else {k: v for k, v in batch.items() if k != "use_cache"}
    program = torch.export.export(ours, (), batch, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**batch)[0], ours(**batch)[0])


@pytest.mark.parametrize("layers", [["local", "local"], ["local", "lsh"], ["lsh", "local"]])
@pytest.mark.parametrize("beams", [1, 2])
def test_generates_the_same_with_a_cache_without_and_as_stock(layers, beams, capsys):
    stock = stock_model("ReformerModelWithLMHead", attn_layers=layers)
    ours, ids = sparse_hf.sparsify(stock), inputs("ReformerModel", 29, "none")["input_ids"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams, "do_sample": False}
    found = ours.generate(ids, **options)
    assert torch.equal(found, ours.generate(ids, **options, use_cache=False)) and not capsys.readouterr().out
    assert torch.equal(found, stock.generate(ids, **options, use_cache=False))
    padded = torch.nn.functional.pad(ids, (9, 0))
    again = ours.generate(padded, attention_mask=(padded > 0).long(), **options)
    assert torch.equal(again[:, 9:], found)


@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_load_unchanged(head, tmp_path):
    stock, batch = stock_model(head), inputs(head, 50)
    stock.save_pretrained(tmp_path / "stock")
    loaded, told = getattr(sparse_hf, f"Sparse{head}").from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    sparse_hf.convert(tmp_path / "stock", tmp_path / "sparse", progress=False)
    converted = type(loaded).from_pretrained(tmp_path / "sparse")
    assert converted.config.sparse_attention["layers"] == ["sparse", "pattern_1"]
    assert converted.config.layer_pattern(1) == loaded.config.layer_pattern(1) == "lsh_chunks(8, 1, 0, 2, 8, 5)"
    with torch.no_grad():
        wanted = sparse_hf.sparsify(stock)(**batch)[0]
        for model in (loaded, converted):
            torch.testing.assert_close(model.eval()(**batch)[0], wanted)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "sparse")).__name__ == "SparseReformerModel"


# what of the published configurations says what attends to what
PUBLISHED = {
    "crime-and-punishment": (
        {"attn_layers": ["local", "lsh"] * 3, "axial_pos_shape": [512, 1024], "axial_pos_embds_dim": [64, 192],
         "num_buckets": [64, 128], "num_hashes": 1, "local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64,
         "max_position_embeddings": 524288, "hidden_size": 256, "num_attention_heads": 2},
        ["ring(64, 1, 0)", "lsh_chunks(64, 1, 0, 1, (64, 128), None)"],
    ),
    "enwik8": (
        {"attn_layers": ["local", "local", "lsh", "local"] * 3, "axial_pos_shape": [128, 512],
         "axial_pos_embds_dim": [256, 768], "num_buckets": 512, "num_hashes": 4, "local_attn_chunk_length": 128,
         "lsh_attn_chunk_length": 256, "max_position_embeddings": 65536, "hidden_size": 1024, "num_attention_heads": 8},
        ["ring(128, 1, 0)", "lsh_chunks(256, 1, 0, 4, 512, None)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_translate(name):
    values, (local, hashed) = PUBLISHED[name]
    config = sparse_hf.SparseReformerConfig.from_dense({**values, "is_decoder": True, "model_type": "reformer"})
    kinds = {"local": local, "lsh": hashed}
    assert [config.layer_pattern(i) for i in range(len(values["attn_layers"]))] == [
        kinds[k] for k in values["attn_layers"]
    ]
    assert config.layer_pattern(0, is_causal=True) == f"{local.replace('ring', 'chunk')} & window(None, 0)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", TRAINED)
def test_half_precision(head, dtype):
    # two tokens alike in one chunk of hash order, one that sees itself alone, and padding: where masks would overflow
    ours = sparse_hf.sparsify(stock_model(head)).to(dtype).train()
    outputs = ours(**inputs(head, 70))
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype and outputs.logits.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in ours.parameters() if p.grad is not None)
    whole = sparse_hf.sparsify(stock_model(head, attn_layers=["local", "local"]))
    # without hashes, which half precision may turn into others
    exact = copy.deepcopy(whole).double()(**inputs(head, 70)).logits
    error = (whole.to(dtype)(**inputs(head, 70)).logits.double() - exact).abs().max()
    assert error < 60 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("head", HEADS)
def test_nothing_is_sticky(head):
    ours = sparse_hf.sparsify(stock_model(head, num_buckets=None))

    def everything():
        plain = {n: {k: repr(v) for k, v in vars(m).items() if k[0] != "_"} for n, m in ours.named_modules()}
        return copy.deepcopy((ours.config.to_dict(), plain)), torch.get_rng_state().tolist()

    before, batch = everything(), inputs(head, 50)
    first = ours(**batch)[0]
    ours(**inputs(head, 7))
    ours(**inputs(head, 90)).to_tuple()[0].sum().backward()
    assert everything() == before and torch.equal(ours(**batch)[0], first)


@pytest.mark.parametrize("head", TRAINED)
def test_weights_come_from_the_reference(head):
    ours, batch = sparse_hf.sparsify(stock_model(head)), inputs(head, 50)
    with pytest.raises(ValueError, match="attn_implementation='sparse_reference'"):
        ours(**batch, output_attentions=True)
    plain = ours(**batch)
    ours.set_attn_implementation("sparse_reference")
    outputs, real = ours(**batch, output_attentions=True), batch["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], plain.logits[real], rtol=1e-4, atol=1e-5)
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 50, 50)
        rows = weights.sum(-1).transpose(1, 2)[real]
        torch.testing.assert_close(rows, torch.ones_like(rows))
    ours.set_attn_implementation("sparse_flex")
    with pytest.raises(NotImplementedError, match="cannot run"):
        ours(**batch)


def test_checkpointing_is_there_from_the_start():
    ours, batch = sparse_hf.sparsify(stock_model("ReformerForMaskedLM")).train(), inputs("ReformerForMaskedLM", 50)
    wanted = ours(**batch).loss
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    loss = ours(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted)


def test_trainer_trains(tmp_path):
    ours = sparse_hf.sparsify(stock_model("ReformerModelWithLMHead", hash_seed=None, num_buckets=None))
    data = [{"input_ids": row, "labels": row} for row in inputs("ReformerModel", 45, "none", batch=4)["input_ids"]]
    options = {"max_steps": 12, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    known = inspect.signature(transformers.TrainingArguments).parameters
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    arguments = transformers.TrainingArguments(tmp_path, save_strategy="no", **options, **{name: True})
    trainer = transformers.Trainer(ours, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0] and trainer.evaluate()["eval_loss"] < losses[0]


@pytest.mark.parametrize("head", HEADS)
def test_forward_takes_its_arguments_as_stock(head):
    stock = stock_model(head)
    ours = sparse_hf.sparsify(stock)
    wanted = list(inspect.signature(type(stock).forward).parameters)
    found = list(inspect.signature(type(ours).forward).parameters)
    assert [name for name in found if name != "global_attention_mask"] == wanted
    batch = inputs(head, 48, "none")
    as_tuple, theirs = ours(**batch, return_dict=False), stock(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0], theirs[0], rtol=1e-4, atol=1e-4)
    states = stock.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(ours(inputs_embeds=states, **batch)[0], theirs[0], rtol=1e-4, atol=1e-4)


def test_fewer_rounds_may_be_asked_for():
    stock = stock_model("ReformerModel")
    ours, batch = sparse_hf.sparsify(stock), inputs("ReformerModel", 64)
    real = batch["attention_mask"].bool()
    for rounds in (1, 4):
        wanted = stock(**batch, num_hashes=rounds)[0][real]
        torch.testing.assert_close(ours(**batch, num_hashes=rounds)[0][real], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_costs_what_it_costs_the_stock_class(dtype, inside):
    """Local layers, whose pairs no rounding changes: hashed ones may take other buckets."""
    stock = stock_model("ReformerForMaskedLM", attn_layers=["local"] * 3)
    batch, errors = inputs("ReformerForMaskedLM", 64, "none"), []
    exact = gradients(sparse_hf.sparsify(copy.deepcopy(stock)).double().train(), batch)
    for model in (copy.deepcopy(stock), sparse_hf.sparsify(stock)):
        model.train().zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(**batch).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == exact.keys()
        wanted = torch.cat([exact[name].flatten() for name in found])
        errors.append(float((torch.cat([g.flatten() for g in found.values()]) - wanted).norm() / wanted.norm()))
    assert errors[1] <= 1.5 * errors[0]


def gradients(model, batch, **given) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, **given).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Reformer's own layers, and lsh(...) in any family: an encoder's and a decoder's attention
HASHED = {
    "reformer": (lambda: stock_model("ReformerModelWithLMHead", attn_layers=["lsh", "local"]), None),
    "bert": (lambda: families.dense_model("BertForMaskedLM"), "window(8, 8) | lsh(8, rounds=2, size=16)"),
    "llama": (lambda: families.dense_model("LlamaForCausalLM"), "window(8, 0) | lsh(8, rounds=2, size=16)"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HASHED)
def test_hashed_attention_trains_under_autocast(name, dtype):
    make, pattern = HASHED[name]
    ours = sparse_hf.sparsify(make(), pattern).train()
    ids = torch.randint(4, families.VOCABULARY, (2, 90))
    with torch.autocast("cpu", dtype):
        loss = ours(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for p in ours.parameters() if p.grad is not None]
    assert loss.isfinite() and all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype, cache_enabled=False):
        torch.testing.assert_close(ours(ids, labels=ids).loss, loss)


def test_autocast_around_the_backward_pass_changes_no_gradient_of_layers():
    """They compute their states again in the precision of then."""
    ours, batch = sparse_hf.sparsify(stock_model("ReformerModel")).train(), inputs("ReformerModel", 60)
    found = []
    for is_around in (False, True):
        ours.zero_grad()
        answer = ours(**batch)[0].cos().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_around):
            answer.backward()
        found.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


@pytest.mark.parametrize("head", [h for h in HEADS if h != "ReformerModel"])
def test_replicas_have_the_gradients_of_the_model(head):
    """What `nn.DataParallel` runs: modules whose parameters are tensors that it copied."""
    ours, batch = sparse_hf.sparsify(stock_model(head)).train(), inputs(head, 60)
    wanted = gradients(ours, batch)
    ours.zero_grad()
    replica(ours)(**batch).loss.backward()
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad)


def test_parameters_from_outside_have_gradients():
    """`torch.func.functional_call` takes parameters away again before the backward pass."""
    ours, batch = sparse_hf.sparsify(stock_model("ReformerForMaskedLM")).train(), inputs("ReformerForMaskedLM", 60)
    wanted = gradients(ours, batch)
    given = {name: p.detach().clone().requires_grad_() for name, p in ours.named_parameters()}
    torch.func.functional_call(ours, given, kwargs=batch).loss.backward()
    for name, grad in wanted.items():
        torch.testing.assert_close(given[name].grad, grad)


def test_parameters_that_are_taken_away_are_missed():
    ours, batch = sparse_hf.sparsify(stock_model("ReformerForMaskedLM")).train(), inputs("ReformerForMaskedLM", 60)
    loss = ours(**batch).loss
    ours.reformer.encoder.layers[0].attention.requires_grad_(False)
    with pytest.raises(RuntimeError, match="were frozen or taken away between forward and backward"):
        loss.backward()


@pytest.mark.parametrize(
    "where", ["layers.0", "layers.1.feed_forward", "layers.1.attention", "layers.0.feed_forward.dense"]
)
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_are_called(where, kind):
    ours, batch = (
        sparse_hf.sparsify(stock_model("ReformerForMaskedLM")).double().train(),
        inputs("ReformerForMaskedLM", 60),
    )
    module, called = ours.reformer.encoder.get_submodule(where), []
    register = getattr(module, f"register_{'full_backward' if kind == 'backward' else 'forward'}_hook")
    register(lambda *given: called.append(len(given)) or (_doubled(given[2]) if kind == "forward" else None))
    found = gradients(ours, batch)
    assert called
    for name, grad in gradients(ours, batch, output_hidden_states=True).items():
        torch.testing.assert_close(found[name], grad)


def _doubled(out):
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    return published_ranks.steps(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("family", published_ranks.CASES)
def test_two_processes_have_the_gradients_of_one(family, norms):
    """DDP, FSDP of both kinds, whole and layer by layer; in LED one process's batch has no marks."""
    for how in published_ranks.CASES[family]:
        found, wanted = norms[family][how]
        assert round(found, 8) == round(wanted, 8) and found > 0.1, how


class _Packed(torch.nn.Module):
    """A projection with no weight to be read, as quantized ones."""

    def __init__(self, linear):
        super().__init__()
        self.linear = [linear]

    def weight(self):
        raise AssertionError("a quantized weight is no tensor")

    def forward(self, states):
        return self.linear[0](states)


@pytest.mark.parametrize("head", HEADS)
def test_projections_need_no_readable_weight(head):
    """Dynamic quantization of torch, 8 and 4 bits of bitsandbytes; seeds are drawn in the dtype of the states."""
    ours, batch = sparse_hf.sparsify(stock_model(head)), inputs(head, 50)
    wanted = ours(**batch)[0]
    for module in list(ours.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, _Packed(child))
    torch.testing.assert_close(ours(**batch)[0], wanted)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamically_quantized():
    ours, batch = sparse_hf.sparsify(stock_model("ReformerForMaskedLM")), inputs("ReformerForMaskedLM", 50)
    packed = torch.ao.quantization.quantize_dynamic(ours, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        assert packed(**batch).logits.isfinite().all()


@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_half_precision(dtype, axial, tmp_path):
    """Transformers keeps axial tables in float32 and fails; the states have the dtype that was asked for."""
    stock = stock_model("ReformerModelWithLMHead", axial_pos_embds=axial)
    sparse_hf.sparsify(stock).save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    batch = inputs("ReformerModel", 50)
    assert ours(**batch).logits.dtype == dtype
    states = ours.get_input_embeddings()(batch["input_ids"])
    assert ours(inputs_embeds=states, attention_mask=batch["attention_mask"]).logits.dtype == dtype
    with torch.no_grad():
        assert ours.train()(**batch, labels=batch["input_ids"]).loss.isfinite()


@pytest.mark.parametrize("head", TRAINED)
def test_resized_and_saved(head, tmp_path):
    ours = sparse_hf.sparsify(stock_model(head))
    for count in (105, 90):
        ours.resize_token_embeddings(count)
        ours.save_pretrained(tmp_path / str(count))
        loaded = type(ours).from_pretrained(tmp_path / str(count)).eval()
        ids = torch.randint(3, count, (2, 40))
        assert loaded(ids).logits.shape[-1] == count and torch.equal(loaded(ids).logits, ours(ids).logits)


def test_packed_documents_are_refused():
    """All tokens of a row are sorted by their hashes, so that nothing keeps its documents apart."""
    ours, batch = sparse_hf.sparsify(stock_model("ReformerForMaskedLM")), inputs("ReformerForMaskedLM", 45, "none")
    positions = torch.cat([torch.arange(20), torch.arange(25)])[None].expand(2, -1)
    with pytest.raises(ValueError, match="position_ids begin anew inside a row"):
        ours(**batch, position_ids=positions)
    ours(**batch, position_ids=torch.arange(45)[None])


def test_axial_positions_under_another_default_dtype():
    ours = sparse_hf.sparsify(stock_model("ReformerForMaskedLM", axial_pos_embds=True, hidden_dropout_prob=0.1)).train()
    torch.set_default_dtype(torch.float64)
    try:
        loss = ours(**inputs("ReformerForMaskedLM", 50)).loss
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32


def _forward(head: str, **changes):
    own = {k: changes.pop(k) for k in ("axial_pos_embds",) if k in changes}
    return lambda: sparse_hf.sparsify(stock_model(head, **own))(**{**inputs(head, 50), **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_forward("ReformerModel", attention_mask=torch.ones(2, 1, 50, 50)), r"attention_mask has shape \(2, 1, 50, 50\)"),
        (_forward("ReformerModel", inputs_embeds=torch.ones(2, 50, 32)), "either input_ids or inputs_embeds"),
        (_forward("ReformerModel", position_ids=torch.arange(300, 350)[None], axial_pos_embds=True), "room for 256"),
        (_forward("ReformerModel", input_ids=torch.full((2, 50), 97)), "input_ids hold 97; the vocabulary is 0 to 96"),
        (_forward("ReformerModel", input_ids=torch.full((2, 257), 7), attention_mask=None), "a text has 257 tokens"),
        (_forward("ReformerModel", position_ids=torch.full((2, 50), 256)), "position_ids hold 256"),
        (lambda: sparse_hf.sparsify(stock_model("ReformerModelWithLMHead")).generate(
            torch.full((1, 250), 7), max_new_tokens=9, min_new_tokens=9), "256"),
        (_forward("ReformerModel", global_attention_mask=torch.ones(2, 50)), "no pattern of this model has marked"),
        (lambda: sparse_hf.sparsify(stock_model("ReformerModel"), layers={1: "window(5, 0)"}), r"takes lsh_chunks\(...\)"),
        (lambda: sparse_hf.sparsify(stock_model("ReformerModel"), layers={0: "lsh_chunks(8)"}), "takes a pattern of positions"),
        (lambda: sparse_hf.sparsify(stock_model("ReformerModel"), layers={0: "marked()"}), "takes a pattern of positions"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_local_layers_take_other_patterns():
    stock = stock_model("ReformerModel", attn_layers=["local", "lsh", "local"])
    ours = sparse_hf.sparsify(stock, "window(3, 3) | first(1)", layers={1: "lsh_chunks(16, 1, 0, 1, 4, 0)"})
    assert [ours.config.layer_pattern(i) for i in range(3)] == [
        "window(3, 3) | first(1)", "lsh_chunks(16, 1, 0, 1, 4, 0)", "window(3, 3) | first(1)"]  # fmt: skip
    assert ours(**inputs("ReformerModel", 50))[0].isfinite().all()
