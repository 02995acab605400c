"""Longer positions: tables that grow row by row as they should, and rotary angles that are scaled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sparse_hf
from tests.models.families import HEADS, TINY, dense_model, one_head

PATTERN = "window(16, 16) | first(1)"
OLD, NEW = 512, 1300
ONE_HEAD = {HEADS[head]: head for head in one_head()}
# families that are sparse by themselves are tested in tests/models, with their patterns
LEARNED = [n for n, f in sparse_hf.FAMILIES.items() if f.positions.scheme == "learned" and not f.implies_pattern]
# tiny models of families that choose keys by content are in tests/models/indexers.py
ROTARY = [
    name
    for name, family in sparse_hf.FAMILIES.items()
    if family.positions.scheme == "rotary" and not family.config_class.chooses_keys
]


def save(head: str, folder: Path, **changes):
    dense = dense_model(head, **changes)
    dense.save_pretrained(folder)
    return dense


def load(head: str, folder: Path):
    """The sparse model, which must have found every weight and no other."""
    sparse = getattr(sparse_hf, f"Sparse{head}")
    model, told = sparse.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def convert(source: Path, out: Path, **options) -> dict:
    """Convert and return the report."""
    sparse_hf.convert(source, out, PATTERN, progress=False, **options)
    return json.loads((out / "conversion.json").read_text())


def by_hand(rows: torch.Tensor, length: int, method: str) -> torch.Tensor:
    """The new rows, one at a time."""
    if method == "tile":
        return torch.stack([rows[i % len(rows)] for i in range(length)])
    new = []
    for i in range(length):
        at = i * (len(rows) - 1) / (length - 1)
        low = min(int(at), len(rows) - 2)
        new.append(rows[low].double() + (at - low) * (rows[low + 1].double() - rows[low].double()))
    return torch.stack(new).to(rows.dtype)


@pytest.mark.cross
@pytest.mark.parametrize("method", ["tile", "interpolate"])
@pytest.mark.parametrize("family", LEARNED)
def test_learned_tables_grow(family, method, tmp_path):
    head = ONE_HEAD[family]
    dense, positions = save(head, tmp_path / "dense"), sparse_hf.FAMILIES[family].positions
    report = convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW, positions=method)
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "sparse")
    tables = [name for name in before if name.endswith(positions.tables)]
    assert len(tables) == (2 if "encoder" in sparse_hf.FAMILIES[family].config_class(**TINY[family]).stacks else 1)
    assert before.keys() == after.keys() and set(report["grown"]) == set(tables)
    for name in before:
        old, new = before[name], after[name]
        if name not in tables:
            assert torch.equal(old, new)
            continue
        assert old.shape[0] == OLD + positions.offset and new.shape == (NEW + positions.offset, old.shape[1])
        assert torch.equal(old[: positions.offset], new[: positions.offset])
        wanted = by_hand(old[positions.offset :], NEW, method)
        torch.testing.assert_close(new[positions.offset :], wanted, atol=1e-6, rtol=0)
    model = load(head, tmp_path / "sparse")
    assert model.config.max_position_embeddings == NEW + (positions.offset if positions.counted else 0)
    ids = torch.randint(3, 97, (1, NEW))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert logits.shape[:2] == (1, NEW) and logits.isfinite().all()
        if method == "tile":
            # the first positions are what they were
            torch.testing.assert_close(model(input_ids=ids[:, :40]).logits, by_dense(dense, ids[:, :40]))


def by_dense(dense, ids: torch.Tensor) -> torch.Tensor:
    """The same by a model in memory that was never converted."""
    layers = (
        {"decoder": PATTERN}
        if "encoder" in sparse_hf.family_of(dense.config.model_type).config_class().stacks
        else None
    )
    return sparse_hf.sparsify(dense, PATTERN, layers=layers)(input_ids=ids).logits


def test_half_precision_tables_are_interpolated_in_single(tmp_path):
    save("BertForMaskedLM", tmp_path / "dense", dtype=torch.bfloat16)
    tensors = {name: t.to(torch.bfloat16) for name, t in weights(tmp_path / "dense").items()}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW, positions="interpolate")
    name = "bert.embeddings.position_embeddings.weight"
    new = weights(tmp_path / "sparse")[name]
    assert new.dtype == torch.bfloat16 and torch.equal(new[[0, -1]], tensors[name][[0, -1]])
    torch.testing.assert_close(new.float(), by_hand(tensors[name].float(), NEW, "interpolate"), atol=2**-8, rtol=2**-8)


def test_buffers_of_old_checkpoints_grow_along(tmp_path):
    save("RobertaForMaskedLM", tmp_path / "dense")
    old = {
        "roberta.embeddings.position_ids": torch.arange(514)[None],
        "roberta.embeddings.token_type_ids": torch.zeros(1, 514, dtype=torch.long),
    }
    tensors = {**weights(tmp_path / "dense"), **old}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW)
    after = weights(tmp_path / "sparse")
    assert torch.equal(after["roberta.embeddings.position_ids"], torch.arange(NEW + 2)[None])
    assert torch.equal(after["roberta.embeddings.token_type_ids"], torch.zeros(1, NEW + 2, dtype=torch.long))


@pytest.mark.parametrize("max_length", [None, NEW])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_causal_masks_of_old_gpt2_checkpoints_are_left_out(kind, max_length, tmp_path):
    dense = save("GPT2LMHeadModel", tmp_path / "dense")
    # as the first checkpoints were saved: without a prefix, with masks
    tensors = {name.removeprefix("transformer."): t for name, t in weights(tmp_path / "dense").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, OLD, OLD, dtype=torch.uint8).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    (tmp_path / "dense" / "model.safetensors").unlink()
    if kind == "bin":
        torch.save({**tensors, **masks}, tmp_path / "dense" / "pytorch_model.bin")
    else:
        save_file({**tensors, **masks}, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "dense", tmp_path / "sparse", max_length=max_length)
    assert weights(tmp_path / "sparse").keys() == tensors.keys() and set(report["left_out"]) == set(masks)
    assert "h.0.attn.bias [1, 1, 512, 512]" in (tmp_path / "sparse" / "conversion.txt").read_text()
    model, ids = load("GPT2LMHeadModel", tmp_path / "sparse"), torch.randint(3, 97, (1, 60))
    assert model.config.n_positions == (max_length or OLD)
    torch.testing.assert_close(model(input_ids=ids).logits, by_dense(dense, ids))


@pytest.mark.parametrize("width", [32, 24])
def test_sinusoidal_tables_are_computed_again(width, tmp_path):
    save("PegasusForConditionalGeneration", tmp_path / "dense", d_model=width)
    report = convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW)
    assert report["positions"] == {"scheme": "sinusoidal", "method": "computed"} and len(report["grown"]) == 2
    model = load("PegasusForConditionalGeneration", tmp_path / "sparse")
    for stack in (model.model.encoder, model.model.decoder):
        torch.testing.assert_close(stack.embed_positions.weight.data, stack.embed_positions.create_weight())
        assert stack.embed_positions.weight.shape == (NEW, width)


def test_a_checkpoint_without_sinusoidal_tables_converts(tmp_path):
    save("PegasusForConditionalGeneration", tmp_path / "dense")
    tensors = {name: t for name, t in weights(tmp_path / "dense").items() if "embed_positions" not in name}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW)
    model = sparse_hf.SparsePegasusForConditionalGeneration.from_pretrained(tmp_path / "sparse")
    table = model.model.encoder.embed_positions
    torch.testing.assert_close(table.weight.data, table.create_weight())


def test_relative_positions_are_kept(tmp_path):
    save("T5ForConditionalGeneration", tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    report = convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW)
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "sparse")
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert report["max_length"] == [None, None] and report["tokenizer_max_length"] == [512, NEW]
    assert "buckets stay as they are" in report["note"]
    assert load("T5ForConditionalGeneration", tmp_path / "sparse").config.relative_attention_num_buckets == 32


def test_tied_tables_of_a_torch_file_stay_loadable(tmp_path):
    dense = save("BartForConditionalGeneration", tmp_path / "dense")
    state = dense.state_dict()
    state["model.decoder.embed_positions.weight"] = state["model.encoder.embed_positions.weight"]
    assert state["lm_head.weight"].data_ptr() == state["model.shared.weight"].data_ptr()
    (tmp_path / "dense" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "dense" / "pytorch_model.bin")
    convert(tmp_path / "dense", tmp_path / "sparse", max_length=NEW)
    model = load("BartForConditionalGeneration", tmp_path / "sparse")
    assert model.lm_head.weight.data_ptr() == model.model.shared.weight.data_ptr()
    encoder, decoder = model.model.encoder.embed_positions.weight, model.model.decoder.embed_positions.weight
    assert torch.equal(encoder, decoder) and encoder.shape[0] == NEW + 2


@pytest.mark.cross
@pytest.mark.parametrize("rope", [None, "linear", "yarn"])
@pytest.mark.parametrize("family", [family for family in ROTARY if family != "phi3"])
def test_rotary_angles_are_scaled_if_asked(family, rope, tmp_path):
    head = ONE_HEAD[family]
    dense = save(head, tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "sparse", max_length=4 * OLD, rope=rope)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "sparse")
    assert config.max_position_embeddings == 4 * OLD
    nested = "full_attention" in dense.config.rope_parameters
    before, after = dense.config.rope_parameters, config.rope_parameters
    if rope is None:
        assert after == before and report["rope_parameters"] is None and "only the limit was raised" in report["note"]
        return
    assert report["rope_parameters"] == after
    if nested:
        assert after["sliding_attention"] == before["sliding_attention"]
        before, after = before["full_attention"], after["full_attention"]
    added = {"rope_type": rope, "factor": 4.0} | ({"original_max_position_embeddings": OLD} if rope == "yarn" else {})
    assert after == {**before, **added}
    model = sparse_hf.family_of(family).classes[0].from_pretrained(tmp_path / "sparse").eval()
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    plain = {n: b for n, b in sparse_hf.dense_class(type(model))(dense.config).named_buffers() if n in frequencies}
    for name in frequencies:
        scaled = name.endswith("rotary_emb.inv_freq") or "full_attention_inv_freq" in name
        if scaled and rope == "linear":
            torch.testing.assert_close(frequencies[name], plain[name] / 4)
        elif "sliding" in name:
            torch.testing.assert_close(frequencies[name], plain[name])
    with torch.no_grad():
        assert model(input_ids=torch.randint(3, 97, (1, 700))).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("BertForMaskedLM", {"positions": "stretch"}, "positions is 'stretch'; it must be one of tile, interpolate"),
        (
            "LlamaForCausalLM",
            {"rope": "ntk", "max_length": NEW},
            "rope is 'ntk'; it must be one of linear, yarn, or None",
        ),
        ("BertForMaskedLM", {"rope": "yarn", "max_length": NEW}, "bert has learned positions, which have no angles"),
        ("T5ForConditionalGeneration", {"rope": "yarn", "max_length": NEW}, "t5 has relative positions"),
        ("LlamaForCausalLM", {"rope": "yarn"}, "nothing gets longer; give a max_length beyond the model's 512 tokens"),
        ("LlamaForCausalLM", {"rope": "linear", "max_length": 512}, "nothing gets longer"),
        ("Phi3ForCausalLM", {"rope": "yarn", "max_length": NEW}, "rope is 'yarn', which phi3 does not take .*longrope"),
        ("RobertaForMaskedLM", {"max_length": 511}, "max_length is 511; the checkpoint has 512 positions"),
        ("OPTForCausalLM", {"max_length": 511}, "max_length is 511; the checkpoint has 512 positions"),
    ],
)
def test_bad_lengths_leave_nothing(head, options, message, tmp_path):
    save(head, tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "dense", tmp_path / "sparse", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_angles_are_not_scaled_twice(tmp_path):
    save("LlamaForCausalLM", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "once", max_length=NEW, rope="yarn")
    with pytest.raises(ValueError, match="are scaled already \\(rope_type 'yarn'\\): leave rope out"):
        convert(tmp_path / "once", tmp_path / "twice", max_length=2 * NEW, rope="linear")
    convert(tmp_path / "once", tmp_path / "twice", max_length=2 * NEW)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "twice").rope_parameters["factor"] == NEW / OLD


def test_tables_that_cannot_grow_are_refused(tmp_path):
    config = transformers.ReformerConfig(
        hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32, vocab_size=97,
        attn_layers=["local", "lsh"], axial_pos_shape=[8, 16], axial_pos_embds_dim=[16, 16], num_buckets=4,
        max_position_embeddings=128, is_decoder=True,
    )  # fmt: skip
    transformers.ReformerModelWithLMHead(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="max_length is 256 and the model has 128 positions, but no table"):
        convert(tmp_path / "dense", tmp_path / "sparse", max_length=256)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]
    convert(tmp_path / "dense", tmp_path / "sparse")
