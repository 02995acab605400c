"""Random Longformers and LEDs, batches for their heads, and the specification of their attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_hf
from sparse_hf.attention.backend import Backend
from sparse_hf.attention.strides import like
from tests import oracle

VOCABULARY, EOS, SEPARATOR, TARGET = 97, 2, 3, 13
# what a head's name ends with -> the labels of its loss
LABELS = {
    "Model": (),
    "ForMaskedLM": ("token",),
    "ForTokenClassification": ("token",),
    "ForSequenceClassification": ("row",),
    "ForMultipleChoice": ("row",),
    "ForQuestionAnswering": ("span",),
    "ForConditionalGeneration": ("target",),
}
HEADS = {
    family: sorted(sparse_hf.dense_class(c).__name__ for c in sparse_hf.FAMILIES[family].classes)
    for family in ("longformer", "led")
}
SIDES = ("none", "right", "left", "holes")
MARKS = ("default", "none", "one", "few", "many", "all", "a whole row")


@dataclass(frozen=True)
class Case:
    """One draw: a head, its windows, a length, padding and marks."""

    head: str
    windows: tuple[int, ...]
    length: int
    batch: int
    side: str
    marks: str
    seed: int


def draw(family: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    # Transformers pads to the widest window, of which the others must be parts, and fails at a width of 2
    unit = pick((4, 6, 10))
    windows = tuple(unit * pick((1, 2, 4)) for _ in range(2))
    multiple = pick((True, False))
    length = max(windows) * pick((1, 2, 3, 5)) if multiple else pick(range(5, 140))
    # heads walk through the list, so that each is met
    head = HEADS[family][seed % len(HEADS[family])]
    return Case(head, windows, max(length, 5), pick((1, 2, 3)), pick(SIDES), pick(MARKS), seed)


def stock_model(head: str, windows=(16, 8), seed: int = 0, **changes):
    """A model of Transformers whose attention is far from uniform."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": EOS}
    if head.startswith("LED"):
        config = transformers.LEDConfig(
            **sizes, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_encoder_position_embeddings=256,
            max_decoder_position_embeddings=64, attention_window=list(windows), dropout=0.0, forced_eos_token_id=None,
            **changes,
        )  # fmt: skip
    else:
        dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 258}
        config = transformers.LongformerConfig(
            **sizes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            sep_token_id=SEPARATOR, attention_window=list(windows), **{**dropped, **changes},
        )  # fmt: skip
    model = getattr(transformers, head)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(12 if "query" in name or "key" in name else 3)
    return model


