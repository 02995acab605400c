"""`generate` with a static or streaming cache compiles the steps behind the prompt: one graph, for all lengths, layers, paddings."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import CompileConfig, StaticCache

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf import compiled
from sparse_hf.models.hf.kept import Kept, read_kept
from tests.crosses import sampled, slow_but_for
from tests.models.families import VOCABULARY, dense_model, has_two_stacks, named_cache, one_head
from tests.table import PATTERNS as TABLE
from tests.table import causal_form

pytestmark = pytest.mark.compiles
# Transformers compiles none of these
NO_GRAPH = ("BloomForCausalLM", "FalconForCausalLM", "MptForCausalLM")
DECODERS = [head for head in one_head(generating=True) if not has_two_stacks(head) and head not in NO_GRAPH]
LLAMA, PATTERN = "LlamaForCausalLM", "window(7, 0) | first(2)"
PATTERNS = (
    "window(7, 0)", "stride(4) | window(2, 0)", "chunk(8)", "fixed(8, 2)", "window(3, 0) | marked()", "full()",
    "per_head(window(3, 0), window(9, 0), full(), first(3) | window(1, 0))",
)  # fmt: skip
# what has an end
STREAMED = (
    PATTERN, "window(7, 0)", "chunk(8)", "chunk(4, 1) | first(2)", "window(5, 0) | (first(2) & window(9, 0))",
    "stride(2) & window(9, 0)", "per_head(window(3, 0), window(9, 0), first(4), first(3) | window(1, 0))",
)  # fmt: skip
NEW = 12


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, a graph each; a break or a second graph for another length would be an error or one more."""
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False)
    # `generate` compiles on GPUs alone, and leaves this door open to tests
    config._compile_all_devices = True
    return config, found


def prompt(rows: int = 2, length: int = 20) -> dict[str, torch.Tensor]:
    """Ids and a mask, of which the first row is padded on the left."""
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def one_layer(pattern: str = PATTERN, **more):
    """What a graph holds of one layer it holds of all."""
    return sparse_hf.sparsify(dense_model(LLAMA, num_hidden_layers=1).eval(), pattern, **more)


def how(**more) -> dict:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}


def cached(model, kind: str) -> dict:
    """The arguments of `generate` that name a cache."""
    if kind == "static":
        return {"cache_implementation": "static"}
    return named_cache(model, StreamingCache(model.config))


def compare(model, graphs, inputs, kind: str = "static", **more) -> None:
    config, found = graphs
    before = len(found)
    right, eager, got = (
        model.generate(**inputs, **how(**more, **way))
        for way in ({"use_cache": False}, cached(model, kind), {**cached(model, kind), "compile_config": config})
    )
    assert torch.equal(got, right) and torch.equal(eager, right)
    assert len(found) - before == 1


@pytest.mark.cross
@pytest.mark.parametrize(
    "head", slow_but_for((LLAMA, "GPT2LMHeadModel", "Gemma2ForCausalLM", "OPTForCausalLM"), DECODERS)
)
@pytest.mark.parametrize("kind", ["static", "streaming"])
def test_families(head, kind, graphs):
    compare(sparse_hf.sparsify(dense_model(head).eval(), PATTERN), graphs, prompt(), kind)


@pytest.mark.parametrize("name", slow_but_for(("MT5",), ("T5", "MT5", "UMT5", "SwitchTransformers")))
def test_a_learned_bias_by_distance(name, graphs):
    dense_class = getattr(transformers, f"{name}ForConditionalGeneration")
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    dense = dense_class(dense_class.config_class(**sizes, decoder_start_token_id=0)).eval()
    for weight in dense.parameters():
        weight.data.normal_(0, 0.3)
    compare(sparse_hf.sparsify(dense, PATTERN), graphs, prompt())


@pytest.mark.parametrize("pattern", sampled((PATTERNS[1], *PATTERNS[4::2]), PATTERNS))
def test_patterns(pattern, graphs):
    model = one_layer(pattern, global_token_ids=(9,) if "marked" in pattern else ())
    compare(model, graphs, prompt())


def has_end(pattern: str) -> bool:
    kept = read_kept(causal_form(pattern))
    return isinstance(kept, Kept) and kept.left is not None


FAST = (("summary(16, 3) | window(0, 0)", "static"), ("chunk(50)", "streaming"))
OF_TABLE = [(p, kind) for p in TABLE for kind in ("static", "streaming") if kind == "static" or has_end(p)]


@pytest.mark.parametrize(
    ("pattern", "kind"), [pytest.param(*one, marks=() if one in FAST else pytest.mark.slow) for one in OF_TABLE]
)
def test_patterns_of_the_table(pattern, kind, graphs):
    """Behind a prompt that is longer than what most of them see; those without end, behind a static cache alone."""
    model, inputs = one_layer(pattern), prompt(length=70)
    if model.config.uses_marks:
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, [9, 40]] = 1
    compare(model, graphs, inputs, kind)


