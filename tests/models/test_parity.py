"""Sparse models against the stock ones of Transformers: every family, every head, padding on both sides."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
import transformers
from packaging import version
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bloom import modeling_bloom

import sparse_hf
from sparse_hf.models.derived.entry import calls_interface, configurations, find_entry
from sparse_hf.models.derived.off_interface import OFF_THE_INTERFACE
from tests.crosses import sampled, slow_but_for
from tests.models.families import (
    BATCH,
    HEADS,
    LENGTH,
    PADDED,
    SINGLE,
    TARGET,
    TINY,
    additive,
    dense_model,
    explicit_mask,
    family_and_kind,
    has_target,
    has_two_stacks,
    inputs,
    is_decoder,
    one_head,
    pattern_layers,
)

LIMIT = 2e-5
# the stock model's own error may be small by luck: the largest of few numbers, or of a loss; sums in another order
FACTOR, LEAST = 8, 64 * torch.finfo(torch.float32).eps
PATTERN = "window(20, 20) | first(3) | marked()"
DECODER = "window(20, 20) | first(3)"
OLD = version.parse(transformers.__version__) < version.parse("5.24")


def real_part(outputs, batch) -> dict[str, torch.Tensor]:
    """What a user reads: losses, and states and logits of real tokens."""
    texts = [
        batch[name].bool().flatten(0, -2) for name in ("attention_mask", "decoder_attention_mask") if name in batch
    ]
    found = {}
    for name, value in outputs.items():
        # a left-padded row pools padding
        if isinstance(value, torch.Tensor) and (name != "pooler_output" or texts[0][:, 0].all()):
            real = next((real for real in texts if value.shape[:2] == real.shape), None)
            found[name] = value if real is None else value[real]
    return found


def assert_same(one, other, batch, limit: float = LIMIT):
    one, other = real_part(one, batch), real_part(other, batch)
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=limit, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_as_exact(ours, stock, exact, batch):
    """Ours are as near to the stock model in double precision as the stock model in single precision is, or nearly so."""
    ours, stock, exact = (real_part(outputs, batch) for outputs in (ours, stock, exact))
    assert ours.keys() == stock.keys() and ours
    for name, wanted in exact.items():
        assert_as_near(ours[name], stock[name], wanted, name)


def assert_as_near(ours, stock, exact, name, largest=0.0):
    allowed = FACTOR * (stock - exact).abs().max() + LEAST * max(exact.abs().max(), largest)
    found = (ours - exact).abs().max()
    assert found <= allowed, f"{name}: off by {found:.3g}; {allowed:.3g} is allowed"


def in_double(model):
    """The same weights in double precision, which tells what single precision gets wrong."""
    twin = copy.deepcopy(model).double()
    if hasattr(twin.config, "num_experts_per_tok"):
        # the fast way knows no double precision
        twin.set_experts_implementation("eager")
    return twin


def gradients(loss, model) -> list:
    # sinusoidal tables are parameters that learn nothing
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, learning, allow_unused=True)


def assert_gradients_as_exact(ours, stock, exact):
    """Each is a (model, outputs) pair."""
    compared = 0
    names = [name for name, parameter in stock[0].named_parameters() if parameter.requires_grad]
    found = [gradients(outputs.loss, model) for model, outputs in (ours, stock, exact)]
    # the gradient of a key's bias is 0 but for roundings, which are those of the other gradients
    largest = max(gradient.abs().max() for gradient in found[2] if gradient is not None)
    for name, *three in zip(names, *found, strict=True):
        # a parameter that the dense model multiplies by zero is not touched here
        if all(gradient is not None for gradient in three):
            assert_as_near(*three, name, largest)
            compared += 1
        else:
            assert all(gradient is None or not gradient.any() for gradient in three)
    assert compared > 5


def random_marks(rows: int) -> torch.Tensor:
    return (torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.03).long()


def marks_of(head: str, batch) -> torch.Tensor | None:
    """Marks of a decoder inside an encoder-decoder's family do not exist."""
    if has_two_stacks(head) and head.endswith("ForCausalLM"):
        return None
    return random_marks(batch["attention_mask"].flatten(0, -2).shape[0])


