"""Long texts: logits and feed-forward layers in pieces change neither loss nor gradients."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

import sparse_hf
from sparse_hf.train import Distillation, HealingTrainer, long_text, lora_config
from sparse_hf.train.deferred_logits import DeferredLogits
from tests.models.families import HEADS, LENGTH, VOCABULARY, dense_model, inputs, is_decoder, labels_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
# pieces that leave a rest, and so many that norms go in pieces too
SMALL = {"logits": 37, "feed_forward": 17}
# MLM with bias, two stacks, tied and not, soft caps and scales
CHOSEN = [
    "LlamaForCausalLM", "Gemma2ForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM",
    "ModernBertForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
]  # fmt: skip


def answers_words(head: str) -> bool:
    return head.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration"))


LANGUAGE = [head for head in HEADS if answers_words(head)]


def model_of(head: str, dtype=torch.float64, **changes):
    return dense_model(head, **changes).to(dtype).train()


def batch_of(head: str, side: str = "right") -> dict[str, torch.Tensor]:
    # a soft cap of scores makes NaN of padding in the family's own attention
    batch = inputs(head, "none" if head.startswith("Gemma2") else side)
    if is_decoder(head):
        batch["use_cache"] = False
    return batch


def step(model, batch, **more):
    """Loss and gradients."""
    model.zero_grad()
    output = model(**batch, **more)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found, wanted) -> float:
    """Of all gradients together, relative to their size."""
    assert found.keys() == wanted.keys()
    square = sum((found[n].double() - wanted[n].double()).square().sum() for n in wanted)
    return float((square / sum(g.double().square().sum() for g in wanted.values())).sqrt())


def is_checkpointed(model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def begin(model, **options):
    """`long_text` in small pieces, with layers checkpointed where they can be."""
    return long_text(model, **{**SMALL, "checkpoint_layers": model.supports_gradient_checkpointing, **options})


@pytest.mark.parametrize("head", LANGUAGE)
def test_loss_and_gradients_are_those_of_the_model(head):
    # experts are multiplied in float32 at most
    is_moe = head in ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
    model, batch = model_of(head, torch.float32 if is_moe else torch.float64), batch_of(head)
    before, wanted = step(model, batch)
    with begin(model) as handle:
        assert handle.in_pieces
        after, found = step(model, batch)
        assert isinstance(after.logits, DeferredLogits) == (model.get_output_embeddings() is not None)
        assert not isinstance(after.logits, DeferredLogits) or after.logits.made is None
    # decoders compute their loss in float32 whatever the model's dtype
    assert after.loss.dtype == before.loss.dtype
    assert float(after.loss.detach()) == pytest.approx(float(before.loss.detach()), rel=1e-6)
    assert distance(found, wanted) < (1e-5 if is_moe else 1e-6)


@pytest.mark.parametrize("head", CHOSEN)
def test_bfloat16_is_as_close_to_float64_as_it_was(head):
    model, batch = model_of(head), batch_of(head)
    _, exact = step(model, batch)
    model.bfloat16()
    before, theirs = step(model, batch)
    with begin(model):
        after, ours = step(model, batch)
    assert after.loss.dtype == before.loss.dtype
    assert float(after.loss.detach()) == pytest.approx(float(before.loss.detach()), rel=2**-6)
    assert distance(ours, exact) < 1.2 * distance(theirs, exact) + 1e-3


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"])
def test_autocast(head):
    model, batch = model_of(head, torch.float32), batch_of(head)
    _, exact = step(model, batch)
    found = []
    for is_long in (False, True):
        handle = begin(model) if is_long else None
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        model.zero_grad()
        output.loss.backward()
        found.append(
            (output.loss.dtype, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    assert handle is not None and found[0][0] == found[1][0]
    assert distance(found[1][1], exact) < 1.2 * distance(found[0][1], exact) + 1e-3


def test_autocast_of_a_long_text_beside_a_short_one():
    """Weights that autocast cast for pieces, which record no graph, are not those of the short text."""
    model, batch = model_of("LlamaForCausalLM", torch.float32), batch_of("LlamaForCausalLM", "none")
    ids, found = batch["input_ids"], []
    for is_long in (False, True):
        if is_long:
            begin(model, feed_forward=50, checkpoint_layers=False)
        with torch.autocast("cpu", torch.bfloat16):
            long, short = (model(input_ids=some, labels=some, use_cache=False).loss for some in (ids, ids[:1, :20]))
        model.zero_grad()
        (long + short).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert distance(found[1], found[0]) < 0.02


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize(
    "changes", [{"num_items_in_batch": torch.tensor(700)}, {"label_smoothing": 0.1}, {"labels": -100}]
)
def test_what_a_loss_is_told(head, changes, monkeypatch):
    """The number of items of a step, smoothing in the loss itself, and no label at all."""
    model, batch = sparse_hf.sparsify(model_of(head), "window(9, 9) | first(2)").train(), batch_of(head)
    if "labels" in changes:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    if "label_smoothing" in changes:
        stock = F.cross_entropy
        monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: stock(*a, **{**k, "label_smoothing": 0.1}))
    more = {"num_items_in_batch": changes["num_items_in_batch"]} if "num_items_in_batch" in changes else {}
    before, wanted = step(model, batch, **more)
    with begin(model):
        after, found = step(model, batch, **more)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-6, atol=0, equal_nan=True)
    if "labels" in changes:
        assert not any(g.any() for g in found.values())
    else:
        assert distance(found, wanted) < 1e-6


def test_packed_rows():
    model = sparse_hf.sparsify(model_of("LlamaForCausalLM"), "window(9, 0) | first(2)").train()
    batch = batch_of("LlamaForCausalLM", "none")
    batch["position_ids"] = torch.cat([torch.arange(60), torch.arange(LENGTH - 60)]).expand(2, -1)
    batch.pop("attention_mask")
    before, wanted = step(model, batch)
    with begin(model):
        after, found = step(model, batch)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-6, atol=0)
    assert distance(found, wanted) < 1e-6


@pytest.mark.parametrize("whole", [["lm_head"], []])
def test_peft(whole):
    from peft import LoraConfig, get_peft_model

    model = model_of("LlamaForCausalLM", torch.float32)
    chosen = LoraConfig(
        r=4, target_modules=["q_proj", "gate_proj", "down_proj"], modules_to_save=whole, lora_dropout=0.0
    )
    model = get_peft_model(model, chosen).double().train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    batch = batch_of("LlamaForCausalLM")
    before, wanted = step(model, batch)
    with long_text(model, **SMALL) as handle:
        assert any("mlp" in name for name in handle.in_pieces)
        after, found = step(model, batch)
        assert after.logits.made is None
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-6, atol=0)
    assert distance(found, wanted) < 1e-6 and any("lora_A" in name for name in found)


def test_an_output_layer_with_lora_is_refused():
    from peft import get_peft_model

    model = get_peft_model(
        model_of("LlamaForCausalLM"), lora_config(model_of("LlamaForCausalLM"), target_modules=["lm_head"])
    )
    with pytest.raises(
        ValueError, match="lm_head is Linear, not a plain linear layer; call long_text with logits=None"
    ):
        long_text(model)
    assert not is_checkpointed(model)
    assert long_text(model, logits=None).in_pieces


def test_dropout_draws_the_same_again():
    """Gradients are those of the draws that the loss was made with: a change of the loss agrees with them."""
    model = model_of("GPT2LMHeadModel", resid_pdrop=0.3)
    model.config.use_cache = False
    batch = batch_of("GPT2LMHeadModel")
    weight = model.transformer.h[0].mlp.c_fc.weight
    direction = torch.randn_like(weight)
    with begin(model, logits=None):

        def loss(shift: float):
            with torch.no_grad():
                weight.add_(direction, alpha=shift)
            torch.manual_seed(5)
            found = model(**batch, output_hidden_states=True).hidden_states[-1].square().mean()
            with torch.no_grad():
                weight.sub_(direction, alpha=shift)
            return found

        (grad,) = torch.autograd.grad(loss(0.0), weight)
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        torch.testing.assert_close((grad * direction).sum(), slope.detach(), rtol=1e-5, atol=1e-8)


class Shapes(TorchDispatchMode):
    """The largest tensor that holds tokens times a size, for each size."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.tokens = dict.fromkeys(sizes, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeferredLogits):
                for size in {*leaf.shape[-2:]} & {*self.tokens}:
                    self.tokens[size] = max(self.tokens[size], leaf.numel() // size)
        return result


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM", "Gemma2ForCausalLM", "GPT2LMHeadModel"])
def test_no_tensor_of_all_tokens_is_as_wide_as_vocabulary_or_feed_forward(head):
    sizes = {"n_inner": 71} if head.startswith("GPT2") else {"intermediate_size": 71}
    model, batch = model_of(head, **sizes), batch_of(head)
    tokens = batch["labels"].numel()
    with Shapes(VOCABULARY, 71) as stock:
        step(model, batch)
    assert stock.tokens[VOCABULARY] == stock.tokens[71] == tokens
    with begin(model, feed_forward=41), Shapes(VOCABULARY, 71) as seen:
        step(model, batch)
    # weights and their gradients have 32 rows
    assert seen.tokens == {VOCABULARY: SMALL["logits"], 71: 41}


def test_a_checkpointed_layer_does_not_go_through_its_pieces_again():
    """Its recomputation ends before them, since what they are computed from is kept first."""
    model, batch = model_of("LlamaForCausalLM"), batch_of("LlamaForCausalLM")
    calls = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    with begin(model):
        step(model, batch)
    pieces = -(-batch["labels"].numel() // SMALL["feed_forward"])
    assert len(calls) == 2 * pieces


def test_offloaded_checkpoints(monkeypatch):
    model, batch = model_of("LlamaForCausalLM"), batch_of("LlamaForCausalLM")
    before, wanted = step(model, batch)
    kept = []
    stock = torch.autograd.graph.save_on_cpu.__init__

    def spy(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        pack = self.pack_hook
        self.pack_hook = lambda t: (kept.append(tuple(t.shape)), pack(t))[1]

    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", spy)
    with begin(model, offload=True):
        after, found = step(model, batch)
    assert not is_checkpointed(model)
    # the input of each layer, and nothing that is made inside
    assert [shape for shape in kept if 32 in shape] == 2 * [(*batch["labels"].shape, 32)]
    torch.testing.assert_close(after.loss, before.loss)
    assert distance(found, wanted) < 1e-6


def trained(tmp_path, model, **changes):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in range(6):
        ids = torch.randint(3, VOCABULARY, (80,), generator=generator)
        labels = ids.clone()
        labels[: [0, 30, 5, 70][row % 4]] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    chosen = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "lr_scheduler_type": "constant", "per_device_eval_batch_size": 2, "report_to": [], **changes,
    }  # fmt: skip
    metrics = chosen.pop("metrics", None)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **chosen)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("BertForMaskedLM", {"metrics": True}),
        ("LlamaForCausalLM", {"label_smoothing_factor": 0.1}),
    ],
)
def test_trainer(head, changes, tmp_path):
    if "metrics" in changes:
        changes = {"metrics": lambda p: {"mean": float(p.predictions.mean()), "shape": p.predictions.shape}}
    found = []
    for is_long in (False, True):
        model = sparse_hf.sparsify(model_of(head, torch.float32), "window(9, 9)").train()
        if is_long:
            begin(model)
        found.append(trained(tmp_path, model, **changes))
    (losses, before), (ours, after) = found
    assert ours == pytest.approx(losses, rel=1e-5)
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    if "metrics" in changes:
        assert after["eval_shape"] == before["eval_shape"] == (6, 80, VOCABULARY)
        assert after["eval_mean"] == pytest.approx(before["eval_mean"], rel=1e-4)


