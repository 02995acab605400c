"""Collators mark what they say; packed rows give what their documents give apart."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    BertConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)

import sparse_hf
from examples import tiny
from sparse_hf.train import (
    CheckedCollator,
    MarkHeaders,
    MarkQuestion,
    MarkTokens,
    PackDocuments,
    PackedCollator,
    first_position,
)
from tests.models.families import dense_model
from tests.models.longformers import stock_model
from tests.models.reformers import stock_model as reformer_model

HEADER = r"^Article \d+$"
IDS = [1, 63, 100, 5, 40]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def encoded(tokenizer, count=3, **options):
    texts = [example["text"] for example in tiny.texts(count)]
    return [{"text": t, **tokenizer(t, return_offsets_mapping=True, **options)} for t in texts]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("decodes", [False, True], ids=["offsets", "decoded"])
def test_mark_headers_marks_the_tokens_of_headers(tokenizer, side, decodes):
    tokenizer.padding_side = side
    features = encoded(tokenizer)
    if decodes:
        features = [{"input_ids": f["input_ids"]} for f in features]
    batch = MarkHeaders(DataCollatorWithPadding(tokenizer), HEADER, tokenizer)(features)
    tokenizer.padding_side = "right"
    assert set(batch) >= {"input_ids", "attention_mask", "global_attention_mask"} and "text" not in batch
    for ids, marks, example in zip(batch["input_ids"], batch["global_attention_mask"], tiny.texts(3), strict=True):
        headers = [line for line in example["text"].split("\n") if line.startswith("Article")]
        marked = tokenizer.decode(ids[marks.bool()])
        assert marked == "".join(headers)


def test_mark_headers_says_what_is_missing(tokenizer):
    inner = DataCollatorWithPadding(tokenizer)
    row = {"input_ids": [2, 9, 3]}
    with pytest.raises(ValueError, match="remove_unused_columns=False, or pass a tokenizer"):
        MarkHeaders(inner, HEADER)([row])
    with pytest.raises(ValueError, match="no regular expression"):
        MarkHeaders(inner, "(")
    with pytest.raises(ValueError, match="offset_mapping has shape"):
        MarkHeaders(inner, HEADER)([{**row, "text": "a", "offset_mapping": [(0, 1)]}])


def test_mark_headers_refuses_a_tokenizer_that_drops_lines():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    with pytest.raises(ValueError, match="drops line breaks"):
        MarkHeaders(DataCollatorWithPadding(words), HEADER, words)([{"input_ids": [1, 2]}])


def test_mark_question_marks_up_to_the_first_separator(tokenizer):
    features = [tokenizer("how does it begin", "the court"), tokenizer("a", "the old ship sailed over waves")]
    batch = MarkQuestion(DataCollatorWithPadding(tokenizer), tokenizer.sep_token_id)(features)
    assert batch["global_attention_mask"].sum(1).tolist() == [f["input_ids"].index(3) for f in features]
    with pytest.raises(ValueError, match="no separator"):
        MarkQuestion(DataCollatorWithPadding(tokenizer), 3)([{"input_ids": [2, 9]}])
    with pytest.raises(ValueError, match="separator_id is None"):
        MarkQuestion(DataCollatorWithPadding(tokenizer), None)


def test_marks_compose_and_masking_hides_none(tokenizer):
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9, seed=0)
    features = encoded(tokenizer)
    batch = MarkTokens(MarkHeaders(masking, HEADER), [tokenizer.cls_token_id])(features)
    apart = [m(DataCollatorWithPadding(tokenizer))(features)["global_attention_mask"] for m in (headers, classes)]
    assert (
        torch.equal(batch["global_attention_mask"], apart[0] | apart[1]) and batch["global_attention_mask"][:, 0].all()
    )
    assert (batch["labels"] != -100).any()
    given = [{"input_ids": [2, 9, 10, 3], "global_attention_mask": [0, 0, 1, 0]}]
    assert classes(DataCollatorWithPadding(tokenizer))(given)["global_attention_mask"].tolist() == [[1, 0, 1, 0]]


def headers(inner):
    return MarkHeaders(inner, HEADER)


def classes(inner):
    return MarkTokens(inner, [2])


def test_marks_beside_seq2seq(tokenizer):
    features = [{**f, "labels": f["input_ids"][:4]} for f in encoded(tokenizer)]
    batch = headers(DataCollatorForSeq2Seq(tokenizer))(features)
    assert batch["labels"].shape == (3, 4) and batch["global_attention_mask"].shape == batch["input_ids"].shape


def test_padding_of_the_features_is_never_marked(tokenizer):
    row = tokenizer("the", padding="max_length", max_length=8)
    marked = MarkTokens(DataCollatorWithPadding(tokenizer), [tokenizer.pad_token_id, tokenizer.cls_token_id])([row])
    assert marked["global_attention_mask"].tolist() == [[1] + 7 * [0]]


@pytest.mark.parametrize("ids", [[], [None], [True], [-1]])
def test_mark_tokens_refuses_what_is_no_id(tokenizer, ids):
    with pytest.raises(ValueError, match="token_ids"):
        MarkTokens(DataCollatorWithPadding(tokenizer), ids)


def test_marks_need_a_row_for_each_feature(tokenizer):
    from transformers import DataCollatorWithFlattening

    with pytest.raises(ValueError, match="made 1 rows of 2 features"):
        classes(DataCollatorWithFlattening())([{"input_ids": [2, 3]}, {"input_ids": [2, 9, 3]}])


# --- packing


def documents(sizes=IDS):
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": [torch.randint(5, 97, (size,), generator=generator).tolist() for size in sizes]}


@pytest.mark.parametrize("length", [1, 7, 63, 64, 257])
def test_packed_rows_hold_every_token_once(length):
    rows = PackDocuments(length)(documents())
    assert all(len(row) <= length for row in rows["input_ids"])
    assert sorted(sum(rows["input_ids"], [])) == sorted(sum(documents()["input_ids"], []))
    pieces = [ids[at : at + length] for ids in documents()["input_ids"] for at in range(0, len(ids), length)]
    found = []
    for ids, positions in zip(rows["input_ids"], rows["position_ids"], strict=True):
        starts = [*(i for i, p in enumerate(positions) if p == 0), len(ids)]
        found += [ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        assert positions == [p for a, b in zip(starts, starts[1:], strict=False) for p in range(b - a)]
    assert sorted(found) == sorted(pieces)


def test_packing_refuses_what_has_no_place():
    with pytest.raises(ValueError, match="labels has 1 values for a document of 2"):
        PackDocuments(8)({"input_ids": [[1, 2]], "labels": [0]})
    with pytest.raises(ValueError, match="tokenize it"):
        PackDocuments(8)({"text": ["a"]})
    with pytest.raises(ValueError, match="length is 0"):
        PackDocuments(0)
    with pytest.raises(ValueError, match="no position_ids"):
        PackedCollator(DataCollatorWithPadding(tiny.tokenizer()))([{"input_ids": [1]}])


def test_first_position_is_the_family_s():
    configs = [BertConfig(), LlamaConfig(), RobertaConfig()]
    assert [first_position(config) for config in configs] == [0, 0, 2]
    assert first_position(sparse_hf.SparseRobertaConfig.from_dense(RobertaConfig(), "window(1, 1)")) == 2


@pytest.mark.parametrize("streams", [False, True])
def test_packing_is_a_map_of_datasets(streams):
    made = Dataset.from_dict({**documents(), "label": [0] * len(IDS)})
    made = made.to_iterable_dataset() if streams else made
    assert isinstance(made, IterableDataset) == streams
    rows = list(made.map(PackDocuments(64), batched=True, remove_columns=["input_ids", "label"]))
    assert set(rows[0]) == {"input_ids", "position_ids"} and sum(len(r["input_ids"]) for r in rows) == sum(IDS)


def pad(features):
    """Pads, and keeps the labels that the test made."""
    made = DataCollatorWithPadding(tiny.tokenizer())([{"input_ids": f["input_ids"]} for f in features])
    labels = [torch.tensor(f["labels"]) for f in features]
    made["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return made


# of each way in which attention learns of positions: with the layers' arguments, or beside them
# where the dense class keeps `position_ids` to itself, or by a model of our own
PACKED = ["Bert", "Roberta", "ModernBert", "DistilBert", "Longformer"]


@pytest.mark.parametrize("head", [*(f"{name}ForMaskedLM" for name in PACKED), "LlamaForCausalLM"])
def test_packed_loss_and_gradients_are_those_of_documents_apart(head):
    is_longformer = head.startswith("Longformer")
    # a window of its own, and marks with projections of their own
    model = (
        sparse_hf.sparsify(stock_model(head))
        if is_longformer
        else sparse_hf.sparsify(dense_model(head), "window(5, 5) | first(2) | marked()")
    )
    causal = "Causal" in head
    sizes = [1, 63, 60, 5, 40, 20]
    made = documents(sizes)
    made["labels"] = [ids if causal else [i if i % 3 else -100 for i in ids] for ids in made["input_ids"]]
    made["global_attention_mask"] = [[int(i % 11 == 0) for i in ids] for ids in made["input_ids"]]
    start = first_position(model.config)

    def summed(length):
        columns = PackDocuments(length, start)(made)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        model.zero_grad()
        total = 0.0
        for at in range(0, len(rows), 2):
            batch = PackedCollator(pad, causal)(rows[at : at + 2])
            loss = model(**batch, num_items_in_batch=torch.tensor(100)).loss
            loss.backward()
            total += float(loss.detach())
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(rows)

    together, grads, few = summed(70)
    # one document a row, as nothing else fits beside it
    apart = {key: torch.zeros_like(grad) for key, grad in grads.items()}
    total = 0.0
    for row in range(len(sizes)):
        batch = {name: torch.tensor(column[row])[None] for name, column in made.items()}
        if not (batch["labels"][:, int(causal) :] != -100).any():
            continue
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=torch.tensor(100)).loss
        loss.backward()
        total += float(loss.detach())
        for name, p in model.named_parameters():
            apart[name] += 0 if p.grad is None else p.grad
    assert few < len(sizes)
    assert together == pytest.approx(total, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, apart[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def packed_row(model) -> dict[str, torch.Tensor]:
    """Two documents in a row, as `PackedCollator` makes them, and checked."""
    columns = PackDocuments(64, first_position(model.config))(documents([20, 30]))
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    collator = PackedCollator(lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])})
    return dict(CheckedCollator(collator, model)(rows))


@pytest.mark.parametrize(
    "make", ["BartForConditionalGeneration", "BartForCausalLM", "T5ForConditionalGeneration", "Reformer"]
)
def test_models_that_keep_no_documents_apart_refuse_packed_rows(make):
    """What has no `position_ids`, or chunks of whole rows, would mix them."""
    if make == "Reformer":
        model = sparse_hf.sparsify(reformer_model("ReformerForMaskedLM"))
    else:
        model = sparse_hf.sparsify(dense_model(make), "window(5, 5)")
    with pytest.raises(ValueError, match="position_ids"):
        model(**packed_row(model), **({"labels": torch.tensor([[5]])} if "Conditional" in make else {}))


def test_trainer_takes_packed_rows_and_marks(tokenizer, tmp_path):
    seen = []
    model = sparse_hf.sparsify(dense_model("LlamaForCausalLM", vocab_size=len(tokenizer)), "window(5, 0) | marked()")
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    rows = Dataset.from_list(encoded(tokenizer)).map(
        PackDocuments(64), batched=True, remove_columns=["text", "offset_mapping", "attention_mask"]
    )
    causal = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(model, arguments, classes(PackedCollator(causal, causal=True)), rows)
    trainer.train()
    assert {"position_ids", "global_attention_mask", "labels"} <= set(seen[0])
    assert (seen[0]["labels"][seen[0]["position_ids"] == 0] == -100).all()
