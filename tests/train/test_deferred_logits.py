"""Logits that are not made yet: whatever is done to them gives what whole logits give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.utils import logging

from sparse_hf.train.deferred_logits import DeferredLogits, Recipe, defer

B, L, D, V = 2, 30, 8, 13


def parts(dtype=torch.float64):
    made = [torch.randn(*shape, dtype=dtype) for shape in ((B, L, D), (V, D), (V,))]
    return [t.requires_grad_() for t in made]


def both(function, dtype=torch.float64):
    """What a function of logits gives, and its gradients, of whole logits and of those that are not made."""
    given = parts(dtype)
    results = []
    for make in (F.linear, lambda *a: defer(*a, Recipe(piece=7, autocast=None))):
        found = function(make(*given))
        value = found.double().square().sum() if found.dim() else found
        results.append((found, torch.autograd.grad(value, given, allow_unused=True)))
    return results


LABELS = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1)).masked_fill(
    torch.arange(L) % 4 == 0, -100
)
BIAS, ROWS = torch.arange(V, dtype=torch.float64)[None], torch.arange(L) % 3 > 0
# what keeps logits from being made
KEPT = {
    "slice": lambda x: x[:, 3:-1],
    "slice of all": lambda x: x[..., :-1, :],
    "slice of words": lambda x: x[:, 2:, :],
    "one token": lambda x: x[:, -1],
    "rows": lambda x: x[:, ROWS],
    "mask": lambda x: x[LABELS != -100],
    "numbers": lambda x: x[torch.arange(B), torch.tensor([3, 5])],
    "new dimension": lambda x: x[None],
    "view": lambda x: x.view(-1, V),
    "view of a size": lambda x: x.view(-1, x.size(-1)),
    "rest": lambda x: x.reshape(B * L, -1),
    "shape": lambda x: x.reshape((L, B, V)),
    "flatten": lambda x: x.flatten(0, 1),
    "transpose": lambda x: x.transpose(0, 1),
    "contiguous": lambda x: x[:, 1:].contiguous(),
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.bfloat16),
    "to itself": lambda x: x.to(x.device),
    "scale": lambda x: 2 * x / 3,
    "scale in a tensor": lambda x: x * torch.tensor(0.5),
    "cap": lambda x: torch.tanh(x / 5) * 5,
    "cap by methods": lambda x: (x / 5).tanh().mul(5),
    "bias": lambda x: x + BIAS,
}
# what makes them
MADE = {
    "words": lambda x: x[..., :5],
    "list": lambda x: x[:, [1, 2]],
    "one word": lambda x: x[:, :, 3],
    "softmax": lambda x: x.float().softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x[:, :-1], dim=-1),
    "transpose of words": lambda x: x.transpose(1, 2),
    "view of words": lambda x: x.view(-1),
    "flatten all": lambda x: x.flatten(),
    "options by name": lambda x: x.flatten(start_dim=0, end_dim=1),
    "transpose by name": lambda x: x.transpose(dim0=0, dim1=1),
    "add by name": lambda x: torch.add(x, 2, alpha=3),
    "size by name": lambda x: x.view(size=(-1, V)),
    "sum": lambda x: x.sum(),
    "two": lambda x: x * x,
    "bias of tokens": lambda x: x + torch.arange(L, dtype=torch.float64)[:, None],
    "cat": lambda x: torch.cat([x, x[:, :3]], 1),
    "bmm": lambda x: x @ torch.ones(V, 2, dtype=torch.float64),
}


@pytest.mark.parametrize("name", KEPT)
def test_steps_that_leave_logits_unmade(name):
    (wanted, grads), (found, ours) = both(lambda x: KEPT[name](x))
    assert isinstance(found, DeferredLogits)
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    torch.testing.assert_close(found + torch.zeros_like(wanted), wanted)
    for one, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MADE)
def test_all_else_makes_logits(name):
    (wanted, grads), (found, ours) = both(MADE[name])
    assert not isinstance(found, DeferredLogits)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"reduction": "sum"}, {"label_smoothing": 0.2}, {"ignore_index": 3}, {"reduction": "none"},
        {"weight": True}, {"reduction": "sum", "label_smoothing": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_the_loss(dtype, options):
    options = {**options, "weight": torch.rand(V, dtype=dtype)} if "weight" in options else options
    labels = LABELS.flatten().clamp(min=0) if "ignore_index" in options else LABELS.flatten()
    (wanted, grads), (found, ours) = both(lambda x: F.cross_entropy((x / 3).view(-1, V), labels, **options), dtype)
    assert found.dtype == wanted.dtype and not isinstance(found, DeferredLogits)
    torch.testing.assert_close(found, wanted)
    tolerance = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {}
    for one, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}], ids=str)
def test_losses_of_each_token_are_in_pieces_where_nobody_learns(dtype, options):
    given, labels = parts(dtype), LABELS.flatten()
    with torch.no_grad():
        logits = defer(*given, Recipe(7, None))[:, :-1].float()
        found = F.cross_entropy(logits.view(-1, V), LABELS[:, 1:].flatten(), reduction="none", **options)
        whole = F.linear(*given)[:, :-1].float()
        wanted = F.cross_entropy(whole.view(-1, V), LABELS[:, 1:].flatten(), reduction="none", **options)
    assert logits.made is None
    torch.testing.assert_close(found, wanted)
    # logits of a graph that nobody asks for
    logits = defer(*given, Recipe(7, None)).view(-1, V)
    with torch.no_grad():
        F.cross_entropy(logits, labels, reduction="none", **options)
    assert logits.made is None and logits.requires_grad


def test_gradients_of_sure_answers_are_rounded_once():
    """Of a probability near 1, one less keeps few digits in bfloat16."""
    hidden, weight = torch.eye(4, dtype=torch.bfloat16) * 6, torch.eye(4, dtype=torch.bfloat16).requires_grad_()
    labels = torch.arange(4)
    F.cross_entropy(defer(hidden, weight, None, Recipe(4, None)), labels).backward()
    exact = weight.detach().float().requires_grad_()
    F.cross_entropy(F.linear(hidden.float(), exact), labels).backward()
    torch.testing.assert_close(weight.grad.float(), exact.grad, rtol=2**-7, atol=0)


def test_only_what_wants_a_gradient_gets_one():
    hidden, weight, bias = parts()
    weight.requires_grad_(False)
    logits = defer(hidden, weight, bias, Recipe(7, None)).view(-1, V)
    F.cross_entropy(logits, LABELS.flatten()).backward()
    assert weight.grad is None and hidden.grad is not None and bias.grad is not None
    with torch.no_grad():
        assert not F.cross_entropy(
            defer(hidden, weight, bias, Recipe(7, None)).view(-1, V), LABELS.flatten()
        ).requires_grad


def test_a_graph_that_is_kept_gives_the_same_twice():
    given = parts()
    loss = F.cross_entropy(defer(*given, Recipe(7, None)).view(-1, V), LABELS.flatten())
    once, twice = (torch.autograd.grad(loss, given, retain_graph=True) for _ in range(2))
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_second_derivatives_are_refused():
    given = parts()
    logits = defer(*given, Recipe(7, None)).view(-1, V)
    for output in (F.cross_entropy(logits, LABELS.flatten()), Double.apply(logits).square().sum()):
        with pytest.raises(RuntimeError, match=r"long_text has no second derivative; call remove\(\)"):
            torch.autograd.grad(output, given, create_graph=True)


class Double(torch.autograd.Function):
    """A function of one's own, whose gradient says that it was this one."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class Same(Double):
    @staticmethod
    def forward(ctx, x):
        return x