def test_nothing_about_the_model_changes(tmp_path):
    model = model_of("BertForMaskedLM")
    names, signature, kind = list(model.state_dict()), inspect.signature(model.forward), type(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = begin(model)
    assert begin(model) is handle
    with pytest.raises(ValueError, match=r"before; call remove\(\)"):
        long_text(model)
    assert (list(model.state_dict()), inspect.signature(model.forward), type(model)) == (names, signature, kind)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert not is_checkpointed(loaded) and "forward" not in vars(loaded.get_output_embeddings())
    copied, stored = copy.deepcopy(model), io.BytesIO()
    handle.remove()
    handle.remove()
    assert not is_checkpointed(model)
    for name, module in model.named_modules():
        # Transformers leaves the function behind by which layers were checkpointed
        assert set(vars(module)) - {"_gradient_checkpointing_func", "gradient_checkpointing"} == attributes[name] - {
            "_gradient_checkpointing_func", "gradient_checkpointing"
        }  # fmt: skip
    # a copy goes on in pieces, with layers of its own
    batch = batch_of("BertForMaskedLM")
    before, wanted = step(model, batch)
    after, found = step(copied, batch)
    assert isinstance(after.logits, DeferredLogits) and distance(found, wanted) < 1e-6
    torch.save(copied, stored)
    assert stored.tell()


def test_checkpoints_of_the_user_stay(tmp_path):
    model = model_of("LlamaForCausalLM")
    model._set_gradient_checkpointing(enable=True)
    handle = long_text(model)
    handle.remove()
    assert is_checkpointed(model)
    with pytest.raises(ValueError, match="checkpointed already"):
        long_text(model, offload=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": 0}, "logits is 0; a piece has at least one token"),
        ({"feed_forward": -1}, "feed_forward is -1"),
        ({"checkpoint_layers": False, "offload": True}, "offload keeps what checkpoints"),
    ],
)
def test_bad_options_are_refused(options, message):
    model = model_of("LlamaForCausalLM")
    with pytest.raises(ValueError, match=message):
        long_text(model, **options)
    assert "forward" not in vars(model.lm_head) and not is_checkpointed(model)


