"""Export to ONNX: the graph holds no operator of ours and answers as the model does; tracing is refused in one line."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import sparse_hf
from tests.crosses import slow_but_for
from tests.models.bigbirds import sparse_model as bigbird
from tests.models.families import BATCH, LENGTH, VOCABULARY, dense_model, one_head
from tests.models.longformers import stock_model as longformer
from tests.models.perceivers import stock_model as perceiver
from tests.models.reformers import stock_model as reformer
from tests.models.test_ecosystem import sparse_model

# what decides which pairs there are: positions, blocks, heads, ids, lengths
PATTERNS = (
    "window(9, 3)", "window(9, 9) | first(2)", "window(9, 9) & stride(2) | first(1)", "window(5, 5) | last(3)", "chunk(16)",
    "bigbird(block_size=16)", "window(9, 9) | random_blocks(2, 16)", "per_head(window(3, 3), window(9, 0), stride(3), first(4))",
    "window(9, 9) | marked()", "window(9, 9) & outside(window(1, 1))",
)  # fmt: skip
# operators that ONNX does not know: ours, and those that are written in others here
UNKNOWN = ("sparse_hf", "cummax", "cummin", "searchsorted", "isin")
SIDES = ("none", "right", "left")
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


# families that are sparse by themselves
PUBLISHED = {
    "longformer": lambda: sparse_hf.sparsify(longformer("LongformerModel")),
    "bigbird": lambda: bigbird("BigBirdModel"),
    "reformer": lambda: sparse_hf.sparsify(reformer("ReformerModel")),
    "perceiver": lambda: sparse_hf.sparsify(perceiver("PerceiverForMaskedLM")),
}


class FirstOutput(nn.Module):
    """A model by its ids and mask, as exporters want them; no cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        cached = {"use_cache": False} if self.model.can_generate() else {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **cached)[0]


def batch_of(side: str, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if side == "right":
        mask[1, length - 17 :] = 0
    if side == "left":
        mask[0, :17] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def exported(model: nn.Module, monkeypatch) -> torch.export.ExportedProgram:
    """What exporters to ONNX translate."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    shapes = {name: {1: torch.export.Dim("length", min=4, max=500)} for name in batch_of("right")}
    with torch.no_grad():
        program = torch.export.export(
            FirstOutput(model).eval(), (), batch_of("right"), dynamic_shapes=shapes, strict=False
        )
    monkeypatch.undo()
    return program


def assert_alike(found: torch.Tensor, model: nn.Module, batch: dict) -> None:
    with torch.no_grad():
        wanted = FirstOutput(model)(**batch)
    real = batch["attention_mask"].bool() if wanted.shape[:2] == batch["attention_mask"].shape else ...
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-4)


def check(model: nn.Module, monkeypatch) -> None:
    program = exported(model, monkeypatch)
    called = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in called if any(word in name for word in UNKNOWN)]
    for side in SIDES:
        for length in (LENGTH, 77):
            batch = batch_of(side, length)
            assert_alike(program.module()(**batch), model, batch)


def test_patterns_are_written_out(monkeypatch):
    """Each in a layer of its own."""
    dense = dense_model("BertModel", num_hidden_layers=len(PATTERNS))
    layers = [sparse_hf.Pattern.parse(pattern) for pattern in PATTERNS]
    check(sparse_hf.sparsify(dense, "window(3, 3)", layers=layers, global_token_ids=[5, 6, 7]).eval(), monkeypatch)


@pytest.mark.parametrize(
    "head", slow_but_for(["DistilBertForMaskedLM", "T5EncoderModel"], [*one_head(encoder=True), "T5EncoderModel"])
)
def test_encoders_are_written_out(head, monkeypatch):
    layers = "decoder=dense" if head.startswith("T5") else None
    check(sparse_hf.sparsify(dense_model(head), "window(9, 9) | first(1)", layers=layers).eval(), monkeypatch)


@pytest.mark.parametrize(
    "head",
    slow_but_for(
        ["Gemma3ForCausalLM"], ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM", "Qwen2ForCausalLM"]
    ),
)
def test_decoders_are_written_out(head, monkeypatch):
    """Without a cache, as embeddings and scores are computed."""
    check(sparse_hf.sparsify(dense_model(head), "window(19, 0) | first(2)").eval(), monkeypatch)


def test_families_that_are_sparse_by_themselves_are_written_out(monkeypatch):
    check(sparse_hf.sparsify(longformer("LongformerModel")).eval(), monkeypatch)


def test_packed_documents_stay_apart(monkeypatch):
    model = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(9, 0) | first(1)").eval()

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, position_ids):
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    ids = batch_of("none", 40)["input_ids"]
    begins = torch.cat([torch.arange(25), torch.arange(15)]).expand_as(ids).contiguous()
    whole = torch.arange(40).expand_as(ids).contiguous()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with torch.no_grad():
        program = torch.export.export(Packed(), (), {"input_ids": ids, "position_ids": begins}, strict=False)
        monkeypatch.undo()
        for positions in (begins, whole):
            found = program.module()(input_ids=ids, position_ids=positions)
            torch.testing.assert_close(found, Packed()(ids, positions), atol=1e-5, rtol=1e-4)


def test_pairs_by_content_are_refused(monkeypatch):
    model = sparse_hf.sparsify(dense_model("BertModel"), "lsh(2, 8) | window(3, 3)").eval()
    with pytest.raises(Exception, match="chooses pairs by what queries and keys hold, which is not exported to ONNX"):
        exported(model, monkeypatch)


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript and onnxruntime")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_onnxruntime_answers_alike(head, tmp_path):
    import onnxruntime

    model = FirstOutput(sparse_hf.sparsify(dense_model(head), "window(9, 9) | first(1)")).eval()
    shapes = {name: {1: torch.export.Dim("length", min=4, max=500)} for name in batch_of("right")}
    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs=batch_of("right"), dynamo=True, verbose=False, dynamic_shapes=shapes
        )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for side in SIDES:
        batch = batch_of(side, 77)
        (found,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
        assert_alike(torch.from_numpy(found), model.model, batch)


# --- tracing ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "head", slow_but_for(["ModernBertForMaskedLM", "LlamaForCausalLM"], [*one_head(encoder=True), "LlamaForCausalLM"])
)
def test_tracing_is_refused_and_leaves_nothing_behind(head):
    """It would keep the first batch's mask; afterwards the same process computes and exports as before."""
    model = sparse_model(head).eval()
    batch = batch_of("right")
    wrapped = FirstOutput(model).eval()
    with torch.no_grad():
        before = wrapped(**batch)
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="torch.jit.trace would keep the mask of the example"):
                torch.jit.trace(wrapped, tuple(batch.values()), strict=False)
        assert torch.equal(wrapped(**batch), before)
        other = batch_of("left", 77)
        assert_alike(torch.export.export(wrapped, (), other).module()(**other), model, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PUBLISHED)
def test_tracing_families_that_are_sparse_by_themselves_is_refused(family):
    model = PUBLISHED[family]().eval()
    length = 64 if family in ("reformer", "perceiver") else LENGTH
    with torch.no_grad(), pytest.raises(NotImplementedError, match="torch.jit.trace would keep"):
        torch.jit.trace(FirstOutput(model).eval(), tuple(batch_of("right", length).values()), strict=False)