def under_pairs(dense, batch, mask):
    """The stock model under a 4-D mask."""
    if dense.config.model_type.startswith("deberta"):
        # it multiplies states by a mask of tokens
        with patch.object(dense.base_model.encoder, "get_attention_mask", lambda _: mask == 0):
            return dense(**batch)
    return dense(**{**batch, "attention_mask": mask})


def under_the_mask(dense, head: str, batch, marks, own_window):
    """The stock model under the 4-D mask of PATTERN, or of DECODER in a decoder that has an encoder."""
    real = batch["attention_mask"].flatten(0, -2)
    only_decoder = has_two_stacks(head) and head.endswith("ForCausalLM")
    pattern = DECODER if only_decoder else PATTERN
    is_causal = is_decoder(head) or only_decoder
    types = getattr(dense.config, "layer_types", None)
    window = (
        own_window(0)
        if types is None
        else own_window(types.index("sliding_attention"))
        if "sliding_attention" in types
        else None
    )
    whole, cut = (
        additive(explicit_mask(pattern, LENGTH, real, marks, is_causal, own), dense.dtype) for own in (None, window)
    )
    if head.endswith("ForMultipleChoice"):
        # it flattens two-dimensional masks only, so the inner model and its head are called as it does
        return whole if window is None else {"full_attention": whole, "sliding_attention": cut}
    if not has_target(head):
        if head == "ElectraForPreTraining":
            # its loss reads the mask too, and takes one with two dimensions only
            batch = {name: value for name, value in batch.items() if name != "labels"}
        mask = cut if types is None else {"full_attention": whole, "sliding_attention": cut}
        if HEADS[head] in SINGLE:
            # padding sees itself, and nobody reads what comes of it
            whole = whole.masked_fill(torch.eye(LENGTH, dtype=torch.bool) & (real == 0)[:, None, :, None], 0.0)
        if HEADS[head] == "bloom":
            # it reads positions off a mask of tokens
            with patch.object(modeling_bloom, "create_causal_mask", lambda **_: whole):
                return dense(**batch)
        return under_pairs(dense, batch, mask if window is not None else whole)
    encoded = dense.get_encoder()(input_ids=batch["input_ids"], attention_mask=whole)[0]
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    if "decoder_input_ids" in batch:
        target = explicit_mask(DECODER, TARGET, batch["decoder_attention_mask"], None, True)
    else:
        # heads that classify feed the text to the decoder as well, shifted by one and without a mask of its own
        target = explicit_mask(DECODER, LENGTH, torch.ones(BATCH, LENGTH), None, True)
        shifted = batch["input_ids"].roll(1, 1)
        shifted[:, 0] = dense.config.decoder_start_token_id
        rest |= {"decoder_input_ids": shifted}
        if "labels" in batch or head.startswith(("T5", "Bart", "MBart")):
            rest["input_ids"] = batch["input_ids"]
    return dense(
        **{**rest, "encoder_outputs": BaseModelOutput(encoded), "decoder_attention_mask": additive(target, dense.dtype)}
    )


def test_the_table_has_every_family():
    # Longformer and LED have a table of their own
    assert (
        {name for name, f in sparse_hf.FAMILIES.items() if f.verified and not f.implies_pattern}
        <= set(TINY)
        <= set(sparse_hf.FAMILIES)
    )


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_head_of_the_auto_classes_is_there(family):
    from transformers.models.auto import modeling_auto

    names = set()
    for name, mapping in vars(modeling_auto).items():
        found = mapping.get(family, ()) if name.endswith("_MAPPING_NAMES") else ()
        names |= {found} if isinstance(found, str) else set(found)
    package = type(transformers.AutoConfig.for_model(family)).__module__.rsplit(".", 1)[0]
    of_family = {
        name
        for name in names
        if not name.endswith("Config") and getattr(getattr(transformers, name), "__module__", "").startswith(package)
    }
    assert of_family == set(sparse_hf.FAMILIES[family].architectures)


@pytest.mark.cross(by=family_and_kind)
@pytest.mark.parametrize(("head", "side"), PADDED)
def test_dense_pattern_equals_stock(head, side):
    if OLD and head == "BigBirdForCausalLM":
        pytest.skip("the decoder of this version of Transformers sees the future")
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    assert type(sparse).__name__ == f"Sparse{head}" and type(dense).__name__ == head
    batch = inputs(head, side)
    with torch.no_grad():
        # Gemma 2 rounds its mask to single precision, where what is -1e308 in double makes NaN of rows without keys
        exact = dense if HEADS[head] == "gemma2" else in_double(dense)
        assert_as_exact(sparse(**batch), dense(**batch), exact(**batch), batch)


