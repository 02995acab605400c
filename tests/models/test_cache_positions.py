"""First tokens as far away as among the keys that are kept, against keys that are turned anew for each query in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, DynamicCache

import sparse_hf
from sparse_hf import StreamingCache
from sparse_hf.models.hf.cache import logger as cache_logger
from sparse_hf.models.hf.turning import find_turns
from tests.models.families import VOCABULARY, dense_model, named_cache

LLAMA, SPARSE = "LlamaForCausalLM", "window(12, 0) | first(3)"
SINKS, LEFT = 3, 12
LIMIT = {"rtol": 1e-4, "atol": 2e-5}
PIECES = (40, 1, 1, 5, 1, 30, 12)
GREEDY = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
REFERENCE = "cache_positions_by_hand"


def text(rows: int = 2, length: int = 90) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def turned(t: Tensor, positions: Tensor, freq: Tensor) -> Tensor:
    """`[..., N, D]` by the angles of positions `[N]`, halves of the first numbers of a head being pairs."""
    angles = positions.double()[:, None] * freq.double()
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    part, rest = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
    one, other = part.chunk(2, -1)
    return torch.cat((part * cos + torch.cat((-other, one), -1) * sin, rest), -1)


def by_hand(freq: Tensor, start: int):
    """An attention function that turns what each query keeps to its places in a cache, from a position on."""

    def attention(module, query, key, value, mask, scaling=None, **_):
        repeats, every = query.shape[1] // key.shape[1], torch.arange(query.shape[2])
        q, k = (turned(t.double(), -every, freq) for t in (query, key))
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, value.double()))
        out = torch.empty_like(q)
        for i in range(q.shape[2]):
            kept = every[(every <= i) & ((every < SINKS) | (every >= i - LEFT))]
            places = torch.arange(len(kept)) if i >= start else kept
            own = turned(q[:, :, i : i + 1], places[-1:], freq)
            keys = turned(k[:, :, kept], places, freq)
            out[:, :, i : i + 1] = (own @ keys.mT * scaling).softmax(-1) @ v[:, :, kept]
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    return attention


@torch.no_grad()
def reference(dense, ids: Tensor, start: int = 0) -> Tensor:
    """The dense model's answers with `by_hand`."""
    freq = next(b for name, b in dense.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    AttentionInterface.register(REFERENCE, by_hand(freq, start))
    AttentionMaskInterface.register(REFERENCE, lambda *args, **kwargs: None)
    before = dense.config._attn_implementation
    dense.set_attn_implementation(REFERENCE)
    try:
        return dense(ids, use_cache=False).logits
    finally:
        dense.set_attn_implementation(before)


@torch.no_grad()
def in_pieces(model, ids: Tensor, cache, sizes=PIECES, mask: Tensor | None = None) -> Tensor:
    answers, begin = [], 0
    for size in sizes:
        given = named_cache(model, cache)
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begin : begin + size]
            given |= {"attention_mask": mask[:, : begin + size], "position_ids": positions}
        answers.append(model(ids[:, begin : begin + size], **given).logits)
        begin += size
    return torch.cat(answers, 1)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 1e4,
    },
}  # fmt: skip


FULL = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        *((LLAMA, {"rope_parameters": rope}) for rope in ROPES.values()),
        ("GPTNeoXForCausalLM", {}),
        ("Qwen3ForCausalLM", FULL),
        ("Qwen2ForCausalLM", FULL),
    ],
    ids=lambda x: x.get("rope_parameters", {}).get("rope_type") if isinstance(x, dict) else x,
)
def test_as_keys_that_are_turned_anew(head, changes):
    dense, ids = dense_model(head, **changes), text()
    sparse = sparse_hf.sparsify(dense, SPARSE)
    wanted = reference(dense, ids)
    for sizes in (PIECES, (90,), (30, *[1] * 60)):
        found = in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache"), sizes)
        torch.testing.assert_close(found, wanted, **LIMIT)
    assert (in_pieces(sparse, ids, StreamingCache(sparse.config)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["sparse_reference", "sparse_blockwise"])
def test_on_any_backend(backend):
    dense, ids = dense_model(LLAMA), text()
    sparse, wanted = sparse_hf.sparsify(dense, SPARSE), reference(dense, ids)
    sparse.set_attn_implementation(backend)
    found = in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache"))
    torch.testing.assert_close(found, wanted, **LIMIT)


def test_padded_rows_answer_as_they_do_alone():
    dense, ids = dense_model(LLAMA), text(3)
    sparse = sparse_hf.sparsify(dense, SPARSE)
    padding = torch.tensor([33, 0, 45])
    mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long()
    found = in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache"), mask=mask)
    for row, first in enumerate(padding.tolist()):
        torch.testing.assert_close(found[row : row + 1, first:], reference(dense, ids[row : row + 1, first:]), **LIMIT)


def test_from_the_trained_reach_on():
    """By name, a stream and one pass over a text are the same, and what was within reach is left as it was."""
    dense, ids = dense_model(LLAMA, max_position_embeddings=50), text()
    sparse, wanted = (
        sparse_hf.sparsify(dense, SPARSE),
        reference(dense_model(LLAMA, max_position_embeddings=50), text(), 50),
    )
    found = in_pieces(sparse, ids, StreamingCache(sparse.config, positions="auto"))
    torch.testing.assert_close(found, wanted, **LIMIT)
    sparse.generation_config.cache_implementation = "streaming"
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids, use_cache=False).logits, wanted, **LIMIT)
        # other caches leave positions as they are
        true = in_pieces(sparse, ids, StreamingCache(sparse.config))
        torch.testing.assert_close(in_pieces(sparse, ids, DynamicCache()), true, **LIMIT)
        within = sparse(ids[:, :50], use_cache=False).logits
    torch.testing.assert_close(within, wanted[:, :50], **LIMIT)


