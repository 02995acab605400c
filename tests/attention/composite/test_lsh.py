"""`lsh(...)` against its definition, in attention and in models."""

from __future__ import annotations

import pytest
import torch

import sparse_hf
from sparse_hf import Pattern, sparse_attention
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.attention import hashes
from tests.attention.hashes import PATTERNS
from tests.models.families import dense_model

SCENARIOS = ["plain", "last queries", "left padding", "right padding", "packed"]


def tensors(length: int, queries: int, dtype=torch.float64):
    torch.manual_seed(length)
    q = torch.randn(2, 4, queries, 16, dtype=dtype)
    # keys of very different length, as real ones are
    k = torch.randn(2, 2, length, 16, dtype=dtype) * torch.rand(2, 2, length, 1, dtype=dtype) * 3
    return q, k, torch.randn(2, 2, length, 16, dtype=dtype)


def batch_of(name: str, length: int) -> dict[str, torch.Tensor]:
    real = torch.ones(2, length, dtype=torch.bool)
    if name == "left padding":
        real[0, : length // 3] = False
    elif name == "right padding":
        real[1, length // 2 :] = False
    elif name == "packed":
        return {"segment_ids": (torch.arange(length) * 3 // length).expand(2, length)}
    else:
        return {}
    return {"key_padding_mask": real}


@pytest.mark.cross
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("text", PATTERNS)
def test_equals_the_definition(text, name):
    length = 60
    queries = 25 if name == "last queries" else length
    q, k, v = tensors(length, queries)
    batch = batch_of(name, length)
    mask = hashes.mask_of(text, q, k, {"real": batch.get("key_padding_mask"), "documents": batch.get("segment_ids")})
    wanted = oracle.gradients(lambda *given: oracle.attention(*given, mask), q, k, v)
    for backend in ("reference", "blockwise"):
        options = {"backend": backend, "return_lse": True, **batch}
        found = oracle.gradients(lambda *given: sparse_attention(*given, text, **options), q, k, v)  # noqa: B023
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.cross
@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("text", [*PATTERNS, "window(9, 9)"])
def test_compiled_gradients(text, backend):
    torch._dynamo.reset()

    def attend(q, k, v):
        return sparse_attention(q, k, v, text, backend=backend, return_lse=True)

    plain = oracle.gradients(attend, *tensors(90, 90))
    compiled = oracle.gradients(torch.compile(attend, fullgraph=True, backend="aot_eager"), *tensors(90, 90))
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", PATTERNS)
def test_backends_agree_on_dropout(text):
    q, k, v = tensors(200, 200)
    found = []
    for backend in ("reference", "blockwise"):
        torch.manual_seed(5)
        found.append(sparse_attention(q, k, v, text, backend=backend, dropout=0.4))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_no_tensor_has_two_lengths():
    length = 8_256
    q, k, v = (t.requires_grad_() for t in tensors(length, length, torch.float32))
    with AllocationInterceptor(length) as seen:
        sparse_attention(q, k, v, "(window(64, 0) | lsh((16, 16), 2, 64)) & window(None, 0)").sum().backward()
    assert not seen.quadratic


def test_hashing_finds_large_products():
    torch.manual_seed(0)
    k = torch.randn(1, 4, 1024, 32)
    q = k.flip(2) + 0.1 * torch.randn_like(k)
    weights = (q @ k.mT * 32**-0.5).softmax(-1)
    recalls = []
    for rounds in (1, 4, 16):
        plan = sparse_attention(q, k, torch.eye(1024).expand(1, 4, -1, -1), f"lsh(16, {rounds}, 1024)")
        recalls.append(float(weights[plan > 0].sum() / weights.sum()))
    # more rounds find more, and one finds more than the sixteenth that chance would
    assert 0.12 < recalls[0] < recalls[1] < recalls[2] and recalls[2] > 0.8


LSH = "window(8, 0) | lsh(4, 2, 8)"


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_generates_the_same_with_a_cache_and_padded(head):
    ours = sparse_hf.sparsify(dense_model(head), LSH)
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = ours.generate(ids, **options)
    assert torch.equal(found, ours.generate(ids, **options, use_cache=False))
    padded = torch.nn.functional.pad(ids, (11, 0))
    assert torch.equal(ours.generate(padded, attention_mask=(padded > 0).long(), **options)[:, 11:], found)


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_in_a_model(head, tmp_path):
    torch._dynamo.reset()
    dense = dense_model(head, num_hidden_layers=1)
    ours = sparse_hf.sparsify(dense, LSH if head[0] == "L" else "window(8, 8) | lsh(4, 2, 8)")
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    wanted = ours(input_ids=ids, labels=ids)
    wanted.loss.backward()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(input_ids=ids, labels=ids)
    grads = torch.autograd.grad(compiled.loss, list(ours.parameters()), allow_unused=True)
    torch.testing.assert_close(compiled.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    for parameter, grad in zip(ours.parameters(), grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path, attn_implementation="sparse_reference").eval()
    outputs = again(input_ids=ids, output_attentions=True)
    torch.testing.assert_close(outputs.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert outputs.attentions[0].shape == (2, 4, 70, 70)


def test_packed_equals_separate():
    ours = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), LSH)
    one, two = (torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (50, 37))
    places = torch.cat([torch.arange(50), torch.arange(37)])[None]
    packed = ours(torch.cat([one, two], 1), position_ids=places).logits
    torch.testing.assert_close(packed, torch.cat([ours(t).logits for t in (one, two)], 1), rtol=1e-4, atol=1e-5)


def _attend(text: str, **options):
    return lambda: sparse_attention(*tensors(40, 40), text, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pattern.parse("lsh(7)"), "must be even"),
        (lambda: Pattern.parse("lsh(None)"), "give their number"),
        (lambda: Pattern.parse("per_head(lsh(8), lsh(8))"), "use it alone"),
        (lambda: sparse_hf.build_plan("lsh(8)", 40), "pass the pattern itself"),
        (_attend("lsh(8) & lsh(4)"), "two hashes or choices cannot"),
        (_attend("lsh_chunks(8)"), r"other models take lsh\(...\)"),
        (_attend("lsh(8)", backend="flex"), "cannot run lsh"),
        (_attend("lsh(8)", softcap=3.0), "does not go with softcap"),
        (lambda: sparse_hf.sparsify(dense_model("LlamaForCausalLM"), LSH)(
            torch.full((1, 40), 5), attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool)), "2-D attention mask"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call()