@pytest.mark.parametrize("pattern", slow_but_for((STREAMED[3], STREAMED[6]), STREAMED))
def test_patterns_that_have_an_end(pattern, graphs):
    compare(one_layer(pattern), graphs, prompt(), "streaming")


@pytest.mark.parametrize("kind", ["static", "streaming"])
def test_layers_of_several_patterns_share_a_graph(kind, graphs):
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN, layers={0: "dense"})
    compare(model, graphs, prompt(), kind)


def test_a_streaming_cache_has_one_graph_for_all_lengths_and_paddings(graphs):
    """But one for each number of rows, and one more for rows without padding."""
    config, found = graphs
    model = one_layer()
    for rows, graphs_so_far in ((2, 1), (3, 2)):
        for length, padded in ((20, 4), (47, 30), (9, 8)):
            given = prompt(rows, length)
            given["attention_mask"][0, :padded] = 0
            right = model.generate(**given, **how(use_cache=False))
            got = model.generate(**given, **how(compile_config=config), **cached(model, "streaming"))
            assert torch.equal(got, right)
        assert len(found) == graphs_so_far


@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 2, "do_sample": True}]
)
def test_beams_and_samples(way, graphs):
    config, found = graphs
    model, texts = one_layer(), []
    for given in ({"use_cache": False}, {"compile_config": config, **cached(model, "streaming")}):
        torch.manual_seed(3)
        texts.append(model.generate(**prompt(), **how(**way), **given))
    assert torch.equal(*texts)
    # Transformers compiles no beams
    assert len(found) == ("num_beams" not in way)


@pytest.mark.parametrize("kind", ["static", "streaming"])
def test_several_turns_with_one_cache(kind, graphs):
    config, found = graphs
    model = one_layer()
    cache = StaticCache(config=model.config, max_cache_len=100) if kind == "static" else StreamingCache(model.config)
    text = prompt()["input_ids"]
    for _ in range(3):
        right = model.generate(text, **how(use_cache=False))
        got = model.generate(text, **how(compile_config=config), **named_cache(model, cache))
        assert torch.equal(got, right)
        text = torch.cat((right, prompt(length=5)["input_ids"]), 1)
    assert len(found) == 1


def test_no_step_waits_for_what_the_mask_holds(graphs):
    """The mask is looked at once, before the prompt: an operator that waits for the device would cut CUDA graphs at each layer."""
    model = one_layer()
    config, found = graphs
    model.generate(**prompt(), **how(cache_implementation="static", compile_config=config))
    (graph,) = found
    operators = [node.target for node in graph.graph.nodes if "sparse_hf" in str(node.target)]
    assert operators and all(torch.Tag.cudagraph_unsafe not in operator.tags for operator in operators)


@pytest.mark.parametrize("padded", [slice(16, None), slice(6, 9)], ids=["behind", "inside"])
def test_a_prompt_with_padding_in_the_way_runs_without_compilation(padded, graphs):
    config, found = graphs
    model = one_layer()
    inputs = prompt()
    inputs["attention_mask"][1, padded] = 0
    right = model.generate(**inputs, **how(use_cache=False))
    assert torch.equal(model.generate(**inputs, **how(cache_implementation="static", compile_config=config)), right)
    assert not found


def test_a_streaming_cache_that_is_copied_cropped_and_emptied_keeps_its_graph(graphs):
    config, found = graphs
    model = one_layer()
    cache, first = StreamingCache(model.config, spare=16), prompt()["input_ids"]

    def check(text: torch.Tensor, held: StreamingCache) -> torch.Tensor:
        right = model.generate(text, **how(use_cache=False))
        assert torch.equal(model.generate(text, **how(compile_config=config), **named_cache(model, held)), right)
        return right

    text = torch.cat((check(first, cache), prompt(length=5)["input_ids"]), 1)
    check(text, copy.deepcopy(cache))
    answer = check(text, cache)
    cache.crop(-3)
    check(torch.cat((answer[:, :-4], prompt(length=5)["input_ids"]), 1), cache)
    cache.reset()
    check(first, cache)
    assert len(found) == 1


