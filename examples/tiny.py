"""A tiny tokenizer, tiny random models and tiny texts, for `--tiny`, the documentation and the tests.

They take seconds on a CPU, and no network.

    python examples/tiny.py FOLDER    # writes what the documentation calls my-llama, my-bert and my-texts.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    LEDConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LAW = "the court shall hear a party who owns land and pays rent under this contract before any sale"
SEA = "a whale and the old ship sailed over waves while wind blew salt on sails and men rowed"


def texts(count: int, seed: int = 0) -> list[dict]:
    """Documents of several sections, `text` and `label`: 0 is of law, 1 of the sea."""
    draw = random.Random(seed)
    made = []
    for row in range(count):
        label = row % 2
        words = (LAW, SEA)[label].split()
        sections = [
            f"Article {number}\n" + " ".join(draw.choice(words) for _ in range(draw.randint(5, 40)))
            for number in range(1, draw.randint(2, 4) + 1)
        ]
        made.append({"text": "\n".join(sections), "label": label})
    return made


def questions(count: int, seed: int = 0) -> list[dict]:
    """Rows in SQuAD's shape: the answer is the word after the article asked for."""
    made = []
    for row, example in enumerate(texts(count, seed)):
        number = 1 + row % example["text"].count("Article")
        start = example["text"].index(f"Article {number}\n") + len(f"Article {number}\n")
        answer = example["text"][start:].split()[0]
        found = {"text": [answer], "answer_start": [start]}
        made.append(
            {
                "id": str(row),
                "question": f"how does Article {number} begin",
                "context": example["text"],
                "answers": found,
            }
        )
    return made


def summaries(count: int, seed: int = 0) -> list[dict]:
    """Documents and what to say of them, `text` and `summary`.

    That is how many articles there are, and what they are about.
    """
    made = []
    for example in texts(count, seed):
        subject = ("land and rent under contract", "a whale and men on a ship")[example["label"]]
        made.append({"text": example["text"], "summary": f"{example['text'].count('Article')} of {subject}"})
    return made


def tokenizer(causal: bool = False) -> PreTrainedTokenizerBase:
    """Byte-level BPE: every text has tokens, and decoding gives it back.

    A row is `[CLS] text [SEP]`, or `text [SEP]` if causal.
    """
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL.values()), initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator([example["text"] for example in texts(50)], trainer)
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    single, pair = (
        ("$A [SEP]", "$A [SEP] $B:1 [SEP]:1") if causal else ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    )
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **SPECIAL, bos_token="[CLS]", eos_token="[SEP]", model_max_length=1_000_000
    )


def config(kind: str, vocab_size: int, positions: int = 128) -> PreTrainedConfig:
    """`kind` is "decoder" (Llama), "encoder" (BERT) or "encoder-decoder" (LED)."""
    ids = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "decoder":
        return LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=positions, **ids)
    if kind == "encoder":
        return BertConfig(**SIZES, max_position_embeddings=positions, **ids)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _LED.items()}
    sides |= {f"max_{side}_position_embeddings": positions for side in ("encoder", "decoder")}
    return LEDConfig(d_model=32, attention_window=16, decoder_start_token_id=3, **sides, **ids)


_LED = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def model(auto_class, kind: str, vocab_size: int, positions: int = 128, **changes):
    """A random model of the Auto class's head."""
    torch.manual_seed(0)
    made = config(kind, vocab_size, positions)
    for name, value in changes.items():
        setattr(made, name, value)
    # `from_config` would spread it over all processes under DeepSpeed's ZeRO-3, while only one
    # makes it
    return auto_class._model_mapping[type(made)](made)


# what a text for a chat model is made of
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(folder: Path) -> None:
    """Write a decoder of 4,096 positions with a chat template, an encoder of 512, and 40 texts with labels."""
    for name, auto_class, kind, positions in (
        ("my-llama", AutoModelForCausalLM, "decoder", 4096),
        ("my-bert", AutoModelForMaskedLM, "encoder", 512),
    ):
        words = tokenizer(causal=kind == "decoder")
        words.model_max_length = positions
        if kind == "decoder":
            words.chat_template = CHAT
        words.save_pretrained(folder / name)
        model(auto_class, kind, len(words), positions).save_pretrained(folder / name)
    lines = "".join(f"{json.dumps(row)}\n" for row in texts(40))
    (folder / "my-texts.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/tiny.py FOLDER")
    write(Path(sys.argv[1]))
