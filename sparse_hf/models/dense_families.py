"""The table of families: one entry a family.

An entry is all that it takes where a family is on Transformers' attention interface and its parent's configuration says the
rest. Its classes (`SparseLlamaConfig`, `SparseLlamaForCausalLM`, one for each head that an Auto class knows) are attributes of this
module, made when one of them is first asked for. Families that need code have a module each, listed below. Nothing here
imports torch or Transformers.

To add a family: an entry here, and its tiny configuration in `tests/models/families.py`.
"""

from __future__ import annotations

from typing import Any

from .. import registry
from .hf.dense_family import DenseFamily, OtherFamily
from .hf.positions import ROTARY, Positions
from .indexed.entry import IndexedFamily, is_there
from .names import IMPLEMENTATIONS, STREAMING

# a table of positions in the embeddings, as BERT has it
EMBEDDED = Positions(
    "learned", ("embeddings.position_embeddings.weight",), ("embeddings.position_ids", "embeddings.token_type_ids")
)
# positions begin behind the padding id, and `max_position_embeddings` counts all rows (514 for 512 tokens)
BEHIND_PADDING_ID = Positions(
    EMBEDDED.scheme, EMBEDDED.tables, EMBEDDED.buffers, offset=2, counted=True, skips_padding=True
)
# two more rows than `max_position_embeddings` says
TWO_MORE_ROWS = Positions("learned", ("embed_positions.weight",), offset=2)
OPT_TABLE = Positions("learned", ("embed_positions.weight",), offset=2, skips_padding=True)
GPT2_TABLE = Positions("learned", ("wpe.weight",))
SINUSOIDAL = Positions("sinusoidal", ("embed_positions.weight",))


def _dense(prefix: str, dense_type: str, positions: Positions, source: str, **more: str) -> DenseFamily:
    return DenseFamily(prefix=prefix, dense_type=dense_type, positions=positions, source=source, **more)


def _other(module: str, prefix: str, dense_type: str, sparse_type: str = "") -> OtherFamily:
    return OtherFamily(f"{__package__}.{module}", prefix, dense_type, sparse_type or f"sparse_{dense_type}")


def _of_latents(prefix: str) -> dict[str, Any]:
    """What a family says whose heads share latents."""
    return {"parts": ((f"{prefix}Attention", "latent.LatentAttention"),)}


def _indexed(prefix: str, dense_type: str, indexer: str, source: str, **more: Any) -> IndexedFamily:
    return IndexedFamily(prefix=prefix, dense_type=dense_type, positions=ROTARY, indexer=indexer, source=source, **more)


def _of_text(prefix: str, dense_type: str, indexer: str, source: str, **more: Any) -> IndexedFamily:
    """A family whose models of images or sounds have one of text inside, which is what this is of."""
    more = {"config": f"{prefix}TextConfig", "indexer_class": f"{prefix}TextIndexer"} | more
    return _indexed(prefix, f"{dense_type}_text", indexer, source, **more)