@pytest.mark.cross(by=family_and_kind)
@pytest.mark.parametrize(("head", "side"), PADDED)
def test_pattern_equals_stock_under_the_same_mask(head, side):
    dense = dense_model(head)
    double = in_double(dense)
    sparse = sparse_hf.sparsify(dense, PATTERN, **pattern_layers(head))
    batch = inputs(head, side)
    if head == "ElectraForPreTraining":
        # its loss reads the mask too, and takes one with two dimensions only
        del batch["labels"]
    marks = marks_of(head, batch)
    extra = {} if marks is None else {"global_attention_mask": marks}
    stock, exact = (under_the_mask(model, head, batch, marks, sparse.config.own_window) for model in (dense, double))
    if head.endswith("ForMultipleChoice"):
        flat = {k: v.flatten(0, 1) for k, v in batch.items() if v.ndim == 3}
        stock, exact = (
            under_pairs(getattr(model, model.base_model_prefix), flat, mask)
            for model, mask in ((dense, stock), (double, exact))
        )
        assert_as_exact(getattr(sparse, sparse.base_model_prefix)(**flat, **extra), stock, exact, flat)
        again = sparse(**batch, global_attention_mask=marks.view(BATCH, 2, LENGTH)).logits
        assert not torch.allclose(again, sparse(**batch).logits, rtol=1e-4)
        return
    ours = sparse(**batch, **extra)
    if has_target(head):
        real = batch["attention_mask"].bool()
        mask = explicit_mask(PATTERN, LENGTH, batch["attention_mask"], marks, False)
        states = [
            model.get_encoder()(input_ids=batch["input_ids"], attention_mask=additive(mask, model.dtype))[0][real]
            for model in (dense, double)
        ]
        assert_as_near(ours.encoder_last_hidden_state[real], *states, "encoder_last_hidden_state")
        for outputs in (stock, exact):
            outputs["encoder_last_hidden_state"] = ours.encoder_last_hidden_state
    assert_as_exact(ours, stock, exact, batch)
    if stock.get("loss") is not None:
        assert_gradients_as_exact((sparse, ours), (dense, stock), (double, exact))


@pytest.mark.parametrize("head", one_head())
def test_training_mode_has_the_same_pattern(head):
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense, PATTERN, **pattern_layers(head))
    batch = inputs(head)
    with torch.no_grad():
        assert_same(sparse.eval()(**batch), sparse.train()(**batch), batch)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_explicit_mask_on_a_sparse_model_is_honoured(head):
    dense = dense_model(head)
    batch = inputs(head)
    mask = explicit_mask(PATTERN, LENGTH, batch["attention_mask"], None, is_decoder(head))
    masked = {**batch, "attention_mask": additive(mask)}
    sparse = sparse_hf.sparsify(dense, "window(None, None)")
    assert_same(dense(**masked), sparse(**masked), batch)
    with pytest.raises(ValueError, match="is a bias"):
        sparse(**{**masked, "attention_mask": masked["attention_mask"].clamp(min=-1)})


def enable_checkpointing(model) -> None:
    # the newer name came with 5.24
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


CHECKPOINTED = [h for h in one_head() if sparse_hf.FAMILIES[HEADS[h]].classes[0].supports_gradient_checkpointing]


