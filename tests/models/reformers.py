"""Random Reformers, batches for their heads, and runs of the stock class that can be compared with ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import lcm

import torch
import transformers
from torch import Tensor
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

import sparse_hf
from sparse_hf.models.reformer import attention as reformer_attention

VOCABULARY = 97
# what a head's name ends with -> the labels of its loss
LABELS = {
    "ModelWithLMHead": "token",
    "ForMaskedLM": "token",
    "ForSequenceClassification": "row",
    "ForQuestionAnswering": "span",
    "Model": None,
}
HEADS = [sparse_hf.dense_class(c).__name__ for c in sparse_hf.FAMILIES["reformer"].classes]
LAYERS = (["lsh"], ["local"], ["local", "lsh"], ["lsh", "local", "lsh"], ["lsh", "lsh"])


@dataclass(frozen=True)
class Case:
    """One draw: a head, its configuration, a length and padding."""

    head: str
    values: dict
    length: int
    side: str
    seed: int


def draw(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    # heads and numbers of rounds walk through their lists, so that each is met
    head, rounds = HEADS[seed % len(HEADS)], 1 + seed // len(HEADS) % 4
    decoder = {"ReformerModelWithLMHead": True, "ReformerForMaskedLM": False}.get(head, pick((True, False)))
    after = 0 if decoder else pick((0, 1))
    values = {
        "attn_layers": pick(LAYERS), "is_decoder": decoder, "num_hashes": rounds, "hash_seed": seed,
        "num_buckets": pick((None, 8, 32, [4, 8], [2, 4, 4])), "local_attn_chunk_length": pick((4, 8, 12)),
        "lsh_attn_chunk_length": pick((4, 8, 12)), "local_num_chunks_before": pick((0, 1, 1, 2)),
        "local_num_chunks_after": after, "lsh_num_chunks_before": pick((0, 1, 1, 2)), "lsh_num_chunks_after": after,
        "axial_pos_embds": pick((True, False)),
    }  # fmt: skip
    side, length = pick(("none", "right", "holes")), pick(range(5, 140))
    if head == "ReformerForQuestionAnswering":
        # its softmax runs over padding too, of which Transformers would make more
        side, length = "none", lcm(values["local_attn_chunk_length"], values["lsh_attn_chunk_length"]) * pick((1, 3, 5))
    return Case(head, values, length, side, seed)


def stock_model(head: str, seed: int = 0, **changes):
    """A model of Transformers whose attention is far from uniform."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8,
        "feed_forward_size": 48, "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "max_position_embeddings": 256,
        "axial_pos_shape": [8, 32], "axial_pos_embds_dim": [12, 20], "num_buckets": 8, "num_hashes": 2, "hash_seed": 5,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "is_decoder": head == "ReformerModelWithLMHead",
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3, "problem_type": "single_label_classification",
    }  # fmt: skip
    return getattr(transformers, head)(transformers.ReformerConfig(**{**values, **changes})).eval()


