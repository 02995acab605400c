"""Layers that ask what one before them has asked, and those that are one autograd node with their projections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import sparse_hf
from sparse_hf import Pattern
from sparse_hf.attention import api
from sparse_hf.attention.scoring import Scoring
from sparse_hf.models.hf import answered, attention_interface, joined, projections
from sparse_hf.models.longformer import global_rows
from sparse_hf.plan import NOTHING, BatchInfo, of_batch
from tests.models import longformers
from tests.models.families import dense_model, inputs
from tests.models.longformers import Free, Operations, stock_model

LAYERS = 4
HEADS = ("BertModel", "CamembertModel", "ElectraModel", "RobertaModel", "XLMRobertaModel")
PATTERN = "window(20, 20) | first(3)"
PARSED = Pattern.parse(PATTERN)


def sparse(head: str = "BertModel", layers=None, **changes) -> torch.nn.Module:
    return sparse_hf.sparsify(dense_model(head, num_hidden_layers=LAYERS, **changes), PATTERN, layers=layers)


@pytest.fixture
def nodes(monkeypatch) -> list:
    """A GPU waits for the host; what layers that are one node asked."""
    seen, plain = [], joined.joined_attention

    def noted(states, modules, asked):
        seen.append(asked)
        return plain(states, modules, asked)

    monkeypatch.setattr(joined, "is_host_bound", lambda states: True)
    monkeypatch.setattr(joined, "joined_attention", noted)
    return seen


def trained(model, batch, **how) -> list[torch.Tensor]:
    """The last states and all gradients of a pass, drawn alike each time."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=how.get("autocast", False)):
        found = model(**batch).last_hidden_state
    (found.float() * torch.linspace(-1, 1, found.shape[-1], device=found.device)).sum().backward()
    return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compare(model, batch, nodes, monkeypatch, **how) -> None:
    """One node a layer gives what projections and attention give apart."""
    one = trained(model, batch, **how)
    assert len(nodes) >= LAYERS - 1
    monkeypatch.setattr(joined, "is_host_bound", lambda states: False)
    apart = trained(model, batch, **how)
    scale = 5e-2 if how.get("autocast") else 2e-5
    for left, right in zip(one, apart, strict=True):
        assert (left - right).norm() <= scale * right.norm() + scale


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("head", HEADS)
def test_one_node_gives_what_projections_and_attention_give_apart(head, side, nodes, monkeypatch):
    model = sparse(head)
    batch = {name: t for name, t in inputs(head, side).items() if name != "labels"}
    compare(model, batch, nodes, monkeypatch)
    assert len(nodes) == LAYERS - 1


@pytest.mark.parametrize("how", [{}, {"autocast": True}], ids=["float32", "autocast"])
def test_dropout_and_autocast_are_those_of_separate_projections(how, nodes, monkeypatch):
    model = sparse(attention_probs_dropout_prob=0.3).train()
    compare(model, inputs("BertModel"), nodes, monkeypatch, **how)
    assert all(asked.dropout.p == 0.3 for asked in nodes)


@pytest.mark.usefixtures("interpreted")
def test_kernels_write_the_gradients_side_by_side(nodes, monkeypatch):
    model = sparse(max_position_embeddings=80)
    model.set_attn_implementation("sparse_triton")
    compare(model, {"input_ids": torch.arange(70)[None] + 5}, nodes, monkeypatch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_computed_again_in_the_same_way(reentrant, nodes, monkeypatch):
    model, batch = sparse().train(), inputs("BertModel")
    plain = trained(model, batch)
    # under its name in newer versions, or in older ones
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    nodes.clear()
    again = trained(model, batch)
    # each but the first, forward and again
    assert len(nodes) == 2 * (LAYERS - 1)
    for left, right in zip(again, plain, strict=True):
        torch.testing.assert_close(left, right)


def test_a_layer_of_its_own_pattern_is_not_answered_by_others(nodes, monkeypatch):
    model = sparse(layers="0=dense, 2=window(5, 5)")
    calls, plain = [], attention_interface._in_order
    monkeypatch.setattr(
        attention_interface, "_in_order", lambda layer, *rest: calls.append(layer) or plain(layer, *rest)
    )
    one = trained(model, inputs("BertModel"))
    # the first of each pattern asks, and the last layer asks what the second did
    assert [str(layer.pattern) for layer in calls] == ["window(None, None)", PATTERN, "window(5, 5)"]
    assert [str(asked.pattern) for asked in nodes] == [PATTERN]
    monkeypatch.setattr(joined, "is_host_bound", lambda states: False)
    for left, right in zip(one, trained(model, inputs("BertModel")), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["BertModel", "LlamaModel", "BartModel"])
@pytest.mark.parametrize("side", ["none", "right"])
def test_layers_that_ask_alike_are_answered_once(head, side, monkeypatch):
    model = dense_model(head, **{} if head == "BartModel" else {"num_hidden_layers": LAYERS})
    model = sparse_hf.sparsify(model, "window(20, 0) | first(3)")
    batch = {name: t for name, t in inputs(head, side).items() if name != "labels"}
    calls, plain = [], attention_interface._in_order
    monkeypatch.setattr(
        attention_interface, "_in_order", lambda layer, *rest: calls.append(layer) or plain(layer, *rest)
    )
    with torch.no_grad():
        once = model(**batch)[0]
        count = len(calls)
        monkeypatch.setattr(attention_interface, "asked_alike", lambda *_: None)
        each = model(**batch)[0]
    assert torch.equal(once, each)
    # one for each stack
    assert count == (2 if head == "BartModel" else 1) and len(calls) - count == LAYERS


def _by_hook(module) -> None:
    module.register_forward_hook(lambda module, _, out: 2 * out)


def _by_class(module) -> None:
    module.__class__ = type(
        "Twice", (torch.nn.Linear,), {"forward": lambda self, x: 2 * torch.nn.Linear.forward(self, x)}
    )


@pytest.mark.parametrize("change", [_by_hook, _by_class])
def test_projections_are_called_unless_their_weights_say_all(change, nodes):
    model = sparse()
    change(model.encoder.layer[2].attention.self.key)
    model(**inputs("BertModel"))
    assert len(nodes) == LAYERS - 2


def test_a_decoder_with_a_cache_goes_its_own_way(nodes):
    model = sparse(is_decoder=True)
    model(**inputs("BertModel"), use_cache=True)
    assert not nodes


def test_one_node_takes_fewer_operations(nodes, monkeypatch):
    model, batch, counts = sparse(), inputs("BertModel", "none"), []
    for module in (api, answered, joined):
        monkeypatch.setattr(module, "route", lambda call, name: Free())
    for is_host_bound in (True, False):
        monkeypatch.setattr(joined, "is_host_bound", lambda states, found=is_host_bound: found)
        with Operations() as seen:
            trained(model, batch)
        counts.append(seen.count)
    # of each layer that is one node 2 products forward and 4 backward, 2 sums for biases and 2 of states; 3 are joined for it
    assert counts[1] - counts[0] >= (2 + 4 + 2 + 2 - 3) * (LAYERS - 1)


def asked_of(memo: dict, batch: BatchInfo = NOTHING) -> joined.Asked:
    return joined.Asked(PARSED, 8, Scoring(8**-0.5), batch, "auto", memo)


def by_one_node(asked: joined.Asked, rows: int = 2, is_frozen: bool = False):
    """Projections, states that they project, and what a node gives of them."""
    torch.manual_seed(0)
    modules, states = [torch.nn.Linear(16, 16) for _ in range(3)], torch.randn(rows, 60, 16, requires_grad=True)
    for module in modules if is_frozen else ():
        module.requires_grad_(False)
    return modules, states, joined.joined_attention(states, modules, asked)


def test_gradients_within_autocast_are_those_without_it():
    grads = []
    for enabled in (False, True):
        modules, states, out = by_one_node(asked_of({}))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out.square().sum(), (states, modules[0].weight, modules[2].bias)))
    assert all(map(torch.equal, *grads))


