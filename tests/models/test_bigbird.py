"""BigBird and BigBirdPegasus against Transformers' own classes: under its own random plan, and under explicit masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

import sparse_hf
from sparse_hf.testing import AllocationInterceptor
from tests import oracle
from tests.crosses import slow_but_for
from tests.models.bigbirds import FAMILIES, TEXT, Case, sparse_model
from tests.models.families import EOS, HEADS, TINY, VOCABULARY

# ours may err this many times as much as the stock class in float32 does, plus a few roundings of the largest number
SLACK, ROUNDINGS = 4, 4e-6
# heads that read no state of padding
TOKENWISE = ("BigBirdModel", "BigBirdForMaskedLM", "BigBirdForCausalLM", "BigBirdForTokenClassification")
SAMPLE, FAST, SLOW = ([(family, i) for family in FAMILIES for i in range(count)] for count in (8, 20, 220))
CASES = slow_but_for(FAST, SLOW, SAMPLE)


def numbers(model, batch, real=None, **extra) -> dict[str, torch.Tensor]:
    """Everything that a forward and a backward pass give; states and logits of real tokens only, if these are told."""
    outputs = model(**{**batch, **extra})
    loss = outputs.loss if outputs.get("loss") is not None else _random_loss(outputs[0], real)
    found = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if real is not None:
        found = {k: v[real] if v.shape[:2] == real.shape else v for k, v in found.items() if k != "pooler_output"}
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        # what one model multiplies by zero, the other may not touch
        found[f"gradient of {name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    return {name: value.detach() for name, value in found.items()}


def _random_loss(states: torch.Tensor, real) -> torch.Tensor:
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    if real is not None and states.shape[:2] == real.shape:
        weights = weights * real[..., None]
    return (states * weights).sum()


def assert_as_exact_as_stock(case: Case, sparse, batch, ours: dict, theirs: dict, real=None) -> None:
    """`ours` and `theirs` are what the sparse and the stock model are given besides the batch."""
    exact = copy.deepcopy(case.stock).double()
    in_double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in theirs.items()
    }
    truth, stock = numbers(exact, batch, real, **in_double), numbers(case.stock, batch, real, **theirs)
    found = numbers(sparse, batch, real, **ours)
    assert found.keys() == truth.keys() and len(found) > 5
    # the gradient of a key's bias is 0 but for roundings, which are those of the other gradients
    largest = {kind: max(v.abs().max() for k, v in truth.items() if _kind(k) == kind) for kind in map(_kind, truth)}
    for name, value in truth.items():
        limit = SLACK * (stock[name] - value).abs().max() + ROUNDINGS * largest[_kind(name)]
        error = (found[name] - value).abs().max()
        assert error <= limit, f"{case.head}: {name}: {error:.2e} off, where {limit:.2e} is allowed"


def _kind(name: str) -> str:
    return "gradient" if name.startswith("gradient") else name


@pytest.mark.parametrize(("family", "number"), CASES)
def test_equals_transformers_under_its_own_random_blocks(family, number):
    case = Case(family, number)
    blocks = 5 + 2 * case.count + int(case.draw.integers(1, 12))
    # not a multiple of the block size either, for which Transformers pads
    length = blocks * case.size - int(case.draw.integers(0, case.size))
    real = torch.from_numpy(case.draw.random((2, length)) < case.draw.choice([0.6, 1.0]))
    # Transformers counts blocks from the first token and up to the longest row's last
    real[:, [0, -1]] = True
    layers = None
    if not case.has_encoder:
        # all as in any decoder of Transformers, where padding attends to itself
        real[:] = True
    else:
        layers = sparse_hf.transformers_random_blocks(case.stock.config, length)
        layers = layers if family == "big_bird" else {"encoder": layers}
    sparse = sparse_hf.sparsify(case.stock, layers=layers)
    batch = case.inputs(length, real)
    # its random blocks are random in training only
    assert case.stock.training and sparse.training
    assert_as_exact_as_stock(case, sparse, batch, {}, {})
    with torch.no_grad():
        one, other = sparse.eval()(**batch)[0], sparse.train()(**batch)[0]
    assert torch.equal(one, other)


@pytest.mark.parametrize(("family", "number"), CASES)
def test_equals_dense_attention_under_the_mask_of_its_pattern(family, number):
    head = "BigBirdPegasusModel" if family == "bigbird_pegasus" else TOKENWISE[number % len(TOKENWISE)]
    decoder = {"is_decoder": number % 2 == 1} if family == "big_bird" else {}
    case = Case(family, number, head, attention_type="original_full", **decoder)
    length = int(case.draw.integers(1, 20 * case.size))
    real = torch.from_numpy(case.draw.random((2, length)) < case.draw.choice([0.6, 1.0]))
    # padding on the left, the right, and anywhere
    real[0, : int(case.draw.integers(0, length))] = False
    real[1, int(case.draw.integers(1, length + 1)) :] = False
    real[[0, 1], [length - 1, 0]] = True
    marks = torch.from_numpy(case.draw.random((2, length)) < 0.05)
    sparse = sparse_hf.sparsify(case.stock)
    implied = type(sparse.config)(**{**case.values, "attention_type": "block_sparse"})
    pattern = implied.layer_pattern(0, stack="encoder" if family == "bigbird_pegasus" else "")
    layers = {"layers": "decoder=dense"} if family == "bigbird_pegasus" else {}
    sparse = sparse_hf.sparsify(case.stock, pattern, **layers)
    mask = oracle.dense_mask(pattern, length, length, real, marks=marks)
    if decoder.get("is_decoder"):
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    batch = case.inputs(length, real)
    if family == "bigbird_pegasus":
        # stock encoder-decoders take one mask for encoder and cross-attention, so that the encoder is asked alone
        case.stock, sparse = case.stock.get_encoder(), sparse.get_encoder()
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    elif "labels" in batch:
        # neither on padding nor on what is foretold from it
        told = real & real.roll(1, 1)
        told[:, 0] = False
        labels = batch.pop("labels").masked_fill(~told, -100)
        # the mean over no labels is none
        batch |= {"labels": labels} if told.any() else {}
    theirs = {"attention_mask": torch.where(mask, 0.0, -1e9)}
    assert_as_exact_as_stock(case, sparse, batch, {"global_attention_mask": marks.long()}, theirs, real)


GENERATING = ["BigBirdForCausalLM", "BigBirdPegasusForConditionalGeneration"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(8))
def test_full_attention_equals_transformers(family, number):
    case = Case(family, number, attention_type="original_full")
    batch = case.inputs(50, torch.ones(2, 50, dtype=torch.bool))
    sparse = sparse_hf.sparsify(case.stock)
    patterns = {sparse.config.layer_pattern(i, stack=s) for s, n in sparse.config.stacks.items() for i in range(n)}
    assert patterns == {"window(None, None)"}
    assert_as_exact_as_stock(case, sparse, batch, {}, {})


def test_the_configuration_implies_a_pattern_per_layer_and_head():
    config = sparse_hf.SparseBigBirdConfig(
        num_hidden_layers=2, num_attention_heads=2, num_random_blocks=3, hidden_size=8
    )
    fixed = "chunk(64, 1, 1) | first(64) | last(1, 64) | marked()"
    drawn = [f"{fixed} | random_blocks(3, 64, {seed})" for seed in range(4)]
    assert config.layer_pattern(0) == f"per_head({drawn[0]}, {drawn[1]})"
    assert config.layer_pattern(1) == f"per_head({drawn[2]}, {drawn[3]})"
    config.num_random_blocks = 0
    assert config.layer_pattern(1) == fixed
    assert config.layer_pattern(1, is_causal=True) == "(chunk(64, 1, 1) | first(64) | marked()) & window(None, 0)"
    config.is_decoder = True
    assert config.layer_pattern(1) == config.layer_pattern(1, is_causal=True)
    config.attention_type = "original_full"
    assert config.layer_pattern(1) == "window(None, None) & window(None, 0)"
    config.attention_type = "sparse"
    with pytest.raises(ValueError, match="attention_type is 'sparse'; it must be 'block_sparse' or 'original_full'"):
        config.layer_pattern(1)
    pegasus = sparse_hf.SparseBigBirdPegasusConfig(
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=1, num_random_blocks=1
    )
    assert pegasus.layer_pattern(0, stack="encoder") == f"per_head({fixed} | random_blocks(1, 64, 0))"
    assert pegasus.layer_pattern(1, True, "decoder") == "window(None, None) & window(None, 0)"


@pytest.mark.parametrize("length", [3, 70])
def test_a_decoder_hears_nothing_of_its_future(length):
    sparse, text = sparse_model("BigBirdForCausalLM"), TEXT[:, :length]
    before = sparse(text).logits
    for t in {1, length // 2, length - 1}:
        changed = text.clone()
        changed[:, t] = EOS + 1 + (changed[:, t] - EOS) % (VOCABULARY - EOS - 1)
        after = sparse(changed).logits
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("head", GENERATING)
def test_generation_with_a_cache_equals_without(head, beams):
    sparse, real = sparse_model(head), torch.ones_like(TEXT)
    real[0, :13] = 0
    options = {"max_new_tokens": 14, "do_sample": False, "num_beams": beams}
    texts = [sparse.generate(TEXT, attention_mask=real, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*texts)
    if head == "BigBirdForCausalLM":
        # a row of its own, without padding, says the same
        alone = sparse.generate(TEXT[:1, 13:], **options)
        assert torch.equal(alone, texts[0][:1, 13 : 13 + alone.shape[1]])


@pytest.mark.parametrize("head", ["BigBirdModel", "BigBirdPegasusModel"])
def test_a_short_batch_changes_nothing(head):
    sparse = sparse_model(head)
    wanted = sparse(TEXT)[0]
    before = sparse.config.to_json_string(), {n: dict(vars(m), _modules=None) for n, m in sparse.named_modules()}
    types = [type(m) for m in sparse.modules()]
    for length in (1, 5, 30):
        sparse(TEXT[:, :length])
    assert torch.equal(sparse(TEXT)[0], wanted) and types == [type(m) for m in sparse.modules()]
    after = sparse.config.to_json_string(), {n: dict(vars(m), _modules=None) for n, m in sparse.named_modules()}
    assert str(before) == str(after)
    assert torch.equal(sparse.train()(TEXT)[0], wanted)


def test_packed_equals_separate():
    sparse, lengths = sparse_model("BigBirdModel"), (30, 33, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    separate = [sparse(text).last_hidden_state for text in TEXT.split(lengths, 1)]
    packed = sparse(TEXT, position_ids=positions).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(separate, 1), rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    sparse, real = sparse_model("BigBirdModel"), torch.ones_like(TEXT)
    real[0, :29], real[1, 41:] = 0, 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    padded = sparse(TEXT, attention_mask=real, position_ids=positions).last_hidden_state
    alone = sparse(TEXT[:1, 29:]).last_hidden_state, sparse(TEXT[1:, :41]).last_hidden_state
    torch.testing.assert_close(padded[:1, 29:], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[1:, :41], alone[1], rtol=1e-4, atol=1e-5)


def test_attention_to_an_encoder_is_dense_and_as_in_transformers():
    case = Case(
        "big_bird", 0, "BigBirdForCausalLM", attention_type="original_full", is_decoder=True, add_cross_attention=True
    )
    batch = case.inputs(30, torch.ones(2, 30, dtype=torch.bool))
    encoded = {"encoder_hidden_states": torch.randn(2, 21, 32), "use_cache": False}
    assert_as_exact_as_stock(case, sparse_hf.sparsify(case.stock), batch, encoded, encoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["BigBirdModel", "BigBirdPegasusModel"])
def test_half_precision_overflows_nowhere(head, dtype):
    sparse, real = sparse_model(head), torch.ones_like(TEXT)
    real[0, :29], real[1] = 0, 0
    exact, half = sparse(TEXT, attention_mask=real)[0], copy.deepcopy(sparse).to(dtype)(TEXT, attention_mask=real)[0]
    assert half.isfinite().all()
    torch.testing.assert_close(half[:1, 29:].float(), exact[:1, 29:], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("head", ["BigBirdForMaskedLM", "BigBirdPegasusForConditionalGeneration"])
@pytest.mark.parametrize("length", [4160, pytest.param(16448, marks=pytest.mark.slow)])
def test_nothing_is_quadratic(head, length):
    sparse = sparse_model(head, block_size=64, max_position_embeddings=length, num_hidden_layers=1, encoder_layers=1)
    text = TEXT[:1, :50].repeat(1, length // 50 + 1)[:, :length]
    labels = {"labels": text if head.endswith("MaskedLM") else text[:, :40].contiguous()}
    with AllocationInterceptor(length) as seen:
        sparse.train()(text, **labels).loss.backward()
    assert not seen.quadratic and seen.calls > 100


@pytest.mark.parametrize("head", ["BigBirdForMaskedLM", "BigBirdPegasusForConditionalGeneration"])
def test_published_checkpoints_load_unchanged(head, tmp_path):
    case = Case(HEADS[head], 0, head, block_size=4, num_random_blocks=2)
    case.stock.save_pretrained(tmp_path / "stock")
    wanted = sparse_hf.sparsify(case.stock).eval()
    loaded, told = getattr(sparse_hf, f"Sparse{head}").from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    sparse_hf.convert(tmp_path / "stock", tmp_path / "sparse", progress=False)
    auto = transformers.AutoModelForMaskedLM if "Masked" in head else transformers.AutoModelForSeq2SeqLM
    converted = auto.from_pretrained(tmp_path / "sparse")
    assert converted.config.sparse_attention == wanted.config.sparse_attention
    for model in (loaded, converted):
        assert type(model) is type(wanted) and torch.equal(model.eval()(TEXT).logits, wanted(TEXT).logits)
    full = type(wanted).from_pretrained(tmp_path / "stock", attention_type="original_full").eval()
    assert not torch.equal(full(TEXT).logits, wanted(TEXT).logits)


def test_the_encoder_is_one_graph():
    for sparse in (sparse_model("BigBirdModel"), sparse_model("BigBirdPegasusModel").get_encoder()):
        real = torch.ones_like(TEXT)
        wanted = sparse(TEXT, attention_mask=real).last_hidden_state
        exported = torch.export.export(sparse, (TEXT,), {"attention_mask": real}, strict=False).module()
        torch.testing.assert_close(exported(TEXT, attention_mask=real).last_hidden_state, wanted)


@pytest.mark.parametrize("real", [None, torch.ones_like(TEXT)])
def test_without_a_mask_a_cuda_graph_may_hold_its_attention(real):
    torch._dynamo.reset()
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if "sparse_hf" in str(node.target))
        return graph

    torch.compile(sparse_model("BigBirdModel"), fullgraph=True, backend=backend)(TEXT, attention_mask=real)
    # what padding there is can be read outside of graphs alone
    wanted = "attention_recorded" if real is None else "sparse_hf.attention.default"
    assert called and all(wanted in name for name in called)


def test_random_blocks_of_transformers_leave_its_generator_alone():
    config = transformers.BigBirdConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, num_random_blocks=1)
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    one, other = (sparse_hf.transformers_random_blocks(config, length) for length in (1024, 1100))
    assert np.random.rand() == expected and len(one) == 2 and len(one[0].heads) == 2 and one != other
    with pytest.raises(ValueError, match="at 448 tokens Transformers attends fully: it is sparse from 449 tokens on"):
        sparse_hf.transformers_random_blocks(config, 448)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="sparsify the model again"):
        sparse_model("BigBirdModel").set_attention_type("original_full")
    full = sparse_model("BigBirdModel", "window(None, None)")
    with pytest.raises(ValueError, match=r"add `\| marked\(\)`"):
        full(TEXT, global_attention_mask=torch.ones_like(TEXT))
    with pytest.raises(ValueError, match="sparse_bert implies no pattern; give one"):
        sparse_hf.sparsify(transformers.BertModel(transformers.BertConfig(**TINY["bert"])))