@pytest.mark.parametrize("head", sampled(CHECKPOINTED[::3], CHECKPOINTED))
def test_checkpointing_changes_no_gradient(head):
    dense = dense_model(head)
    for name in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate"):
        if hasattr(dense.config, name):
            setattr(dense.config, name, 0.2)
    sparse = sparse_hf.sparsify(dense, PATTERN, **pattern_layers(head)).train()
    batch = inputs(head)

    def found():
        torch.manual_seed(11)
        loss = sparse(**batch, use_cache=False).loss if is_decoder(head) else sparse(**batch).loss
        return gradients(loss, sparse)

    plain = found()
    enable_checkpointing(sparse)
    again = found()
    assert any(g is not None and g.abs().sum() > 0 for g in plain)
    for one, other in zip(plain, again, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


# encoders without and with sliding layers, decoders of three kinds, encoder-decoders without and with a bias
COMPILED = ("BertForMaskedLM", "ModernBertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM",
            "BartForConditionalGeneration", "T5ForConditionalGeneration")  # fmt: skip


@pytest.mark.compiles
@pytest.mark.parametrize("head", slow_but_for(COMPILED, one_head(), sample=COMPILED[::3]))
def test_compiled_as_one_graph(head):
    if HEADS[head] in NOT_COMPILED:
        pytest.skip("the experts of this version of Transformers cannot be compiled")
    if HEADS[head].startswith("deberta"):
        pytest.skip("scores that depend on content and distance are computed outside of graphs")
    torch._dynamo.reset()
    sparse = sparse_hf.sparsify(dense_model(head), PATTERN, **pattern_layers(head))
    batch = inputs(head)
    fullgraph = HEADS[head] not in NOT_ONE_GRAPH
    if not head.endswith("ForMaskedLM"):
        batch["use_cache"] = False
    if not fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(dense_model(head), fullgraph=True, backend="aot_eager")(**batch)
    eager = sparse(**batch)
    compiled = torch.compile(sparse, fullgraph=fullgraph, backend="aot_eager")(**batch)
    assert_same(eager, compiled, batch)
    for one, other in zip(gradients(eager.loss, sparse), gradients(compiled.loss, sparse), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# families whose stock class is not one graph either: GPT-2 warns about the kind of its loss
NOT_ONE_GRAPH = {"gpt2"}
# families whose stock class cannot be compiled for training at all: older versions multiply experts by an operator whose
# backward looks at its data
NOT_COMPILED = {"mixtral", "qwen3_moe"} if OLD else set()


@pytest.mark.parametrize("head", slow_but_for(one_head(), HEADS, sample=one_head()[::3]))
def test_saved_and_loaded_by_the_auto_class(head, tmp_path):
    layers = (
        None
        if HEADS[head] == "albert"
        else {"encoder 0": "dense", **pattern_layers(head)["layers"]}
        if has_two_stacks(head)
        else "0=dense"
    )
    sparse = sparse_hf.sparsify(dense_model(head), PATTERN, layers=layers, global_token_ids=[5])
    sparse.save_pretrained(tmp_path)
    for auto in auto_classes(head):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(sparse) and loaded.config._attn_implementation == "sparse"
        assert loaded.config.sparse_attention == sparse.config.sparse_attention
        batch = inputs(head)
        with torch.no_grad():
            assert_same(sparse(**batch), loaded(**batch), batch)


def auto_classes(head: str) -> list[type]:
    """The Auto classes that find the stock head."""
    config = type(dense_model(head).config)
    autos = [getattr(transformers, n) for n in dir(transformers) if n.startswith("AutoModel")]
    found = [a for a in autos if getattr(a, "_model_mapping", None) is not None and config in a._model_mapping]
    chosen = [a for a in found if a._model_mapping[config].__name__ == head]
    assert chosen
    return chosen


@pytest.mark.parametrize("head", one_head())
def test_embeddings_resize_and_stay_tied(head):
    dense = dense_model(head)
    sparse = sparse_hf.sparsify(dense_model(head), PATTERN, **pattern_layers(head))
    for model in (dense, sparse):
        model.resize_token_embeddings(VOCABULARY_GROWN)
    tied = [
        m.get_output_embeddings() is not None and m.get_output_embeddings().weight is m.get_input_embeddings().weight
        for m in (dense, sparse)
    ]
    assert tied[0] == tied[1]
    assert sparse.config.vocab_size == VOCABULARY_GROWN
    assert sparse.get_input_embeddings().weight.shape[0] == VOCABULARY_GROWN
    batch = inputs(head)
    batch["input_ids"][:, 5] = VOCABULARY_GROWN - 1
    assert sparse(**batch).loss.isfinite()


VOCABULARY_GROWN = 111


@pytest.mark.cross(by=family_and_kind)
@pytest.mark.parametrize("head", [h for h in HEADS if getattr(sparse_hf, f"Sparse{h}").accepts_loss_kwargs])
def test_loss_is_the_share_of_all_labels(head):
    """Trainer gives the number of labels of the whole step; the losses of its parts must then add up to the mean."""
    sparse = sparse_hf.sparsify(dense_model(head), PATTERN, **pattern_layers(head))
    batch = inputs(head)
    if "labels" not in batch:
        pytest.skip("no loss")
    labels = batch["labels"]
    # language models predict the next token, but for the decoders of encoder-decoders, which take labels as they are
    shifted = head.endswith(("ForCausalLM", "LMHeadModel")) and not has_two_stacks(head)
    count = int(((labels[:, 1:] if shifted else labels) != -100).sum())
    plain = sparse(**batch).loss
    torch.testing.assert_close(sparse(**batch, num_items_in_batch=torch.tensor(2 * count)).loss, plain / 2)


def test_weights_are_shared_and_the_dense_model_is_untouched():
    dense = dense_model("LlamaForCausalLM")
    before = dense(**inputs("LlamaForCausalLM")).logits
    sparse = sparse_hf.sparsify(dense, "window(3, 0)")
    assert all(a is b for a, b in zip(dense.parameters(), sparse.parameters(), strict=True))
    assert sparse.lm_head.weight is dense.lm_head.weight and type(sparse.model).__name__ == "SparseLlamaModel"
    assert type(dense.model).__name__ == "LlamaModel" and dense.config._attn_implementation == "sdpa"
    torch.testing.assert_close(dense(**inputs("LlamaForCausalLM")).logits, before)


@pytest.mark.parametrize("head", ["BertModel", "BartModel", "T5ForConditionalGeneration"])
def test_token_ids_mark_what_the_mask_marks(head):
    dense = dense_model(head)
    batch = inputs(head)
    layers = {"layers": {"decoder": "window(5, 5)"}} if has_two_stacks(head) else {}
    by_id = sparse_hf.sparsify(dense, "window(5, 5) | marked()", global_token_ids=[7, 8], **layers)
    by_mask = sparse_hf.sparsify(dense, "window(5, 5) | marked()", **layers)
    marks = torch.isin(batch["input_ids"], torch.tensor([7, 8])).long()
    assert marks.any()
    assert_same(by_id(**batch), by_mask(**batch, global_attention_mask=marks), batch)
    assert not torch.allclose(by_mask(**batch)[0], by_id(**batch)[0], atol=1e-4)


def test_stock_names_never_make_it_dense(tmp_path):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(3, 0)")
    batch = inputs("LlamaForCausalLM")
    wanted = sparse(**batch)
    sparse.save_pretrained(tmp_path)
    for name, meaning in {"sdpa": "sparse", "eager": "sparse_reference"}.items():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert loaded.config._attn_implementation == meaning
        assert_same(wanted, loaded(**batch), batch)
        sparse.set_attn_implementation(name)
        sparse.model.set_attn_implementation(name)
        assert sparse.config._attn_implementation == meaning
        assert_same(wanted, sparse(**batch), batch)
    for name in ("flex_attention", "flash_attention_2"):
        with pytest.raises(ValueError, match="the sparse ones are sparse, sparse_reference"):
            sparse.set_attn_implementation(name)


@pytest.mark.parametrize("head", ["BertModel", "T5Model", "Gemma2Model"])
def test_attention_weights_come_from_the_reference_only(head):
    sparse = sparse_hf.sparsify(dense_model(head), "window(3, 3)")
    batch = inputs(head)
    with pytest.raises(ValueError, match="attn_implementation='sparse_reference'"):
        sparse(**batch, output_attentions=True)
    sparse.set_attn_implementation("sparse_reference")
    outputs = sparse(**batch, output_attentions=True)
    weights = outputs.encoder_attentions if head == "T5Model" else outputs.attentions
    assert len(weights) == 2 and weights[0].shape == (BATCH, 4, LENGTH, LENGTH)
    torch.testing.assert_close(weights[0][1].sum(-1), torch.ones(4, LENGTH))
    assert (weights[0][1, :, 0, 4:] == 0).all()
    if head == "T5Model":
        assert outputs.cross_attentions[1].shape == (BATCH, 4, TARGET, LENGTH)
        torch.testing.assert_close(outputs.cross_attentions[1].sum(-1), torch.ones(BATCH, 4, TARGET))


def test_sliding_layers_keep_their_window_unless_they_are_named():
    dense = dense_model("Gemma3ForCausalLM")
    patterns = (
        sparse_hf.sparsify(dense, PATTERN).config.layer_pattern(0),
        sparse_hf.sparsify(dense, PATTERN).config.layer_pattern(1),
    )
    assert patterns == (f"({PATTERN}) & window(29, 0)", PATTERN)
    assert sparse_hf.sparsify(dense, PATTERN, layers="0=dense").config.layer_pattern(0) == "window(None, None)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, b: m(**b, global_attention_mask=torch.ones_like(b["input_ids"])), ValueError, r"add `\| marked\(\)`"),
        (lambda m, b: sparse_hf.sparsify(m, "windw(1, 0)"), ValueError, "unknown word 'windw'"),
        (lambda m, b: sparse_hf.sparsify(m, "window(1, 0)", layers="0-9=dense"), ValueError, "which has layers 0-1"),
        (lambda m, b: sparse_hf.sparsify(m, "window(1, 0)", layers="encoder=dense"), ValueError, "the model has one stack of layers"),
        (lambda m, b: sparse_hf.sparsify(m, "window(1, 0)", layers=["first(1)"]), ValueError, "has 1 patterns; the model has 2"),
        (lambda m, b: sparse_hf.sparsify(m, "per_head(first(1), first(2))"), ValueError, "names 2 patterns; the model has 4 heads"),
        (lambda m, b: sparse_hf.sparsify(m, "first(1)", global_token_ids=[3]), ValueError, r"no pattern has marked\(\)"),
        (lambda m, b: sparse_hf.SparseLlamaConfig(sparse_attention={"later": 1}), ValueError, "A newer sparse_hf"),
        (lambda m, b: sparse_hf.SparseLlamaConfig(num_hidden_layers=2, sparse_attention={"patterns": {}, "layers": ["x"]}),
         ValueError, "has 1 entries; the model has 2 layers"),
        (lambda m, b: sparse_hf.SparseLlamaConfig(num_hidden_layers=1, sparse_attention={"patterns": {}, "layers": ["x"]}),
         ValueError, r"names \['x'\]; the patterns are \[\]"),
        (lambda m, b: sparse_hf.SparseBartConfig(sparse_attention={"patterns": {}, "layers": ["x"]}),
         ValueError, "a list of names for 'encoder' and for 'decoder'"),
        (lambda m, b: sparse_hf.sparsify(dense_model("BartModel"), PATTERN), ValueError, "give the decoder a pattern of its own"),
        (lambda m, b: sparse_hf.sparsify(dense_model("BartModel"), "first(1)", layers="0-1=dense"), ValueError, "does not say which stack"),
        (lambda m, b: sparse_hf.sparsify(dense_model("AlbertModel"), "first(1)", layers="0=dense"), ValueError, "share their weights"),
        (lambda m, b: sparse_hf.family_of("xlnet"), ValueError, "'xlnet' has no .*: it computes attention by itself.*supported are albert"),
        (lambda m, b: sparse_hf.family_of("llava"), ValueError, "it has no layers of its own, and the models within it have"),
        (lambda m, b: sparse_hf.family_of("nothing"), ValueError, "Transformers does not know it either"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    sparse = sparse_hf.sparsify(dense_model("LlamaForCausalLM"), "window(3, 0)")
    with pytest.raises(error, match=message):
        call(sparse, inputs("LlamaForCausalLM"))


@pytest.mark.parametrize(
    "model_type",
    ["gpt_neo", "roformer", "rembert", "megatron-bert", "xlm", "flaubert", "openai-gpt", *OFF_THE_INTERFACE],
)  # fmt: skip
def test_families_that_compute_attention_themselves_are_refused_by_name(model_type):
    with pytest.raises(ValueError, match=f"'{model_type}' has no sparse counterpart: it computes attention by itself"):
        sparse_hf.family_of(model_type)


def test_reasons_are_those_of_families_that_transformers_has():
    # one that it drops, or that comes to the interface, leaves the table
    assert set(OFF_THE_INTERFACE) <= set(configurations())
    assert not [name for name in OFF_THE_INTERFACE if calls_interface(name)]


@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_families_that_came_to_the_interface_later_are_derived_or_refused(model_type):
    # with version 5.24 they are on it
    if find_entry(model_type) is None:
        with pytest.raises(ValueError, match=f"'{model_type}' has no sparse counterpart: it computes"):
            sparse_hf.family_of(model_type)
    else:
        assert not sparse_hf.family_of(model_type).verified
