"""What a folder says of its tokenizer and its images: the class that reads them, and the greatest length.

Transformers finds the class by the model type, and a sparse one is in none of its tables where nobody wrote
`import sparse_hf`. What a folder says of itself holds everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from .carry import SENTENCE_CONFIG, TOKENIZER_CONFIG, has_tokenizer, read_json, update_json

logger = logging.get_logger(__name__)

PREPROCESSOR_CONFIG = "preprocessor_config.json"
# keys by which a folder names the class that reads its images or sounds
PROCESSOR_KEYS = ("image_processor_type", "feature_extractor_type", "auto_map")


@dataclass(frozen=True)
class TokenizerClass:
    """The class that a folder declares for its tokenizer, and the one that AutoTokenizer takes for it.

    `rules` is the content of a `tokenizer.json` that must replace the folder's, because its own is mended when it is read.
    """

    declared: str | None
    taken: str
    rules: str | None = None

    @property
    def is_declared(self) -> bool:
        return self.declared is not None and self.declared.removesuffix("Fast") == self.taken.removesuffix("Fast")


def tokenizer_class(folder: Path, name: str, files: Sequence[Path]) -> TokenizerClass | None:
    """The class of the tokenizer in a folder that people call `name`, which may be a hub id.

    None where there is no tokenizer, where it is code of the checkpoint's own, and where it does not load.
    """
    settings = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    if not has_tokenizer(files, folder) or "AutoTokenizer" in (settings.get("auto_map") or {}):
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        # some checkpoints of the hub are told by their id
        config._name_or_path = name
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    # tokenizers raise Exception itself
    except Exception as error:  # noqa: BLE001
        logger.warning(
            "the tokenizer of %s does not load (%s), so its files travel as they are",
            name,
            (str(error).splitlines() or [type(error).__name__])[0],
        )
        return None
    declared = settings.get("tokenizer_class") or getattr(config, "tokenizer_class", None)
    # old checkpoints of Mistral have a rule that Transformers mends if they ask for it, and knows them by the model type
    mended = settings.get("fix_mistral_regex") and getattr(tokenizer, "backend_tokenizer", None)
    return TokenizerClass(declared, type(tokenizer).__name__, mended.to_str() if mended else None)


def declare_classes(new: Path, tokenizer: TokenizerClass | None, dense_type: str) -> None:
    """Have a converted folder name the classes that Transformers takes for the source."""
    if tokenizer is not None and not tokenizer.is_declared:
        update_json(new / TOKENIZER_CONFIG, tokenizer_class=tokenizer.taken)
    if tokenizer is not None and tokenizer.rules is not None:
        (new / "tokenizer.json").write_text(tokenizer.rules, encoding="utf-8")
    images = new / PREPROCESSOR_CONFIG
    if images.is_file() and not any(read_json(images).get(key) for key in PROCESSOR_KEYS):
        name = _image_processor(dense_type)
        if name is not None:
            update_json(images, image_processor_type=name)


@dataclass(frozen=True)
class TokenLimit:
    """The most tokens that a tokenizer shall give; `only_lowers` keeps a limit that is smaller already."""

    tokens: int
    only_lowers: bool

    def after(self, old: int | None) -> int:
        return min(self.tokens, old or self.tokens) if self.only_lowers else self.tokens


def tokenizer_limits(folder: Path, limit: TokenLimit | None) -> tuple[int | None, int | None]:
    """`model_max_length` of the tokenizer in a folder, before and after `set_limit`."""
    settings = folder / TOKENIZER_CONFIG
    old = read_json(settings).get("model_max_length") if settings.is_file() else None
    return old, old if limit is None else limit.after(old)


def set_limit(new: Path, limit: TokenLimit, has_tokenizer: bool) -> None:
    """Write the limit into the settings of the tokenizer, of Sentence Transformers, and of truncation."""
    settings = new / TOKENIZER_CONFIG
    if has_tokenizer or settings.is_file():
        update_json(settings, model_max_length=tokenizer_limits(new, limit)[1])
    for settings in new.glob(SENTENCE_CONFIG):
        old = read_json(settings).get("max_seq_length")
        if old is not None or not limit.only_lowers:
            update_json(settings, max_seq_length=limit.after(old))
    rules = new / "tokenizer.json"
    content = read_json(rules) if rules.is_file() else {}
    if content.get("truncation"):
        old = content["truncation"].get("max_length")
        if limit.after(old) != old:
            content["truncation"]["max_length"] = limit.after(old)
            rules.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _image_processor(dense_type: str) -> str | None:
    """The name of the image processor that Transformers takes for a model type, whichever library draws."""
    # by its full name: where torchvision is missing, the package's attribute stands for its absence
    tables = import_module("transformers.models.auto.image_processing_auto")
    names = tables.IMAGE_PROCESSOR_MAPPING_NAMES.get(dense_type)
    if not isinstance(names, dict):
        return names[0] if names else None
    return names.get("torchvision") or names.get("pil")