def test_drafts_are_of_one_graph_from_their_first_token_on(graphs, monkeypatch):
    config, found = graphs
    dense, eager = dense_model(LLAMA).eval(), []
    twin = sparse_hf.sparsify(dense, PATTERN)
    twin.generation_config.assistant_confidence_threshold = 0.0
    twin.generation_config.num_assistant_tokens = 3
    # newer versions hand no such configuration on to assistants, which a GPU compiles by itself
    monkeypatch.setattr(twin, "_default_compile_config", lambda: config, raising=False)
    monkeypatch.setattr(twin, "_valid_auto_compile_criteria", lambda *given: True, raising=False)
    monkeypatch.setattr("sparse_hf.models.hf.model_mixin.refuse_tracing", lambda: eager.append(1))
    given = prompt(rows=1)["input_ids"]
    right = dense.generate(given, **how())
    assert torch.equal(dense.generate(given, assistant_model=twin, **how()), right)
    # of the twin, its head and the model in it, the prompt alone
    assert len(found) == 1 and len(eager) == 2


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def _scale(model):
    model.model.layers[1].self_attn.scaling *= 3


def _swap(model):
    layer = model.model.layers[0].mlp
    layer.up_proj = torch.nn.Sequential(layer.up_proj, torch.nn.Tanh())


def _patterns(model):
    model.config.sparse_attention = {
        **model.config.sparse_attention,
        "patterns": {"all": "window(2, 0)"},
        "layers": ["all"] * 2,
    }


def _implementation(model):
    model.set_attn_implementation("sparse_reference")


def _dtype(model):
    model.double()


CHANGES = [_hook, _scale, _swap, _patterns, _implementation, _dtype]


@pytest.mark.parametrize("change", sampled(CHANGES[::2], CHANGES))
def test_a_model_that_was_changed_has_another_graph(change, graphs):
    """Graphs ask once a call whether the model is the one that they were made of."""
    config, found = graphs
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    before = model.generate(**prompt(), **how(cache_implementation="static", compile_config=config))
    change(model)
    right = model.generate(**prompt(), **how(use_cache=False))
    for _ in range(2):
        got = model.generate(**prompt(), **how(cache_implementation="static", compile_config=config))
        assert torch.equal(got, right)
    assert len(found) == 2
    assert change in (_implementation, _dtype) or not torch.equal(before, right)


def test_models_of_a_class_have_graphs_of_their_own(graphs):
    config, found = graphs
    models = [one_layer(pattern) for pattern in (PATTERN, "window(2, 0)")]
    models.append(copy.deepcopy(models[0]))
    models[2].model.layers[0].self_attn.scaling *= 3
    for model in (*models, *models):
        right = model.generate(**prompt(), **how(use_cache=False))
        assert torch.equal(
            model.generate(**prompt(), **how(cache_implementation="static", compile_config=config)), right
        )
    assert len(found) == 3


def test_a_step_asks_nothing_of_the_model_but_its_version(graphs, monkeypatch):
    config, found = graphs
    seen = []

    def watched(guards, keep=compiled.keep_guards):
        kept = keep(guards)
        seen.extend((guard.name, is_kept) for guard, is_kept in zip(guards, kept, strict=True))
        return kept

    monkeypatch.setattr(compiled, "keep_guards", watched)
    model = sparse_hf.sparsify(dense_model(LLAMA).eval(), PATTERN)
    model.generate(**prompt(), **how(compile_config=config), **cached(model, "streaming"))
    of_model = [is_kept for name, is_kept in seen if compiled.OF_MODEL.match(name)]
    assert len(of_model) > 200 and sum(of_model) == len({n for n, k in seen if k and compiled.OF_MODEL.match(n)}) == 1
    assert all(is_kept for name, is_kept in seen if not compiled.OF_MODEL.match(name)) and len(found) == 1


@pytest.mark.parametrize("head", DECODERS)
def test_families_remember_nothing_of_a_text(head):
    model = sparse_hf.sparsify(dense_model(head).eval(), PATTERN)
    before = compiled.state_of(model)
    model.generate(**prompt(), **how(cache_implementation="static"))
    assert compiled.forgets_texts(model) and compiled.state_of(model) == before


def test_angles_of_the_longest_text_are_asked_for_at_every_step(graphs):
    model = one_layer()
    assert compiled.forgets_texts(model)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = CompileConfig()
    assert not compiled.forgets_texts(model) and compiled.lean_config(model, config) is config


OTHERS = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
OURS = {"guard_filter_fn": compiled.keep_guards}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"triton.cudagraphs": True, **OURS}),
        ({"mode": None, "options": {"max_autotune": True}}, {"max_autotune": True, **OURS}),
        ({"mode": "max-autotune"}, None),
        ({"mode": None, "options": OTHERS}, OTHERS),
    ],
)
def test_settings_of_torch_that_a_call_has_stay(given, options):
    model = one_layer()
    config = CompileConfig(**given)
    lean = compiled.lean_config(model, config)
    assert lean.options == options and config == CompileConfig(**given)
    assert lean.fullgraph == config.fullgraph and lean.backend == config.backend
