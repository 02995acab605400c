"""Tiny random models of each family, and inputs for each head: one line a family."""

from __future__ import annotations

import dataclasses
import inspect

import torch
import transformers

import sparse_hf
from sparse_hf.models.hf.cache import CACHE_NAMES
from tests import oracle

VOCABULARY, LENGTH, TARGET, BATCH = 97, 150, 90, 2
EOS = 2
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 1,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**GROUPED, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
SIDES = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": 1, "decoder_start_token_id": EOS, "forced_eos_token_id": None,
}  # fmt: skip
# dense model type -> its tiny configuration; windows of the family's own are shorter than the texts
TINY = {
    "albert": {**COMMON, "embedding_size": 16},
    "bart": SIDES,
    "bert": COMMON,
    # stock block-sparse attention takes no mask of pairs, and has tests of its own
    "big_bird": {**COMMON, "attention_type": "original_full"},
    "bigbird_pegasus": {**SIDES, "attention_type": "original_full"},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": EOS,
              "bos_token_id": 1},
    "camembert": {**COMMON, "max_position_embeddings": 514},
    "cohere2": {**GROUPED, "sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]},
    "deberta": {**COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 40},
    "deberta-v2": {**COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    "electra": {**COMMON, "embedding_size": 16},
    # a head for keys that all queries share
    "falcon": {**COMMON, "ffn_hidden_size": 64},
    "gemma2": {**GROUPED, "sliding_window": 30, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, "sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "pad_token_id": 0,
             "eos_token_id": EOS, "bos_token_id": 1, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": COMMON,
    "granite": {**GROUPED, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0,
                "logits_scaling": 2.0},
    "llama": GROUPED,
    "mbart": SIDES,
    "mistral": {**GROUPED, "sliding_window": 40},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "modernbert": {**COMMON, "local_attention": 32, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": {**COMMON, "max_position_embeddings": 514, "pad_token_id": 1, "bos_token_id": 0},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "pad_token_id": 0,
            "eos_token_id": EOS, "bos_token_id": 1},
    "olmo2": GROUPED,
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "pegasus": SIDES,
    "phi3": {**COMMON, "num_key_value_heads": 2, "sliding_window": 40},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
    "qwen3": {**GROUPED, "use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1},
    "qwen3_moe": MOE,
    "roberta": {**COMMON, "max_position_embeddings": 514},
    "smollm3": GROUPED,
    "t5": {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
           "eos_token_id": EOS, "decoder_start_token_id": 0, "relative_attention_max_distance": 64},
    "xlm-roberta": {**COMMON, "max_position_embeddings": 514},
}  # fmt: skip
# their softmax is in single precision, where the least number of double precision leaves rows of padding without weights
SINGLE = ("bloom", "mpt")
TOKEN = {"labels": (BATCH, LENGTH)}
SEQUENCE = {"labels": (BATCH,)}
SPAN = {"start_positions": (BATCH,), "end_positions": (BATCH,)}
# what a head's name ends with -> the labels that its loss takes, with their shapes
LABELS = {
    "EncoderModel": {},
    "LMHeadModel": TOKEN,
    "Model": {},
    "ForMaskedLM": TOKEN,
    "ForCausalLM": TOKEN,
    "ForConditionalGeneration": {"labels": (BATCH, TARGET)},
    "ForTokenClassification": TOKEN,
    "ForSequenceClassification": SEQUENCE,
    "ForMultipleChoice": SEQUENCE,
    "ForNextSentencePrediction": SEQUENCE,
    "ForQuestionAnswering": SPAN,
    "ElectraForPreTraining": TOKEN,
    "AlbertForPreTraining": {**TOKEN, "sentence_order_label": (BATCH,)},
    "BigBirdForPreTraining": {**TOKEN, "next_sentence_label": (BATCH,)},
    "BertForPreTraining": {**TOKEN, "next_sentence_label": (BATCH,)},
}
# dense class name -> dense model type
HEADS = {sparse_hf.dense_class(c).__name__: name for name in sorted(TINY) for c in sparse_hf.FAMILIES[name].classes}


def labels_of(head: str) -> dict[str, tuple[int, ...]]:
    return next(LABELS[end] for end in sorted(LABELS, key=len, reverse=True) if head.endswith(end))


def family_and_kind(head: str, **others) -> tuple:
    """What of a head counts in a cross: its family, and what it is for, and whatever else a case has."""
    return (
        HEADS[head],
        next(end for end in sorted(LABELS, key=len, reverse=True) if head.endswith(end)),
        *others.values(),
    )


def one_head(*, generating: bool = False, encoder: bool = False) -> list[str]:
    """A head of each family: the language model if there is one."""
    chosen = {}
    for ending in ("Model", "LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"):
        chosen |= {family: head for head, family in HEADS.items() if head.endswith(ending)}
    can = {head: sparse_class(head).can_generate() and not _is_encoder(head) for head in chosen.values()}
    return [head for head in chosen.values() if (not generating or can[head]) and (not encoder or _is_encoder(head))]


def sparse_class(head: str) -> type:
    return getattr(sparse_hf, f"Sparse{head}")


def _is_encoder(head: str) -> bool:
    """Does it belong to a family that is trained by masking?"""
    classes = sparse_hf.FAMILIES[HEADS[head]].classes
    return any(c.__name__.endswith("ForMaskedLM") for c in classes) and not has_two_stacks(head)


def is_decoder(head: str) -> bool:
    """Does every token see its past only?"""
    return head.endswith(("ForCausalLM", "LMHeadModel")) or not (_is_encoder(head) or has_two_stacks(head))


def has_two_stacks(head: str) -> bool:
    return "encoder" in sparse_class(head).config_class().stacks


def has_target(head: str) -> bool:
    """Does it read a target text too?"""
    return has_two_stacks(head) and not head.endswith(("ForCausalLM", "EncoderModel", "T5ForTokenClassification"))


def dense_config(head: str, **changes):
    config_class = sparse_class(head).config_class.__bases__[1]
    config = config_class(**{**TINY[HEADS[head]], **changes})
    for field in dataclasses.fields(config):
        if "drop" in field.name and isinstance(getattr(config, field.name), float | None) and field.name not in changes:
            setattr(config, field.name, 0.0)
    if _is_encoder(head) and head.endswith(("ForCausalLM", "LMHeadModel")):
        config.is_decoder = True
    return config


def dense_model(head: str, **changes):
    torch.manual_seed(0)
    config = dense_config(head, **changes)
    if HEADS[head] == "gemma2":
        # older versions take "sdpa" by default, which leaves the soft cap out
        config._attn_implementation = "eager"
    model = getattr(transformers, head)(config).eval()
    for parameter in model.parameters():
        # initial weights are so small that attention is nearly uniform, and a wrong pattern would hardly show
        if parameter.ndim == 2:
            parameter.data.mul_(3)
    return model


def named_cache(model, cache) -> dict:
    """A cache as `forward` and `generate` take it, whose name for it has changed."""
    return {next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters): cache}


def pattern_layers(head: str) -> dict:
    """What `sparsify` is told besides the pattern: a decoder has no marks of its own."""
    return {"layers": {"decoder": "window(20, 20) | first(3)"}} if has_two_stacks(head) else {}


def sides(head: str) -> list[str]:
    """Where a head may be padded and still be compared: one that pools the first token must not pool padding."""
    pools = labels_of(head).get("labels") == (BATCH,) or "PreTraining" in head
    no_left = (pools and _is_encoder(head)) or has_two_stacks(head) or HEADS[head] in SINGLE
    return ["none", "right"] if no_left else ["none", "right", "left"]


PADDED = [(head, side) for head in HEADS for side in sides(head)]


def _real(length: int, side: str) -> torch.Tensor:
    real = torch.ones(BATCH, length, dtype=torch.long)
    if side != "none":
        real[0, slice(37) if side == "left" else slice(length - 37, None)] = 0
    return real


def inputs(head: str, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch, padded on a side; the positions are those of the tokens, so that padding on the left shifts nothing.

    Padding has no labels. Spans are labelled without padding only: their softmax runs over padding too, whose states are
    0 here (as in Transformers' own FlashAttention path) and something else in its dense one.
    """
    generator = torch.Generator().manual_seed(3)
    real = _real(LENGTH, side)
    ids = torch.randint(EOS + 1, VOCABULARY, (BATCH, LENGTH), generator=generator) * real
    if has_two_stacks(head):
        # heads that classify read the state of the last token of the text
        ids[torch.arange(BATCH), real.sum(1) - 1] = EOS
    batch = {"input_ids": ids, "attention_mask": real}
    # RoBERTa counts positions by itself, from 2; DistilBERT does not flatten those of multiple choice
    takes = "position_ids" in sparse_class(head).forward.__signature__.parameters
    if takes and "oberta" not in head.lower() and head != "DistilBertForMultipleChoice":
        batch["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    target = real
    if has_target(head):
        target = _real(TARGET, side)
        decoder_ids = torch.randint(EOS + 1, VOCABULARY, (BATCH, TARGET), generator=generator) * target
        if not labels_of(head) or "labels" not in labels_of(head) or labels_of(head)["labels"] == (BATCH, TARGET):
            batch |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": target}
    for name, shape in labels_of(head).items():
        label = torch.randint(0, 2, shape, generator=generator)
        if side == "none" or not name.endswith("positions"):
            # no label on padding, nor on the first token after it, which a decoder would predict from padding
            padding = target if len(shape) == 2 and shape[1] == target.shape[1] else real
            unlabelled = (padding == 0) | (padding.roll(1, 1) == 0)
            batch[name] = label.masked_fill(unlabelled, -100) if len(shape) == 2 else label
    if head.endswith("ForMultipleChoice"):
        batch = {k: v if v.ndim == 1 else v[:, None].expand(-1, 2, -1).contiguous() for k, v in batch.items()}
    return batch


def additive(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min).to(dtype)


def explicit_mask(pattern: str, length: int, real: torch.Tensor, marks, is_causal: bool, own=None) -> torch.Tensor:
    """The pairs of a pattern, cut to the past and to the family's own window, `[B or 1, 1, length, length]` bool."""
    mask = oracle.dense_mask(pattern, length, length, real.bool(), marks=marks)
    if is_causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
    if own is not None:
        distance = torch.arange(length) - torch.arange(length)[:, None]
        mask = mask & (distance >= -own.left) & (distance <= own.right)
    return mask