def padding(side: str, batch: int, length: int, generator) -> Tensor | None:
    if side == "none":
        return None
    real = torch.ones(batch, length, dtype=torch.long)
    cut = int(torch.randint(1, length // 2 + 1, (), generator=generator))
    if side == "holes":
        real[:, 1:] = (torch.rand(batch, length - 1, generator=generator) < 0.8).long()
    elif side == "left":
        real[0, :cut] = 0
    else:
        real[0, length - cut :] = 0
    return real


def marks_of(kind: str, batch: int, length: int, generator) -> Tensor | None:
    if kind == "default":
        return None
    share = {"none": 0, "one": 0, "few": 0.05, "many": 0.4, "all": 1, "a whole row": 0.05}[kind]
    marks = torch.rand(batch, length, generator=generator) < share
    if kind == "one":
        marks[0, int(torch.randint(length, (), generator=generator))] = True
    if kind == "a whole row":
        marks[-1] = True
    return marks.long()


def inputs(head: str, length: int, batch: int = 2, side: str = "right", marks: str = "few", seed: int = 0) -> dict:
    """A batch with labels. Rows of heads that mark a question by itself have three separators, as its tokenizer makes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    real = padding(side, batch, length, generator)
    ids = torch.randint(SEPARATOR + 1, VOCABULARY, (batch, length), generator=generator)
    ids = ids if real is None else torch.where(real.bool(), ids, 1)
    if head.endswith(("ForQuestionAnswering", "ForMultipleChoice")) and not head.startswith("LED"):
        for row in ids:
            row[torch.randperm(length - 1, generator=generator)[:3] + 1] = SEPARATOR
    given = {
        "input_ids": ids,
        "attention_mask": real,
        "global_attention_mask": marks_of(marks, batch, length, generator),
    }
    if head.startswith("LED") and "target" not in labels_of(head):
        given["decoder_input_ids"] = torch.randint(4, VOCABULARY, (batch, TARGET), generator=generator)
    for kind in labels_of(head):
        given |= _labels(kind, batch, length, generator)
    given = {name: value for name, value in given.items() if value is not None}
    if head.endswith("ForMultipleChoice"):
        given = {k: v if v.ndim == 1 else v[:, None].expand(-1, 2, -1).contiguous() for k, v in given.items()}
    return given


def labels_of(head: str) -> tuple[str, ...]:
    return next(LABELS[end] for end in sorted(LABELS, key=len, reverse=True) if head.endswith(end))


def _labels(kind: str, batch: int, length: int, generator) -> dict[str, Tensor]:
    if kind == "span":
        # LED looks for the span in the target
        start, end = torch.randint(0, min(length, TARGET), (2, batch), generator=generator)
        return {"start_positions": start, "end_positions": end}
    shape = {"token": (batch, length), "row": (batch,), "target": (batch, TARGET)}[kind]
    top = VOCABULARY if kind == "target" else 2
    return {"labels": torch.randint(0, top, shape, generator=generator)}


def answers(model, batch: dict) -> dict[str, Tensor]:
    """What a user reads of real tokens, and the gradients of every parameter."""
    outputs = model(**batch, output_hidden_states=True)
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool().flatten(0, -2)
    found = {}
    for name, value in outputs.items():
        states = value if isinstance(value, tuple) else (value,)
        for i, state in enumerate(states):
            if isinstance(state, Tensor):
                of_text = state.shape[:2] == real.shape and not name.startswith("decoder")
                found[f"{name} {i}"] = state[real] if of_text else state
    loss = outputs.get("loss")
    if loss is None:
        weights = torch.linspace(-1, 1, outputs[0].shape[-1], dtype=outputs[0].dtype)
        kept = found["last_hidden_state 0"]
        loss = (kept * weights).sum() + (outputs.pooler_output * weights).sum() if "pooler_output" in outputs else (
            kept * weights).sum()  # fmt: skip
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found |= {f"gradient of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}
    return {name: value.detach() for name, value in found.items()}


def specification(self, hidden_states, attention_mask=None, output_attentions=False, **_):
    """The forward of the self-attention, from its definition: one mask of pairs, two sets of projections."""
    tokens, length = attention_mask, hidden_states.shape[1]
    pattern = self.config.layer_pattern(self.layer_id, stack=self.stack)
    mask = oracle.dense_mask(pattern, length, length, tokens.real, marks=tokens.marks)

    def through(ending: str) -> Tensor:
        q, k, v = (
            getattr(self, f"{name}{ending}")(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        return oracle.attention(q, k, v, mask)[0]

    out = through("")
    if tokens.marks is not None and ("marked()" in pattern or "marked_queries()" in pattern):
        out = torch.where(tokens.marks[:, None, :, None], through("_global"), out)
    return (out.transpose(1, 2).flatten(2),)


class Operations(TorchDispatchMode):
    """Counts the operations of torch that give new numbers, forward and backward; views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in function._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return function(*args, **(kwargs or {}))


class Free(Backend):
    """Attention that costs nothing."""

    name = "free"
    writes_into = True

    def forward(self, call):
        return like(call.q), call.q[..., 0]

    def backward(self, call, given):
        return *(given.into or map(like, (call.q, call.k, call.v))), None