DENSE_FAMILIES = (
    _dense("Bart", "bart", TWO_MORE_ROWS, "arXiv:1910.13461", encoder="BartEncoder"),
    _dense("Bert", "bert", EMBEDDED, "arXiv:1810.04805", joins="BertSelfAttention"),
    _dense("Camembert", "camembert", BEHIND_PADDING_ID, "arXiv:1911.03894", joins="CamembertSelfAttention"),
    _dense("Cohere2", "cohere2", ROTARY, "arXiv:2504.00698"),
    _dense("Electra", "electra", EMBEDDED, "arXiv:2003.10555", joins="ElectraSelfAttention"),
    _dense("GPT2", "gpt2", GPT2_TABLE, "Radford et al., 2019, Language Models are Unsupervised Multitask Learners"),
    _dense("GPTNeoX", "gpt_neox", ROTARY, "arXiv:2204.06745"),
    _dense("Gemma2", "gemma2", ROTARY, "arXiv:2408.00118"),
    # of text alone
    _dense("Gemma3", "gemma3_text", ROTARY, "arXiv:2503.19786", config="Gemma3TextConfig"),
    _dense("Granite", "granite", ROTARY, "IBM, 2024, Granite 3.0 Language Models"),
    _dense("Llama", "llama", ROTARY, "arXiv:2302.13971, arXiv:2407.21783"),
    _dense("MBart", "mbart", TWO_MORE_ROWS, "arXiv:2001.08210", encoder="MBartEncoder"),
    _dense("Mistral", "mistral", ROTARY, "arXiv:2310.06825"),
    _dense("Mixtral", "mixtral", ROTARY, "arXiv:2401.04088"),
    _dense("Olmo2", "olmo2", ROTARY, "arXiv:2501.00656"),
    _dense("OPT", "opt", OPT_TABLE, "arXiv:2205.01068"),
    _dense("Pegasus", "pegasus", SINUSOIDAL, "arXiv:1912.08777", encoder="PegasusEncoder"),
    _dense("Phi3", "phi3", ROTARY, "arXiv:2404.14219"),
    _dense("Qwen2", "qwen2", ROTARY, "arXiv:2407.10671"),
    _dense("Qwen3", "qwen3", ROTARY, "arXiv:2505.09388"),
    _dense("Qwen3Moe", "qwen3_moe", ROTARY, "arXiv:2505.09388"),
    _dense("Roberta", "roberta", BEHIND_PADDING_ID, "arXiv:1907.11692", joins="RobertaSelfAttention"),
    _dense("SmolLM3", "smollm3", ROTARY, "Hugging Face, 2025, SmolLM3"),
    _dense("XLMRoberta", "xlm-roberta", BEHIND_PADDING_ID, "arXiv:1911.02116", joins="XLMRobertaSelfAttention"),
)
OTHER_FAMILIES = (
    _other("albert", "Albert", "albert"),
    _other("bigbird.modeling", "BigBird", "big_bird"),
    _other("bigbird.pegasus", "BigBirdPegasus", "bigbird_pegasus", "sparse_big_bird_pegasus"),
    _other("bloom", "Bloom", "bloom"),
    _other("deberta", "Deberta", "deberta"),
    _other("deberta", "DebertaV2", "deberta-v2", "sparse_deberta_v2"),
    _other("distilbert", "DistilBert", "distilbert"),
    _other("falcon", "Falcon", "falcon"),
    _other("longformer.led", "LED", "led"),
    _other("longformer.modeling", "Longformer", "longformer"),
    _other("modernbert", "ModernBert", "modernbert"),
    _other("mpnet", "MPNet", "mpnet"),
    _other("mpt", "Mpt", "mpt"),
    _other("perceiver.modeling", "Perceiver", "perceiver"),
    _other("reformer.modeling", "Reformer", "reformer"),
    _other("t5", "T5", "t5"),
)
# their layers choose keys by content; older versions of Transformers have some of them
INDEXED_FAMILIES = tuple(
    entry
    for entry in (
        _indexed("AXK2", "axk2", "dsa.DsaIndexer", "SK Telecom, 2026, A.X-K2"),
        _indexed("DeepseekV32", "deepseek_v32", "dsa.DsaIndexer", "arXiv:2512.02556", **_of_latents("DeepseekV32")),
        _indexed(
            "DeepseekV4",
            "deepseek_v4",
            "entries.EntryIndexer",
            "DeepSeek-AI, 2026, DeepSeek-V4",
            takes_patterns=False,
            packs=False,
            own_caches=True,
            parts=(
                ("DeepseekV4CSACompressor", "entries.ChosenEntries"),
                ("DeepseekV4HCACompressor", "entries.AllEntries"),
                ("DeepseekV4Attention", "entries.WindowAndEntries"),
            ),
        ),  # fmt: skip
        _of_text("Dots3Note", "dots3_note", "dsa.InterleavedIndexer", "rednote-hilab, 2026, dots3-note"),
        _of_text(
            "Glm5Next",
            "glm5_next",
            "pools.LearnedPoolIndexer",
            "Z.ai, 2026, GLM-5.3-Flash",
            takes_patterns=False,
            packs=False,
            parts=(("Glm5NextTextAttention", "pools.ChoiceAsMask"),),
        ),  # fmt: skip
        _indexed("GlmMoeDsa", "glm_moe_dsa", "dsa.InterleavedIndexer", "arXiv:2602.15763", **_of_latents("GlmMoeDsa")),
        _indexed("HYV4", "hy_v4", "dsa.TrailingIndexer", "Tencent, 2026, Hy4"),
        _of_text("HYV4VL", "hy_v4_vl", "dsa.TrailingIndexer", "Tencent, 2026, Hy4", indexer_class="HYV4VLIndexer"),
        _of_text(
            "MiniMaxM3VL",
            "minimax_m3_vl",
            "blocks.BlockIndexer",
            "MiniMax, 2026, MiniMax-M3",
            packs=False,
            indexer_class="MiniMaxM3VLIndexer",
            parts=(("MiniMaxM3VLAttention", "blocks.BlockAttention"),),
        ),  # fmt: skip
        _of_text("MistralLarge4", "mistral_large4", "dsa.ScaledIndexer", "Mistral AI, 2026, Mistral Large 4"),
        _of_text(
            "Qwen4Exp",
            "qwen4_exp",
            "pools.MeanPoolIndexer",
            "Qwen, 2026, Qwen4-Exp",
            takes_patterns=False,
            packs=False,
            indexer_class="Qwen4ExpTextQSAIndexer",
        ),  # fmt: skip
    )
    if is_there(entry.dense_type.removesuffix("_text"))
)

registry.enter((*DENSE_FAMILIES, *OTHER_FAMILIES, *INDEXED_FAMILIES))
registry.enter_finder(f"{__package__}.derived.entry")
registry.enter_attention(IMPLEMENTATIONS, f"{__package__}.hf.attention_interface")
registry.enter_cache(STREAMING)


def __getattr__(name: str):
    entry = registry.entry_of_class(name)
    if isinstance(entry, DenseFamily):
        registry.derive(entry)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
