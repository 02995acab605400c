"""A sparse model under the libraries around Transformers: peft, accelerate, sentence-transformers, torch.export, torchao."""

from __future__ import annotations

import copy
import inspect
import json

import accelerate
import peft
import pytest
import torch
import torch._dynamo.testing
import transformers
from accelerate.utils import offload_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import sparse_hf
from sparse_hf.models.hf.cache import CACHE_NAMES
from tests.crosses import sampled
from tests.models.families import (
    HEADS,
    dense_model,
    has_two_stacks,
    inputs,
    one_head,
    sparse_class,
)
from tests.models.test_parity import assert_as_exact, assert_same, in_double
from tests.models.test_pipeline import tokenizer

FULL, SPARSE = "window(None, None)", "window(20, 20) | first(3)"
LLAMA = "LlamaForCausalLM"


def sparse_model(head: str, pattern: str = SPARSE, dense=None):
    layers = {"layers": {"decoder": pattern}} if has_two_stacks(head) else {}
    return sparse_hf.sparsify(dense_model(head) if dense is None else dense, pattern, **layers)


def unlabelled(head: str, side: str = "right", names=("input_ids", "attention_mask", "decoder_input_ids")):
    return {name: value for name, value in inputs(head, side).items() if name in names}


@torch.no_grad()
def answers(model, batch):
    return model(**batch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder, and what the model in it answers."""
    folder, batch = tmp_path_factory.mktemp("llama"), unlabelled(LLAMA)
    model = sparse_model(LLAMA)
    model.save_pretrained(folder)
    return folder, batch, answers(model, batch)


# --- peft ---

ADAPTED = {
    "LlamaForCausalLM": "CAUSAL_LM",
    "BertForSequenceClassification": "SEQ_CLS",
    "BertForTokenClassification": "TOKEN_CLS",
    "BertForQuestionAnswering": "QUESTION_ANS",
    "T5ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def lora(head: str) -> peft.LoraConfig:
    # peft knows the dense type, of which the sparse one keeps every module's name
    return peft.LoraConfig(
        r=4, target_modules=LORA_TARGETS[HEADS[head]], task_type=ADAPTED.get(head, "FEATURE_EXTRACTION")
    )


# of `PeftModel` itself, whatever the model
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("head", ADAPTED)
def test_lora_trains_travels_and_merges(head, tmp_path):
    # spans are labelled without padding only
    batch = inputs(head, "none")
    adapted = peft.get_peft_model(sparse_model(head), lora(head)).train()
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert learning and all("lora_" in name or "modules_to_save" in name for name in learning)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(adapted(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == learning
    wanted = answers(adapted.eval(), batch)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(sparse_model(head), tmp_path).eval()
    assert_same(answers(loaded, batch), wanted, batch)
    merged = loaded.merge_and_unload()
    assert type(merged) is sparse_class(head) and not any("lora_" in name for name, _ in merged.named_parameters())
    # sums in another order
    assert_same(answers(merged, batch), wanted, batch, 5e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_hands_marks_on():
    sparse = sparse_hf.sparsify(dense_model("BertModel"), "window(5, 5) | marked()")
    batch, marks = unlabelled("BertModel"), torch.zeros(2, 150, dtype=torch.long)
    marks[:, 3] = 1
    adapted = peft.get_peft_model(sparse, lora("BertModel")).eval()
    # adapters begin as nothing
    marked = answers(adapted, {**batch, "global_attention_mask": marks})
    assert_same(marked, answers(sparse, {**batch, "global_attention_mask": marks}), batch)
    assert not torch.allclose(marked[0], answers(adapted, batch)[0], atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_finds_the_target_modules_of_the_dense_family():
    def adapted_by(model, **given) -> set[str]:
        adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
        return {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}

    # peft looks them up by model type
    for given in ({}, {"target_modules": "all-linear"}):
        found = adapted_by(sparse_model(LLAMA), **given)
        assert found and found == adapted_by(dense_model(LLAMA), **given)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("head", [LLAMA, "BertForSequenceClassification"])
def test_prompt_tuning_answers_as_in_the_dense_model(head):
    batch, dense = unlabelled(head), dense_model(head)
    config = peft.PromptTuningConfig(task_type=ADAPTED[head], num_virtual_tokens=5)
    tuned = []
    for model in (dense, sparse_model(head, FULL, copy.deepcopy(dense))):
        torch.manual_seed(1)
        tuned.append(peft.get_peft_model(model, config).eval())
    found, wanted = (answers(model, batch).logits for model in tuned[::-1])
    if head == LLAMA:
        batch = {"input_ids": batch["input_ids"][1:, :40]}
        real = torch.cat([torch.ones(2, 5), inputs(head)["attention_mask"]], 1).bool()
        found, wanted = found[real], wanted[real]
        # with the cache of Transformers 5.24 peft repeats the virtual tokens at each step, in dense models too
        made = [model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False) for model in tuned]
        assert torch.equal(*made)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- sentence-transformers ---


def mean_by_hand(folder, documents: list[str], length: int) -> Tensor:
    model, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = words(documents, truncation=True, max_length=length, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == length
    states = answers(model, {name: batch[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    real = batch["attention_mask"][..., None]
    return (states * real).sum(1) / real.sum(1)


def assert_near(one: Tensor, other: Tensor, limit: float = 1e-5):
    torch.testing.assert_close(one, other, rtol=limit, atol=limit)


@pytest.fixture
def bert(tmp_path):
    dense = tmp_path / "dense"
    dense_model("BertModel").save_pretrained(dense)
    words = tokenizer()
    words.model_max_length = 512
    words.save_pretrained(dense)
    return dense


DOCUMENTS = [" ".join(f"w{4 + i * step % 90}" for i in range(count)) for step, count in ((7, 5000), (3, 300))]


def test_sentence_transformers_pools_a_converted_folder(bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    sparse_hf.convert(bert, tmp_path / "sparse", SPARSE, max_length=4096, progress=False)
    wanted = mean_by_hand(tmp_path / "sparse", DOCUMENTS, 4096)
    encoder = SentenceTransformer(str(tmp_path / "sparse"), device="cpu")
    assert encoder.max_seq_length == 4096
    assert_near(encoder.encode(DOCUMENTS, convert_to_tensor=True), wanted)
    encoder.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert_near(again.encode(DOCUMENTS, convert_to_tensor=True), wanted)


def test_sentence_transformers_modules_travel_with_conversion(bert, tmp_path):
    from sentence_transformers import SentenceTransformer

    bare = SentenceTransformer(str(bert), device="cpu")
    bare.save(str(tmp_path / "bare"))
    pooling = tmp_path / "bare" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}))
    (tmp_path / "bare" / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": false}')
    sparse_hf.convert(tmp_path / "bare", tmp_path / "sparse", SPARSE, max_length=1024, progress=False)
    encoder = SentenceTransformer(str(tmp_path / "sparse"), device="cpu")
    assert encoder.max_seq_length == 1024
    words = AutoTokenizer.from_pretrained(bert)(DOCUMENTS[0], return_tensors="pt", truncation=True, max_length=1024)
    first = answers(AutoModel.from_pretrained(tmp_path / "sparse").eval(), {"input_ids": words.input_ids})[0][:, 0]
    assert_near(encoder.encode(DOCUMENTS[:1], convert_to_tensor=True), first)


@pytest.mark.slow
def test_sentence_transformers_encodes_with_real_weights(tmp_path):
    from sentence_transformers import SentenceTransformer

    from examples.assets import MINILM, fetch
    from examples.demo import moby_dick

    sparse_hf.convert(
        fetch(MINILM), tmp_path / "sparse", "window(128, 128) | first(1)", max_length=4096, progress=False
    )
    documents = [moby_dick()[:30_000], moby_dick()[40_000:50_000]]
    encoder = SentenceTransformer(str(tmp_path / "sparse"), device="cpu")
    found = encoder.encode(documents, convert_to_tensor=True)
    assert_near(found, mean_by_hand(tmp_path / "sparse", documents, 4096), 1e-4)


# --- torch.export ---

DISENTANGLED = ("DebertaForMaskedLM", "DebertaV2ForMaskedLM")


@pytest.mark.parametrize("head", DISENTANGLED)
def test_export_is_refused_where_blocks_are_walked(head):
    with torch.no_grad(), pytest.raises(NotImplementedError, match="export the dense model"):
        torch.export.export(sparse_model(head), (), unlabelled(head))


EXPORTED = [*(h for h in one_head(encoder=True) if h not in DISENTANGLED), "BertForSequenceClassification"]


@pytest.mark.parametrize(
    "head", sampled(("BertForMaskedLM", "ModernBertForMaskedLM", "BertForSequenceClassification"), EXPORTED)
)
def test_export_of_encoders(head, tmp_path):
    sparse, batch = sparse_model(head), unlabelled(head)
    lengths = {name: {1: torch.export.Dim("length", min=2, max=500)} for name in batch}
    shorter = {name: value[:, :77] for name, value in unlabelled(head, "none").items()}
    with torch.no_grad():
        fixed = torch.export.export(sparse, (), batch)
        free = torch.export.export(sparse, (), batch, dynamic_shapes=lengths)
    torch.export.save(free, tmp_path / "free.pt2")
    loaded = torch.export.load(tmp_path / "free.pt2")
    assert_same(answers(fixed.module(), batch), answers(sparse, batch), batch)
    for given in (batch, shorter):
        wanted = answers(sparse, given)
        assert_same(answers(free.module(), given), wanted, given)
        assert_same(answers(loaded.module(), given), wanted, given)


# --- quantised linears ---


def unpadded(head: str):
    # the range of the activations takes in padding, whose states are others than the dense model's
    return unlabelled(head, "none")


def assert_quantised_alike(sparse, dense, batch, limit=1e-4):
    assert_same(answers(sparse, batch), answers(dense, batch), batch, limit)


def quantize_dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


# torch moves its quantisation to torchao, which is not needed for this one
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("head", [LLAMA, "BertForMaskedLM"])
def test_dynamic_quantisation(head):
    dense, batch = dense_model(head), unpadded(head)
    wanted = quantize_dynamic(dense)
    # a sum that rounds the other way may move an activation by one of its 256 steps
    step = 0.02
    assert_quantised_alike(quantize_dynamic(sparse_model(head, FULL, dense)), wanted, batch, step)
    packed, reference = (quantize_dynamic(sparse_model(head)) for _ in range(2))
    reference.set_attn_implementation("sparse_reference")
    assert_quantised_alike(packed, reference, batch, step)
    assert (answers(packed, batch).logits - answers(wanted, batch).logits).abs().max() > 2 * step


@pytest.mark.parametrize("head", [LLAMA, "BertForSequenceClassification"])
def test_torchao_weights(head, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="optional: pip install torchao")
    int8 = torchao.Int8WeightOnlyConfig()
    dense, batch = dense_model(head), unpadded(head)
    packed = sparse_model(head, FULL)
    torchao.quantize_(packed, int8)
    torchao.quantize_(dense, int8)
    assert_quantised_alike(packed, dense, batch)
    # made sparse after it was quantised
    assert_quantised_alike(sparse_model(head, FULL, dense), dense, batch)
    # quantised on loading, and loaded as it was quantised
    sparse_model(head).save_pretrained(tmp_path / "plain")
    config = transformers.TorchAoConfig(int8)
    loaded = sparse_class(head).from_pretrained(tmp_path / "plain", quantization_config=config)
    loaded.save_pretrained(tmp_path / "packed")
    again = sparse_class(head).from_pretrained(tmp_path / "packed")
    assert type(again.config.quantization_config).__name__ == "TorchAoConfig"
    assert_quantised_alike(again, loaded, batch)
    again.set_attn_implementation("sparse_reference")
    assert_quantised_alike(again, loaded, batch)


def test_bitsandbytes_weights(llama):
    pytest.importorskip("bitsandbytes", reason="optional: pip install bitsandbytes")
    folder, batch, wanted = llama
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    # 8 bits of small layers
    assert_same(answers(loaded, batch), wanted, batch, 0.3)


# --- accelerate ---

SPLIT = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


# transformers before 5.24, where every weight is on the disk
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize(
    ("placement", "expected"),
    [({"device_map": "auto"}, None), ({"device_map": SPLIT}, SPLIT), ({"device_map": "auto", "max_memory": {"cpu": 30_000}}, {"": "disk"})],
    ids=["auto", "cpu and disk", "auto, little memory"],
)  # fmt: skip
def test_device_map(placement, expected, llama, tmp_path):
    folder, batch, wanted = llama
    model = AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path, **placement)
    assert getattr(model, "hf_device_map", None) == expected
    assert_same(answers(model, batch), wanted, batch)
    new = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **new), sparse_model(LLAMA).generate(**batch, **new))


def dispatched(model, folder):
    return accelerate.dispatch_model(model, SPLIT, main_device="cpu", offload_dir=folder)


def offloaded(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    offload_state_dict(folder, model.state_dict())
    return accelerate.disk_offload(model, folder, execution_device="cpu")


@pytest.mark.parametrize("place", [dispatched, offloaded, on_disk])
def test_offload(place, llama, tmp_path):
    _, batch, wanted = llama
    assert_same(answers(place(sparse_model(LLAMA), tmp_path), batch), wanted, batch)


def test_load_checkpoint_and_dispatch(llama):
    folder, batch, wanted = llama
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(sparse_hf.SparseLlamaConfig.from_pretrained(folder)).eval()
    assert_same(answers(accelerate.load_checkpoint_and_dispatch(empty, folder, "auto"), batch), wanted, batch)


# --- half precision ---


# the stock DeBERTa fills its scores with a number that overflows 16 bits
HALVES = [head for head in one_head() if head != "DebertaForMaskedLM"]


@pytest.mark.cross
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", sampled(HALVES[::3], HALVES))
def test_half_precision(head, dtype, tmp_path):
    # without padding, of which the stock Gemma 2 makes NaN in double precision
    dense, batch = dense_model(head), unlabelled(head, "none")
    exact = answers(in_double(dense), batch)
    sparse_model(head, FULL, dense).save_pretrained(tmp_path)
    loaded = sparse_class(head).from_pretrained(tmp_path, dtype=dtype)
    cast = sparse_model(head, FULL, dense).to(dtype)
    stock = answers(dense, batch)
    for model in (loaded, cast):
        assert next(model.parameters()).dtype == dtype
        assert_as_exact(answers(model, batch), stock, exact, batch)


# --- generation ---

GREEDY, BEAMS = {"do_sample": False}, {"do_sample": False, "num_beams": 3}
SAMPLING = ({"do_sample": True, "top_k": 5}, {"do_sample": True, "num_beams": 2})
SAMPLED = (LLAMA, "Gemma3ForCausalLM", "T5ForConditionalGeneration")


def prompt(head: str) -> dict[str, Tensor]:
    return unlabelled(head, "right" if has_two_stacks(head) else "left", ("input_ids", "attention_mask"))


def generate(model, batch, **options):
    torch.manual_seed(5)
    return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, **options)


# with and without a window of their own, positions of every kind, one stack and two
GENERATED = (*SAMPLED, "GPT2LMHeadModel", "BloomForCausalLM", "MistralForCausalLM", "BartForConditionalGeneration")


@pytest.mark.parametrize("head", sampled(GENERATED, one_head(generating=True)))
def test_generation(head):
    batch, dense = prompt(head), dense_model(head)
    full, sparse = sparse_model(head, FULL, dense), sparse_model(head, SPARSE, dense)
    for way in (GREEDY, BEAMS, *(SAMPLING if head in SAMPLED else ())):
        as_dense, without_cache = generate(dense, batch, **way), generate(sparse, batch, **way, use_cache=False)
        for cache in ("dynamic", "static"):
            assert torch.equal(generate(full, batch, **way, cache_implementation=cache), as_dense), (way, cache)
            assert torch.equal(generate(sparse, batch, **way, cache_implementation=cache), without_cache), (way, cache)


def test_generation_by_prompt_lookup():
    batch = {"input_ids": prompt(LLAMA)["input_ids"][1:]}
    sparse = sparse_model(LLAMA)
    assert torch.equal(generate(sparse, batch, **GREEDY, prompt_lookup_num_tokens=2), generate(sparse, batch, **GREEDY))


@pytest.mark.cross
@pytest.mark.parametrize("kind", ["empty", "filled", "static"])
@pytest.mark.parametrize("head", ["MistralForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("slides", [True, False])
def test_generation_with_a_sliding_cache_of_the_users(head, kind, slides):
    sparse, ids = sparse_model(head), prompt(head)["input_ids"][1:]
    given = {"max_cache_len": 300} if kind == "static" else {}
    config = dense_model(head).config if slides else sparse.config
    cache = (transformers.StaticCache if given else transformers.DynamicCache)(config=config, **given)
    assert any(cache.is_sliding) == slides
    name = next(name for name in CACHE_NAMES if name in inspect.signature(sparse.forward).parameters)
    if kind == "filled":
        answers(sparse, {"input_ids": ids[:, :-5], name: cache})
    found = generate(sparse, {"input_ids": ids}, **GREEDY, **{name: cache})
    assert torch.equal(found, generate(sparse, {"input_ids": ids}, **GREEDY, use_cache=False))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("Llama", SPARSE),
        ("Longformer", None),
        pytest.param("Bert", SPARSE, marks=pytest.mark.slow),
        pytest.param("BigBird", None, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if value and value.isalpha() else "",
)
def test_another_length_compiles_nothing(family, pattern):
    torch._dynamo.reset()
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    own = {"BigBird": {"block_size": 16, "num_random_blocks": 1}, "Longformer": {"attention_window": 16}}.get(
        family, {}
    )
    config = getattr(transformers, f"{family}Config")(**sizes, **own, max_position_embeddings=512)
    model = sparse_hf.sparsify(getattr(transformers, f"{family}Model")(config), pattern)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(model, backend=counter, dynamic=True), []
    for length in (160, 192, 201):
        compiled(input_ids=torch.randint(3, 99, (2, length)))[0].sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


@pytest.mark.compiles
def test_generation_with_a_compiled_model_and_a_static_cache():
    torch._dynamo.reset()
    sparse, batch = sparse_model(LLAMA, dense=dense_model(LLAMA, num_hidden_layers=1)), prompt(LLAMA)
    wanted = generate(sparse, batch, **GREEDY)
    sparse.forward = torch.compile(sparse.forward, backend="eager")
    assert torch.equal(generate(sparse, batch, **GREEDY, cache_implementation="static"), wanted)


# what the compiler warns of depends on its version and on the card
@pytest.mark.filterwarnings("default")
@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sparse", "sparse_blockwise"])
def test_generation_compiles_itself_on_the_gpu(implementation):
    # with a static cache `generate` compiles the model and replays CUDA graphs
    torch._dynamo.reset()
    dense = dense_model(LLAMA, hidden_size=128, head_dim=64, num_attention_heads=2, num_key_value_heads=1).cuda()
    sparse, batch = sparse_model(LLAMA, SPARSE, dense), {n: t.cuda() for n, t in prompt(LLAMA).items()}
    sparse.set_attn_implementation(implementation)
    wanted = generate(sparse, batch, **GREEDY)
    assert torch.equal(generate(sparse, batch, **GREEDY, cache_implementation="static"), wanted)
