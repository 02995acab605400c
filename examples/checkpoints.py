"""Real checkpoints as ordinary Transformers folders.

Each is made once from a pinned package, checked, and kept in the cache.

python -c "from examples.checkpoints import checkpoint; print(checkpoint('rxnmapper'))"
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from examples.assets import (
    CACHE,
    GEMMA3,
    GEMMA_TERMS,
    GRAMMAR,
    GTE_SMALL,
    MINILM,
    QWEN_CODER,
    RXNFP,
    RXNMAPPER,
    SMOLLM2,
    STORIES15M,
    Asset,
    Parts,
    fetch,
    fetch_parts,
)
from sparse_hf.conversion.gguf import dequantise, read_gguf

# float32 up to here, bfloat16 beyond
MOST_BYTES = 2_000_000_000
# the tokens of SMILES, as the makers of rxnfp and rxnmapper split them
SMILES = (
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$"
    r"|\%[0-9]{2}|[0-9])"
)
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
# two couplings of an acid with an amine, and a Suzuki coupling
AMIDE = "CC(=O)O.NCc1ccccc1.CCN=C=NCCCN(C)C>>CC(=O)NCc1ccccc1"
OTHER_AMIDE = "O=C(O)c1ccccc1.NC1CCCCC1.CCN=C=NCCCN(C)C>>O=C(NC1CCCCC1)c1ccccc1"
SUZUKI = "OB(O)c1ccccc1.Brc1ccncc1.[Na+].[Na+].O=C([O-])[O-]>>c1ccc(-c2ccncc2)cc1"


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint comes from; `make` writes it to an empty folder."""

    name: str
    asset: Asset | Parts
    make: Callable[[Path], None]

    @property
    def package(self) -> str:
        """`name==version` of every package that holds a piece of it."""
        assets = self.asset.pieces if isinstance(self.asset, Parts) else (self.asset,)
        return ", ".join(f"{asset.package}=={asset.version}" for asset in assets)

    @property
    def title(self) -> str:
        """Its package; one that is in pieces is called by its own name."""
        return self.name if isinstance(self.asset, Parts) else self.package


