"""Examples that the help of each command ends with."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "show": (
        'sparse-hf show "window(256, 256) | first(1)" --length 4096 --png pattern.png',
        "sparse-hf show my-sparse-bert",
    ),
    "info": ("sparse-hf info my-sparse-bert --length 16384",),
    "convert": (
        'sparse-hf convert my-bert my-sparse-bert --pattern "longformer(attention_window=512)" --max-length 16384',
        'sparse-hf convert my-llama my-sparse-llama --pattern "window(4095, 0) | first(4)" --layers "0-1=dense" --dry-run',
        'sparse-hf convert my-bert out --pattern "window(128, 128) | marked()" --global-token-ids "[CLS],[SEP]"',
    ),
    "export": ("sparse-hf export my-sparse-llama my-mistral --to native",),
    "card": ("sparse-hf card my-sparse-bert --base google-bert/bert-base-uncased",),
    "list": ("sparse-hf list", "sparse-hf list llama --json"),
    "generate": (
        'sparse-hf generate my-sparse-llama --prompt "Once upon a time" --max-new-tokens 100',
        'sparse-hf generate my-llama --pattern "window(4095, 0) | first(4)" < book.txt',
    ),
    "chat": ("sparse-hf chat my-sparse-llama", 'sparse-hf chat my-llama --pattern "streaming(window=4096, sinks=4)"'),
    "evaluate": (
        'sparse-hf evaluate my-llama --pattern "window(1023, 0) | first(4)" --text contract.txt --open',
        'sparse-hf evaluate my-bert --pattern "window(128, 128) | marked()" --global-token-ids "[CLS]" --text notes.txt',
    ),
    "tune": ('sparse-hf tune my-llama --pattern "window(1023, 0) | first(4)" --text contract.txt --budget 0.25',),
    "plan-memory": (
        "sparse-hf plan-memory my-sparse-llama --length 1048576 --gpus 4",
        "sparse-hf plan-memory my-bert --length 65536 --ways checkpointing,long_text,offload --optimizer none --json",
    ),
    "bench attention": (
        'sparse-hf bench attention --pattern "window(1023, 0)" --lengths 4096,16384 --out docs/results',
    ),
    "bench chosen": ("sparse-hf bench chosen --lengths 2048,8192,32768 --out docs/results",),
    "bench models": ("sparse-hf bench models --models longformer,bert --lengths 4096,16384 --plot models.png",),
    "bench plan": ('sparse-hf bench plan "longformer()" "bigbird()" --lengths 65536,262144',),
    "bench generate": (
        "sparse-hf bench generate --shape 1b --contexts 4096,32768,32768x8 --out docs/results",
        "sparse-hf bench generate --model my-llama --cases dense-static,streaming --contexts 16384",
    ),
    "bench memory": (
        "sparse-hf bench memory --cases 1b:65536,bert:262144 --out docs/results",
        "sparse-hf bench memory --device cpu --cases smollm2-135m:16384 --ways checkpointing,long_text --steps 0",
    ),
    "bench sequence": (
        "sparse-hf bench sequence --processes 1,2,4,8 --large-shape 8b --ring 131072,262144 --out docs/results",
        "sparse-hf bench sequence --device cpu --processes 1,2 --shape tiny --tokens 4096 --tokens-each 0",
    ),
}


def epilog(name: str) -> str | None:
    """What stands below the help of a command."""
    examples = EXAMPLES.get(name)
    return "\n\n".join(("Examples:", *(f"  {example}" for example in examples))) if examples else None