def inputs(head: str, length: int, side: str = "right", seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    """A batch with labels on real tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    real = torch.ones(batch, length, dtype=torch.long)
    cut = int(torch.randint(1, length, (), generator=generator))
    if side == "right":
        real[0, length - cut :] = 0
    elif side == "left":
        real[0, :cut] = 0
    elif side == "holes":
        real[:, 1:] = (torch.rand(batch, length - 1, generator=generator) < 0.8).long()
    given = {"input_ids": ids * real} | ({} if side == "none" else {"attention_mask": real})
    kind = next(kind for end, kind in LABELS.items() if head.endswith(end))
    if kind == "token":
        # nor on what a decoder would foretell from padding
        unlabelled = (real == 0) | (real.roll(1, 1) == 0)
        given["labels"] = torch.randint(0, VOCABULARY, ids.shape, generator=generator).masked_fill(unlabelled, -100)
    elif kind == "row":
        given["labels"] = torch.randint(0, 2, (batch,), generator=generator)
    elif kind == "span":
        start, end = torch.randint(0, length, (2, batch), generator=generator)
        given |= {"start_positions": start, "end_positions": end}
    return given


def answers(model, batch: dict, **extra) -> dict[str, Tensor]:
    """States and logits of real tokens, the loss, and the gradients of every parameter, without the states of layers."""
    outputs = model(**batch, **extra, output_hidden_states=True)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    found = {}
    for name, value in outputs.items():
        for i, state in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
            if isinstance(state, Tensor):
                found[f"{name} {i}"] = (
                    state[:, : real.shape[1]][real] if state.shape[:2].numel() >= real.numel() else state
                )
    loss = _loss(model(**batch, **extra), real)
    model.zero_grad()
    loss.backward()
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {name: value.detach().clone() for name, value in found.items()}
    model.zero_grad()
    return found


def _loss(outputs, real: Tensor) -> Tensor:
    if outputs.get("loss") is not None:
        return outputs.loss
    weights = torch.linspace(-1, 1, outputs[0].shape[-1], dtype=outputs[0].dtype)
    return (outputs[0][:, : real.shape[1]][real] * weights).sum()


def stock_answers(stock, batch: dict) -> dict[str, Tensor]:
    """`answers` of Transformers' class, which has gradients in training only, and there takes full chunks only."""
    stock = stock.train()
    # its axial positions need not fill their table where they do not know that it is training
    stock.get_submodule("reformer" if hasattr(stock, "reformer") else "").embeddings.position_embeddings.eval()
    config, length = stock.config, batch["input_ids"].shape[1]
    sizes = {"local": config.local_attn_chunk_length, "lsh": config.lsh_attn_chunk_length}
    sizes = [sizes[kind] for kind in set(config.attn_layers)]
    more = -length % lcm(*sizes) if length > min(sizes) else 0
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    if more:
        padded = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {**batch, "attention_mask": real}
        batch = {
            k: torch.nn.functional.pad(v, (0, more), value=padded[k]) if v.shape[:2] == real.shape else v
            for k, v in batch.items()
        }
    return answers(stock, batch)


class Hashes:
    """Has all runs hash alike: a direction that wins by a rounding is another one in another precision.

    The first run, of the stock class in float64, is recorded. Later ones are given its buckets; those that ours found by
    themselves must be the same, but for a token in a thousand.
    """

    def __init__(self, monkeypatch):
        self.recorded, self.turn, self.is_padded = None, 0, False
        self.stock_hash, self.our_hash = LSHSelfAttention._hash_vectors, reformer_attention.hash_vectors
        plain = torch.randn

        def randn(*shape, dtype=None, **rest):
            # the numbers of float32 in float64 too
            drawn = plain(*shape, dtype=torch.float32 if dtype == torch.float64 else dtype, **rest)
            return drawn if dtype is None else drawn.to(dtype)

        monkeypatch.setattr(torch, "randn", randn)
        monkeypatch.setattr(LSHSelfAttention, "_hash_vectors", lambda *given, **more: self._stock(*given, **more))
        monkeypatch.setattr(reformer_attention, "hash_vectors", self._ours)

    def run(self, function, *given):
        self.turn, first = 0, self.recorded is None
        self.found = []
        found = function(*given)
        if first:
            self.recorded = self.found
        return found

    def _stock(self, module, vectors, num_hashes, attention_mask, *rest, **more):
        found = self.stock_hash(module, vectors, num_hashes, attention_mask, *rest, **more)
        self.found.append(found)
        self.is_padded = attention_mask is not None and not attention_mask.all()
        self.turn += 1
        return found if self.recorded is None else self.recorded[self.turn - 1]

    def _ours(self, vectors, rotations, buckets):
        found = self.our_hash(vectors, rotations, buckets)
        wanted = self.recorded[self.turn].unflatten(-1, (found.shape[2], -1))[..., : found.shape[3]]
        self.turn += 1
        number = buckets if isinstance(buckets, int) else torch.tensor(buckets).prod()
        # rounds are told apart by an offset, of one bucket more if there is padding, which has that bucket
        offset = torch.arange(found.shape[2])[:, None]
        wanted = wanted - offset * (number + self.is_padded)
        real = wanted < number
        assert (found != wanted)[real].float().mean() < 1e-3
        return torch.where(real, wanted, found)


def exact(stock):
    return copy.deepcopy(stock).double()


def replica(model: torch.nn.Module) -> torch.nn.Module:
    """What `nn.DataParallel` would run on another device: the modules anew, with copies in place of parameters."""
    copies = {p: p.clone() for p in model.parameters()}
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in made.items():
        for name, child in module.named_children():
            setattr(other, name, made[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                other._parameters[name] = None
            else:
                setattr(other, name, copies[parameter])
    return made[model]