def test_models_that_cannot():
    with pytest.raises(ValueError, match="no model of Transformers"):
        long_text(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="AlbertForMaskedLM cannot be checkpointed; call long_text with checkpoint_layers=False"
    ):
        long_text(model_of("AlbertForMaskedLM"))


def test_layers_that_stay_whole_are_named():
    handle = begin(model_of("MixtralForCausalLM"))
    assert not [name for name in handle.in_pieces if "norm" not in name and name != "lm_head"]
    assert handle.whole == ["model.layers.0", "model.layers.1"]


def test_heads_without_words_are_only_tiled():
    head = next(h for h in HEADS if h == "LlamaForSequenceClassification")
    assert labels_of(head)
    model, batch = model_of(head), batch_of(head)
    before, wanted = step(model, batch)
    with begin(model) as handle:
        after, found = step(model, batch)
        assert [n for n in handle.in_pieces if "norm" not in n] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert distance(found, wanted) < 1e-6


def test_generation_is_as_ever():
    model = model_of("LlamaForCausalLM").eval()
    prompt = batch_of("LlamaForCausalLM", "none")["input_ids"]
    wanted = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with begin(model):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), wanted)


def test_compiled_code_says_that_it_is_whole(monkeypatch):
    model = model_of("LlamaForCausalLM")
    hidden, said = torch.randn(2, 90, 32, dtype=torch.float64), []
    monkeypatch.setattr(logging.get_logger("sparse_hf.train.tiled"), "warning_once", said.append)
    for module in (model.lm_head, model.model.layers[0].mlp):
        wanted = module(hidden)
        with begin(model):
            found = torch.compile(module, backend="eager", fullgraph=True)(hidden)
        torch.testing.assert_close(found, wanted)
        assert not isinstance(found, DeferredLogits) and "torch.compile computes whole" in said.pop()


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_teachers_answers_are_never_whole(head, tmp_path):
    found = []
    for is_long in (False, True):
        teacher, model = (
            model_of(head, torch.float32),
            sparse_hf.sparsify(model_of(head, torch.float32), "window(9, 9)").train(),
        )
        if is_long:
            begin(model)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        trainer = HealingTrainer(model, args, teacher=teacher, distillation=Distillation(temperature=3.0, hidden=0.5))
        batch = batch_of(head, "none")
        batch.pop("use_cache", None)
        with Shapes(VOCABULARY) as seen:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(200))
            loss.backward()
        assert seen.tokens[VOCABULARY] == (SMALL["logits"] if is_long else batch["labels"].numel())
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert distance(found[1][1], found[0][1]) < 1e-5
