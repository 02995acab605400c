"""DeBERTa: scores that depend on content and distance, against Transformers' classes under the same mask of pairs."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.models.families import COMMON

PATTERN, LENGTH = "window(20, 9) | first(2)", 150
# the dense classes have a scale and a norm in single precision
NEAR = {"atol": 2e-6, "rtol": 2e-5}
BOTH = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# as published (v3, v1), with far distances in one row, with a convolution, with one part of the scores, with none
V3 = {
    **BOTH,
    "position_buckets": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
CASES = {
    "v3": ("DebertaV2", V3),
    "v1": ("Deberta", {**BOTH, "position_biased_input": False}),
    "near": ("Deberta", {**BOTH, "max_relative_positions": 20}),
    "convolution": ("DebertaV2", {**BOTH, "position_buckets": 8, "conv_kernel_size": 3}),
    "queries": ("DebertaV2", {**BOTH, "pos_att_type": ["c2p"], "position_buckets": 8}),
    "keys": ("Deberta", {**BOTH, "pos_att_type": ["p2c"]}),
    "absolute": ("DebertaV2", {}),
}


def dense_model(case: str, head: str = "ForMaskedLM", **changes):
    name, fields = CASES[case]
    kind = getattr(transformers, name + head)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**COMMON, **fields, **changes})).eval().double()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    return model


def text(rows: int = 2, length: int = LENGTH):
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[0, length - 30 :], real[-1, :31] = 0, 0
    return ids, real


def under_the_mask(dense, ids, real, held):
    with patch.object(dense.base_model.encoder, "get_attention_mask", lambda _: held):
        return dense(ids, attention_mask=real).logits[real.bool()]


@pytest.mark.cross
@pytest.mark.parametrize("pattern", [PATTERN, "per_head(window(3, 3), window(40, 0), first(2), full())"])
@pytest.mark.parametrize("case", CASES)
def test_answers_and_gradients(case, pattern):
    dense, (ids, real) = dense_model(case), text()
    sparse = sparse_hf.sparsify(dense, pattern)
    found = sparse(ids, attention_mask=real).logits[real.bool()]
    wanted = under_the_mask(dense, ids, real, oracle.dense_mask(pattern, LENGTH, LENGTH, real))
    torch.testing.assert_close(found, wanted, **NEAR)
    assert (dense(ids, attention_mask=real).logits[real.bool()] - wanted).abs().max() > 0.1
    grads = [torch.autograd.grad(t.square().mean(), list(m.parameters()), allow_unused=True) for m, t in
             ((sparse, found), (dense, wanted))]  # fmt: skip
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **NEAR)


def test_padding_inside_a_row():
    """Patterns count real tokens, and distances of scores count all, as those of the dense class."""
    dense, (ids, real) = dense_model("v3"), text()
    real[:, 60:70] = 0
    place, pattern = (real.cumsum(1) - 1).clamp(min=0), sparse_hf.Pattern.parse(PATTERN)
    held = pattern.allows(place[:, :, None], place[:, None, :]) & (real[:, :, None] * real[:, None, :]).bool()
    found = sparse_hf.sparsify(dense, PATTERN)(ids, attention_mask=real).logits[real.bool()]
    torch.testing.assert_close(found, under_the_mask(dense, ids, real, held[:, None]), **NEAR)


def test_a_mask_of_pairs_holds_beside_the_pattern():
    dense = dense_model("v1")
    pairs = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() <= 5
    mask = pairs.long().expand(2, -1, -1)
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    of_sparse, of_dense = (m.base_model.encoder(states, mask, return_dict=True)[0] for m in (sparse, dense))
    torch.testing.assert_close(of_sparse, of_dense, **NEAR)


def test_no_tensor_has_two_lengths():
    length, changes = 2048, {"max_position_embeddings": 2048, "max_relative_positions": 64}
    sparse = sparse_hf.sparsify(dense_model("v3", **changes), PATTERN)
    with AllocationInterceptor(length) as seen:
        sparse(torch.randint(3, 97, (1, length)), labels=torch.randint(3, 97, (1, length))).loss.backward()
    assert not seen.quadratic


def test_dropout_is_drawn_again_for_gradients():
    sparse = sparse_hf.sparsify(dense_model("v1", attention_probs_dropout_prob=0.3), PATTERN).train()
    ids, _ = text()
    weight = sparse.base_model.encoder.layer[0].attention.self.in_proj.weight
    torch.manual_seed(5)
    loss = sparse(ids).logits.square().mean()
    (grad,) = torch.autograd.grad(loss, weight)
    step = 1e-3 * grad / grad.norm()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight.add_(step, alpha=sign)
            torch.manual_seed(5)
            losses.append(sparse(ids).logits.square().mean())
            weight.sub_(step, alpha=sign)
    assert float((losses[0] - losses[1]) / 2e-3) == pytest.approx(float(grad.norm()), rel=1e-2)


@pytest.mark.parametrize("has_table", [False, True])
def test_a_longer_model_has_the_same_distances(has_table, tmp_path):
    dense = dense_model("v1", max_position_embeddings=64, position_biased_input=has_table).float()
    dense.save_pretrained(tmp_path / "dense")
    sparse_hf.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, max_length=256, progress=False)
    sparse = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse").eval()
    assert sparse.config.max_relative_positions == 64 and sparse.config.max_position_embeddings == 256
    ids = torch.randint(3, 97, (1, 60))
    with torch.no_grad():
        held = oracle.dense_mask(PATTERN, 60, 60)
        wanted = under_the_mask(dense, ids, torch.ones_like(ids), held)
        torch.testing.assert_close(sparse(ids).logits[0], wanted, atol=1e-4, rtol=1e-4)
    assert sparse(torch.randint(3, 97, (1, 250))).logits.isfinite().all()


def test_weights_for_looking_at_a_short_text():
    dense, (ids, real) = dense_model("v3"), text()
    sparse = sparse_hf.sparsify(dense, PATTERN)
    sparse.set_attn_implementation("sparse_reference")
    held = oracle.dense_mask(PATTERN, LENGTH, LENGTH, real)
    with patch.object(dense.base_model.encoder, "get_attention_mask", lambda _: held):
        wanted = dense(ids, attention_mask=real, output_attentions=True).attentions
    found = sparse(ids, attention_mask=real, output_attentions=True).attentions
    queries = real.bool()[:, None].expand(-1, 4, -1)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[queries], other[queries], **NEAR)


def test_heads_that_are_mixed_are_refused():
    with pytest.raises(NotImplementedError, match="talking_head mixes the scores of heads"):
        sparse_hf.sparsify(dense_model("v1", talking_head=True), PATTERN)(text()[0])