def test_positions_that_jump():
    """Of a text whose tokens behind the first stand far away, as in the middle of a stream."""
    sparse = sparse_hf.sparsify(dense_model(LLAMA), SPARSE)
    sparse.generation_config.cache_implementation = "streaming"
    ids, places = text(1, 60), torch.arange(60)[None]
    with torch.no_grad():
        places = torch.where(places < SINKS, places, places + 5000)
        # without a mask, Transformers takes a jump for another document
        far = sparse(ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=False).logits
        near = reference(dense_model(LLAMA), ids)
    # angles at 5,000 have the roundings of float32
    torch.testing.assert_close(far[:, SINKS:], near[:, SINKS:], rtol=2e-2, atol=2e-3)


def test_generate_says_once_from_where(caplog):
    logging.getLogger("sparse_hf").propagate = True
    cache_logger.warning_once.cache_clear()
    dense = dense_model(LLAMA, max_position_embeddings=50)
    sparse, ids = sparse_hf.sparsify(dense, SPARSE), text(2, 40)
    found = sparse.generate(ids, cache_implementation="streaming", **GREEDY)
    ids = found[:, :40]
    for _ in range(20):
        ids = torch.cat((ids, reference(dense, ids, 50)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)
    assert caplog.text.count("seen as far away as they are among the keys that are kept") == 1


@pytest.mark.compiles
def test_one_graph_before_and_behind_the_reach():
    torch._dynamo.reset()
    graphs = []
    config = CompileConfig(
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True, mode=None, dynamic=False
    )
    config._compile_all_devices = True
    sparse, ids = sparse_hf.sparsify(dense_model(LLAMA, max_position_embeddings=50), SPARSE), text(2, 40)
    wanted = sparse.generate(ids, cache_implementation="streaming", **GREEDY)
    found = sparse.generate(ids, cache_implementation="streaming", compile_config=config, **GREEDY)
    assert torch.equal(found, wanted)
    assert len(graphs) == 1


@pytest.mark.parametrize("head", ["Cohere2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM"])
def test_how_layers_turn_their_keys_is_seen(head):
    """Pairs side by side, kinds of layers with angles of their own, layers without any."""
    dense = dense_model(head)
    turns = find_turns(dense_to_sparse := sparse_hf.sparsify(dense, SPARSE))
    assert len(turns) == dense.config.num_hidden_layers and any(turns)
    assert find_turns(dense_to_sparse) is turns
    if head.startswith("Cohere2"):
        assert [turn is None or turn.interleaved for turn in turns] == [True, True]


def test_refuses_positions_that_cannot_be_turned():
    gpt2 = sparse_hf.sparsify(dense_model("GPT2LMHeadModel"), SPARSE)
    with pytest.raises(ValueError, match="sparse_gpt2 has positions that are learned.*use positions='true'"):
        StreamingCache(gpt2.config, positions="cache")
    with pytest.raises(ValueError, match="positions is 'relative'; it must be one of 'true', 'cache', 'auto'"):
        StreamingCache(sparse_hf.sparsify(dense_model(LLAMA), SPARSE).config, positions="relative")


# short texts are of up to 32 tokens, or of as many as are read here
CHANGING = {
    "dynamic": lambda short: (
        LLAMA, {"max_position_embeddings": short, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "longrope": lambda short: (
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 512, "original_max_position_embeddings": short, "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0] * 4,
                "original_max_position_embeddings": short, "attention_factor": 1.1,
            },
        },
    ),
}  # fmt: skip


def changing(kind: str, short: int = 32, pattern: str = SPARSE, **more):
    head, changes = CHANGING[kind](short)
    dense = dense_model(head, **changes)
    return dense, sparse_hf.sparsify(dense, pattern, **more)


@pytest.mark.parametrize("kind", CHANGING)
def test_angles_that_change_are_those_of_short_texts(kind):
    """However long a stream is, as by the dense class at a length at which its angles have not changed."""
    ids, (_, sparse) = text(), changing(kind)
    wanted = reference(changing(kind, short=512)[0], ids)
    for sizes in (PIECES, (90,), (30, *[1] * 60)):
        found = in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache"), sizes)
        torch.testing.assert_close(found, wanted, **LIMIT)
    assert (in_pieces(sparse, ids, StreamingCache(sparse.config)) - wanted).abs().max() > 1e-3
    # and passes without such a cache are those of the dense class, as before
    dense, whole = changing(kind)[0], sparse_hf.sparsify(changing(kind)[0], "window(None, 0)")
    with torch.no_grad():
        in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache"))
        torch.testing.assert_close(whole(ids).logits, dense(ids).logits, **LIMIT)
        torch.testing.assert_close(whole(ids[:, :20]).logits, dense(ids[:, :20]).logits, **LIMIT)


@pytest.mark.parametrize("kind", CHANGING)
def test_what_versions_wrap_angles_with_changes_nothing(kind, monkeypatch):
    """Some have `no_grad` around the change of angles, which some write in place."""
    ids, (_, sparse) = text(), changing(kind)
    rotary = sparse.model.rotary_emb
    before = {name: value.clone() for name, value in vars(rotary).items() if isinstance(value, torch.Tensor)}
    wanted = in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache"))
    monkeypatch.setattr(type(rotary), "forward", torch.no_grad()(type(rotary).forward))
    torch.testing.assert_close(in_pieces(sparse, ids, StreamingCache(sparse.config, positions="cache")), wanted)
    assert all(torch.equal(getattr(rotary, name), value) for name, value in before.items())


@pytest.mark.parametrize("kind", CHANGING)
def test_generate_goes_on_where_angles_would_change(kind):
    """Phi-3 would compute all tokens again there; new tokens alone are enough."""
    ids, (_, sparse), (far, _) = text(2, 25), changing(kind), changing(kind, short=512)
    wanted = ids
    for _ in range(20):
        wanted = torch.cat((wanted, reference(far, wanted)[:, -1:].argmax(-1)), 1)
    cache, passes = StreamingCache(sparse.config, positions="cache"), []
    hook = sparse.lm_head.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    assert torch.equal(sparse.generate(ids, **named_cache(sparse, cache), **GREEDY), wanted)
    hook.remove()
    # beside two passes of a token that show how layers turn their keys
    assert passes[:2] == [1, 1] and passes[-19:] == [1] * 19 and len(passes) == 22


def test_refuses_angles_that_change_within_the_cache():
    """What a layer keeps is longer than a short text; by itself, nothing is turned."""
    for kind in CHANGING:
        for more, seen in (
            ({"pattern": "window(30, 0) | first(3)"}, "34 tokens"),
            ({"layers": {1: "dense"}}, "all tokens of a text"),
        ):
            config = changing(kind, **more)[1].config
            with pytest.raises(
                ValueError, match=f"rope_type '{kind}' do beyond 32 tokens of a text, while a layer keeps {seen}"
            ):
                StreamingCache(config, positions="cache")
        assert StreamingCache(config, positions="auto").turns_from is None
    model = sparse_hf.sparsify(dense_model(LLAMA), SPARSE)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="were changed to angles that change with .* make the model anew"):
        in_pieces(model, text(), StreamingCache(model.config, positions="cache"))


@pytest.mark.compiles
@pytest.mark.parametrize("kind", CHANGING)
def test_angles_that_change_are_not_compiled(kind):
    ids, (_, sparse) = text(1), changing(kind)
    given = named_cache(sparse, StreamingCache(sparse.config, positions="cache"))
    assert (
        not StreamingCache(sparse.config, positions="cache").is_compileable
        and StreamingCache(sparse.config).is_compileable
    )
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="of short texts, .*; run without torch.compile"):
        torch.compile(sparse, backend="eager")(ids, **given)