def checkpoint(name: str) -> Path:
    """The folder of a checkpoint, made on first use.

    It holds config.json, model.safetensors and the tokenizer.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the package cannot be fetched, or what came out of it does not work as the
            model should.
        ImportError: a package that is needed to read it is missing.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"no checkpoint {name!r}; there are {', '.join(CHECKPOINTS)}")
    folder = CACHE / "checkpoints" / name
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    print(f"making {name} ...", flush=True)
    CHECKPOINTS[name].make(partial)
    os.rename(partial, folder)
    return folder


def smollm2(out: Path) -> None:
    file = fetch(SMOLLM2) / next(iter(SMOLLM2.members.values()))
    dequantise(read_gguf(file), out)
    _check_continues(out, "The capital of France is", "Paris")


def qwen_coder(out: Path) -> None:
    # as float32 it would be 2.5 GB
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        dequantise(read_gguf(fetch_parts(QWEN_CODER)), Path(scratch))
        _smaller(Path(scratch), out)
    _check_continues(out, "The capital of France is", "Paris")


def gemma3(out: Path) -> None:
    dequantise(read_gguf(fetch_parts(GEMMA3)), out)
    terms = fetch(GEMMA_TERMS)
    for name in GEMMA_TERMS.members.values():
        shutil.copyfile(terms / name, out / name)
    _check_continues(out, "Monday, Tuesday, Wednesday, Thursday,", "Friday")


def minilm(out: Path) -> None:
    shutil.copytree(fetch(MINILM), out, dirs_exist_ok=True)
    _check_similar(out)


def gte_small(out: Path) -> None:
    folder = fetch(GTE_SMALL)
    config = BertConfig(**_settings(folder / "config.json"))
    # the graph does not hold the pooler
    model = BertModel(config, add_pooling_layer=False)
    _load(model, _onnx_weights(folder / "model.onnx"))
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(folder / name, out / name)
    _check_similar(out)


def rxnmapper(out: Path) -> None:
    folder = fetch(RXNMAPPER)
    model = AlbertForMaskedLM(AlbertConfig(**_settings(folder / "config.json")))
    _load(model, _without(_pickled(folder / "pytorch_model.bin"), "albert.pooler."))
    model.save_pretrained(out)
    _check_fills(model, _smiles_tokenizer(folder / "vocab.txt", out))


def rxnfp_mlm(out: Path) -> None:
    folder = fetch(RXNFP)
    model = BertForMaskedLM(BertConfig(**_settings(folder / "mlm-config.json")))
    # trained with a head for the next sentence too, which reactions do not have
    _load(model, _without(_pickled(folder / "mlm-pytorch_model.bin"), "bert.pooler.", "cls.seq_relationship."))
    model.save_pretrained(out)
    _check_fills(model, _smiles_tokenizer(folder / "mlm-vocab.txt", out))


def rxnfp_classifier(out: Path) -> None:
    folder = fetch(RXNFP)
    # the names of its labels are those of two classes, and it has fifty
    model = BertForSequenceClassification(BertConfig(**_settings(folder / "classifier-config.json"), num_labels=50))
    _load(model, _pickled(folder / "classifier-pytorch_model.bin"))
    model.save_pretrained(out)
    tokenizer = _smiles_tokenizer(folder / "classifier-vocab.txt", out)
    batch = tokenizer([AMIDE, OTHER_AMIDE, SUZUKI], padding=True, return_tensors="pt")
    labels = _logits(model, batch).argmax(-1).tolist()
    if labels[0] != labels[1] or labels[0] == labels[2]:
        raise RuntimeError(f"{out.name}: two couplings to amides and a Suzuki coupling are of classes {labels}")


def grammar(out: Path) -> None:
    folder = fetch(GRAMMAR)
    tags = json.loads((folder / "tag_vocab.json").read_text(encoding="utf-8"))["tags"]
    # distilbert-base-cased, whose vocabulary is the cased one
    config = DistilBertConfig(
        vocab_size=28996,
        id2label=dict(enumerate(tags)),
        label2id={tag: i for i, tag in enumerate(tags)},
    )
    model = DistilBertForTokenClassification(config)
    _load(model, _onnx_weights(folder / "tagger.onnx"))
    model.save_pretrained(out)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # it was cut to 128 tokens; the model has 512 positions
    tokenizer.no_truncation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **SPECIAL)
    tokenizer.save_pretrained(out)
    batch = tokenizer("Yesterday I buyed a car.", return_tensors="pt")
    found = [tags[i] for i in _logits(model, batch)[0].argmax(-1)]
    if "$REPLACE_bought" not in found:
        raise RuntimeError(f"{out.name}: 'I buyed' is tagged {found}")


def stories15m(out: Path) -> None:
    """Read the format of llama2.c: seven integers, then float32 tables.

    All layers of a kind stand together.
    """
    with (fetch(STORIES15M) / "llama2.data").open("rb") as file:
        hidden, inner, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", file.read(28))
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        _load(model, _llama2c_weights(file, config))
        # the tables of cosines and sines, which Transformers computes
        file.seek(4 * positions * (hidden // heads), os.SEEK_CUR)
        tokenizer = _llama2c_tokenizer(file, vocabulary, positions)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _check_continues(out, "Once upon a time, there was a little girl named Lily. She", "loved to play")


def _llama2c_weights(file: BinaryIO, config: LlamaConfig) -> dict[str, Tensor]:
    hidden, inner, heads, kv_heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    kv = hidden // heads * kv_heads

    def read(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(bytearray(file.read(4 * count)), dtype=torch.float32).view(shape)

    def halves(table: Tensor, of_heads: int) -> Tensor:
        # llama2.c turns neighbours (2i, 2i + 1) together, Transformers i and i + half a head
        return table.view(of_heads, -1, 2, hidden).transpose(1, 2).reshape(-1, hidden)

    weights = {"model.embed_tokens.weight": read(config.vocab_size, hidden)}
    tables = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "mlp.up_proj": (inner, hidden),
    }
    for name, shape in tables.items():
        for layer, table in enumerate(read(config.num_hidden_layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                table = halves(table, heads if name.endswith("q_proj") else kv_heads)
            weights[f"model.layers.{layer}.{name}.weight"] = table
    return {**weights, "model.norm.weight": read(hidden)}


def _llama2c_tokenizer(file: BinaryIO, vocabulary: int, positions: int) -> LlamaTokenizer:
    """Pieces with scores; a pair merges the sooner the higher its score."""
    file.read(4)
    pieces, scores = ["<unk>", "<s>", "</s>"], []
    for i in range(vocabulary):
        score, length = struct.unpack("fi", file.read(8))
        piece = file.read(length).decode("utf-8")
        scores.append(score)
        if i >= len(pieces):
            pieces.append(piece.replace(" ", "▁"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, i in ids.items():
        # bytes stand apart, as <0x0A>, and are not put together from letters
        if i < 259:
            continue
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(-scores[i], ids[a], ids[b], (a, b)) for a, b in cuts if a in ids and b in ids]
    merges = [pair for *_, pair in sorted(merges)]
    return LlamaTokenizer(vocab=ids, merges=merges, add_bos_token=True, model_max_length=positions)


def _settings(config: Path) -> dict:
    """What an old configuration says of the model itself.

    Its class, its two labels and how to generate are left out.
    """
    kept = (
        "attention_probs_dropout_prob",
        "classifier_dropout_prob",
        "embedding_size",
        "hidden_act",
        "hidden_dropout_prob",
        "hidden_size",
        "initializer_range",
        "inner_group_num",
        "intermediate_size",
        "layer_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_groups",
        "num_hidden_layers",
        "type_vocab_size",
        "vocab_size",
    )
    content = json.loads(config.read_text(encoding="utf-8"))
    return {key: content[key] for key in kept if key in content}


def _pickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)


def _without(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}


def _load(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Check that every weight is given, or tied to one that is, and nothing is left."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - set(model.all_tied_weights_keys)
    if missing or unexpected:
        raise RuntimeError(
            f"{type(model).__name__}: weights are missing {sorted(missing)} or unexpected {sorted(unexpected)}"
        )
    model.tie_weights()
    model.eval()


def _onnx_weights(file: Path) -> dict[str, Tensor]:
    """The weights of an exported model by their names in Transformers, in float32.

    Matrices have lost their names: each is found by its multiplication, whose node is named after
    the module.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("reading ONNX files needs the package onnx: pip install onnx") from error
    graph = onnx.load(file).graph
    tensors = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            quantised, scale, zero = (tensors[name] for name in node.input)
            tensors[node.output[0]] = (quantised.float() - zero.float()) * scale
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    for node in graph.node:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        if node.op_type == "MatMul" and node.input[1] in tensors:
            weights[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
        elif node.op_type == "Gather" and node.input[0].startswith(f"{module}.weight"):
            weights[f"{module}.weight"] = tensors[node.input[0]]
    return weights


def _smiles_tokenizer(vocabulary: Path, out: Path) -> PreTrainedTokenizerFast:
    """One token per atom, bond or bracket; what is none of them is dropped."""
    words = vocabulary.read_text(encoding="utf-8").split("\n")
    ids = {word: i for i, word in enumerate(words) if word}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "removed", invert=True)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **SPECIAL)
    wrapped.save_pretrained(out)
    return wrapped


