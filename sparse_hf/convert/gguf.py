"""GGUF files: dequantised once, by Transformers, into an ordinary folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def dequantise(file: Path, out: Path) -> None:
    """Write the checkpoint in `file` to the folder `out` as float32 safetensors, tokenizer and all.

    Raises:
        ImportError: the package `gguf` is missing.
        ValueError: the file is no GGUF, or of an architecture that Transformers does not read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('reading GGUF files needs the package gguf: pip install "sparse-hf[gguf]"')
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} does not begin as a GGUF file does; it is damaged or something else")
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
