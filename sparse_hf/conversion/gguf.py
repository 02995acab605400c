"""GGUF files: dequantised once, by Transformers, into an ordinary folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from .source import Source

# packages that Transformers reads such files with, and their oldest versions; the extra `gguf` has them
NEEDED = {"gguf": "0.19", "accelerate": "1.10"}


def is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf" and not Path(source).is_dir()


def read_gguf(file: Path) -> Source:
    """What the header of a GGUF file says of the model, without its tensors.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a package that Transformers reads such files with is missing.
        ValueError: the file is no GGUF, or of an architecture that Transformers does not read, or says of the model what no
            configuration can say.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a .gguf file, a folder or a hub id")
    for package, least in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'reading GGUF files needs the package {package}: pip install "{package}>={least}"')
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} does not begin as a GGUF file does; it is damaged or something else")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .gguf_header import complete, read_header

    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).to_dict()
    config = complete(config, read_header(file))
    head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])
    return Source(file.name, file.parent, {**config, "architectures": [head] if head else None}, ())


def dequantise(source: Source, out: Path) -> None:
    """Write the checkpoint in a file that `read_gguf` has checked to the folder `out` as float32 safetensors.

    Raises:
        ValueError: the file lacks weights of its architecture, which Transformers would draw at random, or asks for a token before
            each text that this version of Transformers does not read.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, name = str(source.folder), source.name
    tokenizer = _read_tokenizer(source.folder / name)
    # without `dequantize` the model would stay packed, and could not be saved
    quantization = GgufConfig(gguf_file=name, dequantize=True)
    # with what was found, it returns two
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=quantization, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{source.folder / name} has no weights for {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}; convert the checkpoint that the file was made from"
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # what Transformers read off the file, completed
    config = {**source.config, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_tokenizer(file: Path) -> Any:
    """The tokenizer of a file, that begins texts as the file says."""
    import transformers

    from .gguf_header import begins_texts

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if begins_texts(file) and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        raise ValueError(
            f"{file} says that texts begin with a token of their own, which Transformers {transformers.__version__} does not read, so that "
            "answers would be others; install transformers>=5.24"
        )
    return tokenizer
