"""GGUF files: dequantised once, by Transformers, into an ordinary folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .source import Source


def is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf" and not Path(source).is_dir()


def read_gguf(file: Path) -> Source:
    """What the header of a GGUF file says of the model, without its tensors.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package `gguf` is missing.
        ValueError: the file is no GGUF, or of an architecture that Transformers does not read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a .gguf file, a folder or a hub id")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('reading GGUF files needs the package gguf: pip install "sparse-hf[gguf]"')
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} does not begin as a GGUF file does; it is damaged or something else")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).to_dict()
    head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])
    return Source(file.name, file.parent, {**config, "architectures": [head] if head else None}, ())


def dequantise(file: Path, out: Path) -> None:
    """Write the checkpoint in `file`, which `read_gguf` has checked, to the folder `out` as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(file.parent), file.name
    # without `dequantize` the model would stay packed, and could not be saved
    quantization = GgufConfig(gguf_file=name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=quantization, dtype=torch.float32
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
