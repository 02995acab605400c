"""What the help of each command says, and the examples that it ends with."""

from __future__ import annotations

import inspect
from collections.abc import Callable

# each fits one line of a terminal of 80 columns, to be copied
EXAMPLES: dict[str, tuple[str, ...]] = {
    "show": (
        'sparse-hf show "window(256, 256) | first(1)" --length 4096 --png out.png',
        "sparse-hf show my-sparse-bert",
    ),
    "info": ("sparse-hf info my-sparse-bert --length 16384",),
    "convert": (
        'sparse-hf convert my-bert out --pattern "longformer()" --max-length 16384',
        'sparse-hf convert my-llama out --pattern "streaming()" --layers "0-1=dense"',
        'sparse-hf convert my-llama out --pattern "sliding_window(4096)" --dry-run',
    ),
    "export": ("sparse-hf export my-sparse-llama my-mistral --to native",),
    "card": ("sparse-hf card my-sparse-bert --base google-bert/bert-base-uncased",),
    "list": ("sparse-hf list", "sparse-hf list llama --json"),
    "generate": (
        'sparse-hf generate my-sparse-llama --prompt "Once" --max-new-tokens 100',
        'sparse-hf generate my-llama --pattern "streaming()" < book.txt',
    ),
    "chat": ("sparse-hf chat my-sparse-llama", 'sparse-hf chat my-llama --pattern "streaming(4096, 4)"'),
    "evaluate": (
        'sparse-hf evaluate my-llama --pattern "streaming()" --text notes.txt --open',
        'sparse-hf evaluate my-bert --pattern "window(64, 64)" --text notes.txt',
    ),
    "tune": (
        'sparse-hf tune my-llama --pattern "streaming()" --text notes.txt',
        'sparse-hf tune my-llama --pattern "streaming()" --text notes.txt --by heads',
        'sparse-hf tune my-llama --pattern "streaming()" --text notes.txt --of time',
    ),
    "plan-memory": (
        "sparse-hf plan-memory my-sparse-llama --length 1048576 --gpus 4",
        "sparse-hf plan-memory my-bert --length 65536 --ways long_text,offload --json",
    ),
    "bench attention": (
        'sparse-hf bench attention --pattern "window(1023, 0)" --lengths 4096,16384',
        "sparse-hf bench attention --dtype bf16 --device cuda --out docs/results",
    ),
    "bench chosen": ("sparse-hf bench chosen --lengths 2048,8192,32768 --out docs/results",),
    "bench models": ("sparse-hf bench models --models longformer,bert --plot models.png",),
    "bench plan": ('sparse-hf bench plan "longformer()" "bigbird()" --lengths 65536,262144',),
    "bench generate": (
        "sparse-hf bench generate --shape 1b --contexts 4096,32768,32768x8",
        "sparse-hf bench generate --model my-llama --cases dense-static,streaming",
    ),
    "bench memory": (
        "sparse-hf bench memory --cases 1b:65536,bert:262144 --out docs/results",
        "sparse-hf bench memory --device cpu --cases smollm2-135m:2048 --steps 0",
    ),
    "bench sequence": (
        "sparse-hf bench sequence --processes 1,2,4,8 --large-shape 8b --ring 131072",
        "sparse-hf bench sequence --device cpu --processes 2 --shape tiny --tokens 4096",
    ),
}


def paragraphs(command: Callable[..., None]) -> str:
    """The docstring of a command, each paragraph on one line: help breaks lines where a terminal ends."""
    return "\n\n".join(" ".join(one.split()) for one in (inspect.getdoc(command) or "").split("\n\n"))


def epilog(name: str) -> str | None:
    """What stands below the help of a command."""
    examples = EXAMPLES.get(name)
    return "\n\n".join(("Examples:", *examples)) if examples else None