class Sum(Double):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return F.cross_entropy(x.view(-1, V), LABELS.flatten())

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(ctx.shape)


@pytest.mark.parametrize("function", [Double, Same, Sum])
def test_a_function_of_ones_own(function):
    (wanted, grads), (found, ours) = both(function.apply)
    torch.testing.assert_close(found + 0, wanted)
    for one, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_hook_on_logits_stays():
    seen = []

    def hooked(x):
        x.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        return Double.apply(x)

    (wanted, grads), (found, ours) = both(hooked)
    torch.testing.assert_close(found, wanted)
    assert len(seen) == 2
    for one, other in zip((seen[1], *ours), (seen[0], *grads), strict=True):
        torch.testing.assert_close(one, other)


def test_the_message_of_whole_logits(monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("sparse_hf.train.deferred_logits"), "warning_once", said.append)
    logits = defer(*parts(), Recipe(7, None))
    assert "DeferredLogits(shape=(2, 30, 13)" in repr(logits) and not said
    logits.argmax(-1)
    logits.softmax(-1)
    assert len(said) == 1 and said[0].startswith("`argmax` needs whole logits, which take 104 bytes for each token")


def test_labels_of_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="logits of 60 tokens, and 59 labels"):
        F.cross_entropy(defer(*parts(), Recipe(7, None)).view(-1, V), LABELS.flatten()[1:])


def test_detached_logits_give_no_gradient():
    logits = defer(*parts(), Recipe(7, None)).detach()
    assert isinstance(logits, DeferredLogits) and not logits.requires_grad
    assert not F.cross_entropy(logits.view(-1, V), LABELS.flatten()).requires_grad