def test_a_second_derivative_is_refused():
    _, states, out = by_one_node(asked_of({}))
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference' for create_graph=True"):
        torch.autograd.grad(out.square().sum(), states, create_graph=True)


def test_frozen_projections_cost_no_gradients():
    counts, grads = [], []
    for is_frozen in (False, True):
        _, states, out = by_one_node(asked_of({}), is_frozen=is_frozen)
        with Operations() as seen:
            out.sum().backward()
        counts.append(seen.count)
        grads.append(states.grad)
    # a product and a sum
    assert counts[0] - counts[1] >= 2 and torch.equal(*grads)


def test_batches_that_share_a_memo_have_plans_of_their_own():
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, 30:] = False
    memo, batches = {}, (NOTHING, of_batch(real, None, None))
    shared = [by_one_node(asked_of(memo, batch))[2] for batch in batches]
    alone = [by_one_node(asked_of({}, batch))[2] for batch in batches]
    assert all(map(torch.equal, shared, alone)) and not torch.equal(*shared)


def test_a_batch_without_rows():
    modules, states, out = by_one_node(asked_of({}), rows=0)
    out.sum().backward()
    assert out.shape == states.grad.shape == (0, 60, 16) and not modules[0].weight.grad.any()


@pytest.mark.parametrize(("dtype", "autocast", "holds"), [
    (torch.float64, True, False), (torch.float32, True, True), (torch.float32, False, False), (torch.float16, False, True),
])  # fmt: skip
def test_autocast_leaves_float64_alone(dtype, autocast, holds, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)
    size = torch.finfo(dtype).bits // 8
    states = SimpleNamespace(is_cuda=True, numel=lambda: 10, element_size=lambda: size, dtype=dtype)
    assert projections.is_host_bound(states) == holds


def distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The norm of all differences over that of all that is right."""
    one, right = (sum(float(pair[i].square().sum()) for pair in pairs) for i in (0, 1))
    return (one / right) ** 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["BertModel", "LongformerModel"])
def test_on_a_gpu_one_node_is_as_near_to_float64(head, monkeypatch):
    exact = sparse(head) if head == "BertModel" else sparse_hf.sparsify(stock_model(head))
    batch = inputs(head) if head == "BertModel" else longformers.inputs(head, 150, marks="few")
    right = trained(exact.double(), batch)
    batch = {name: t.cuda() for name, t in batch.items()}
    model, errors, seen, plain = exact.to("cuda", torch.bfloat16), [], [], joined._Joined.apply
    monkeypatch.setattr(joined._Joined, "apply", lambda *given: seen.append(1) or plain(*given))
    for _ in range(2):
        found = trained(model, batch)
        apart = [(a.double().cpu() - b, b) for a, b in zip(found, right, strict=True)]
        errors.append(max(distance(apart[:1]), distance(apart[1:])))
        assert bool(seen) == (not errors[1:])
        seen.clear()
        for patched in (joined, global_rows):
            monkeypatch.setattr(patched, "is_host_bound", lambda states: False)
    assert errors[0] <= 1.5 * errors[1] + 1e-3