def _smaller(folder: Path, out: Path) -> None:
    """The same checkpoint in bfloat16, if it is large."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = torch.bfloat16 if size > MOST_BYTES else torch.float32
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


@torch.inference_mode()
def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def _check_continues(folder: Path, prompt: str, expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt")
    text = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=8, do_sample=False)
    said = tokenizer.decode(text[0, ids["input_ids"].shape[1] :])
    if expected not in said:
        raise RuntimeError(f"{folder.name}: {prompt!r} goes on {said!r}, without {expected!r}")


@torch.inference_mode()
def _check_similar(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = ("A man is eating food.", "A man is eating a piece of bread.", "The bank raised its rates.")
    batches = [tokenizer(text, return_tensors="pt") for text in texts]
    first, near, far = (model(**batch).last_hidden_state[0].mean(0) for batch in batches)
    close, apart = torch.cosine_similarity(first, near, 0), torch.cosine_similarity(first, far, 0)
    if close < apart + 0.1:
        raise RuntimeError(f"{folder.name}: like sentences have cosine {close:.3f}, unlike ones {apart:.3f}")


def _check_fills(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Hide each token of a reaction in turn: a trained model finds nearly all again."""
    ids = torch.tensor(tokenizer(AMIDE)["input_ids"])
    places = torch.arange(1, len(ids) - 1)
    hidden = ids.repeat(len(places), 1)
    hidden[torch.arange(len(places)), places] = tokenizer.mask_token_id
    logits = _logits(model, {"input_ids": hidden, "attention_mask": torch.ones_like(hidden)})
    right = (logits[torch.arange(len(places)), places].argmax(-1) == ids[places]).float().mean()
    if right < 0.8:
        raise RuntimeError(f"{type(model).__name__}: only {right:.0%} of a reaction's tokens are found again")


CHECKPOINTS = {
    found.name: found
    for found in (
        Checkpoint("smollm2", SMOLLM2, smollm2),
        Checkpoint("qwen2.5-coder-0.5b", QWEN_CODER, qwen_coder),
        Checkpoint("gemma3-270m", GEMMA3, gemma3),
        Checkpoint("stories15m", STORIES15M, stories15m),
        Checkpoint("minilm", MINILM, minilm),
        Checkpoint("gte-small", GTE_SMALL, gte_small),
        Checkpoint("rxnmapper", RXNMAPPER, rxnmapper),
        Checkpoint("rxnfp-mlm", RXNFP, rxnfp_mlm),
        Checkpoint("rxnfp-classifier", RXNFP, rxnfp_classifier),
        Checkpoint("distilbert-grammar", GRAMMAR, grammar),
    )
}
