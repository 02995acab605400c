"""Chat with a decoder in memory that does not grow with the conversation.

    python examples/chat.py --model your/llama-instruct
    python examples/chat.py --model your/llama-instruct < questions.txt

Each line of standard input is a turn. The cache stays from turn to turn: only what is new is
computed, and keys that no later token can see are dropped.
"""

from __future__ import annotations

import argparse
import inspect
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_hf


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A decoder with a chat template: a folder or a hub id.")
    parser.add_argument("--window", type=int, default=1024, help="Tokens that stay in sight, beside the first four.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = AutoModelForCausalLM.from_pretrained(args.model)
    model = sparse_hf.sparsify(dense, f"window({args.window - 1}, 0) | first(4)").eval()
    cache, turns, read = sparse_hf.StreamingCache(model.config), [], []
    # what versions of Transformers before 5.24 call it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for line in sys.stdin:
        turns.append({"role": "user", "content": line.strip()})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        held = cache.get_seq_length()
        if prompt["input_ids"][0, :held].tolist() != read[:held]:
            # the template writes earlier turns in another way, or words of an answer are cut in other tokens
            cache = sparse_hf.StreamingCache(model.config)
        tokens = model.generate(
            **prompt, **{name: cache}, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=0
        )
        read = tokens[0].tolist()
        answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": answer})
        print(answer, flush=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if turns else 0
    print(f"{cache.get_seq_length():,} tokens of conversation, {kept:,} bytes of cache", file=sys.stderr)
    return turns


if __name__ == "__main__":
    main()
