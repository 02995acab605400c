"""Compiles every Triton kernel that these calls launch for an H100, on any machine, and runs none.

Run as a script, because Triton asks once, when it is imported, whether to interpret. It prints a line for each kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_hf import Pattern, mass_left_out, sparse_attention
from sparse_hf.attention import launch
from sparse_hf.attention.backend import Given
from sparse_hf.attention.backends.triton import walk
from sparse_hf.attention.chosen import DotScores, IndexerScores, Latents, Limits, attend_latent, choose
from sparse_hf.attention.composite.global_token_kernels import absorb, add_gradients
from sparse_hf.attention.composite.global_tokens import find
from sparse_hf.attention.dispatch import content_plan
from sparse_hf.attention.scoring import Scoring
from sparse_hf.attention.slots.new_tokens import Filled, slots_attention
from sparse_hf.bench.exactness import plain_call

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
# bytes of shared memory that a program of an H100 has at most
SHARED_BYTES = 232_448

compiled: dict[tuple, str] = {}


def compile_only(self: launch.Launch, tensors, numbers) -> None:
    """In place of a launch: compile what it would run, once."""
    kernel, signature, constants, hints = self.kernel, {}, {}, {}
    given = (*tensors, *self.fixed, *self.strides, *numbers)
    for i, parameter in enumerate(kernel.params):
        kind = "constexpr"
        if i >= len(given):
            constants[(i,)] = self.constants[parameter.name]
        elif isinstance(given[i], Tensor):
            kind, hints[(i,)] = POINTERS[given[i].dtype], [["tt.divisibility", 16]]
        elif isinstance(given[i], float):
            kind = "fp32"
        elif given[i] == 1 and not parameter.do_not_specialize:
            constants[(i,)] = 1
        else:
            kind = "i32" if -(1 << 31) <= given[i] < 1 << 31 else "i64"
            if given[i] % 16 == 0 and not parameter.do_not_specialize:
                hints[(i,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    key = id(kernel), *signature.items(), *constants.items(), *self.options.items()
    if key in compiled:
        return
    found = f"{kernel.fn.__module__}.{kernel.__name__}"
    try:
        made = triton.compile(ASTSource(kernel, signature, constants, hints), target=H100, options=self.options)
        if made.metadata.shared > SHARED_BYTES:
            found = f"FAILED {found}: {made.metadata.shared} bytes of shared memory"
    # whatever a compiler raises is what there is to tell
    except Exception as error:
        found = f"FAILED {found}: {type(error).__name__}: {str(error)[-600:]}"
    compiled[key] = found
    print(found, flush=True)


def attend(pattern: str, dims=(32, 32), heads=(4, 2), **more) -> None:
    """Forward and backward."""
    sizes = (heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1])
    q, k, v = (torch.randn(1, h, 256, dim).to(torch.bfloat16).requires_grad_() for h, dim in sizes)
    out, lse = sparse_attention(q, k, v, pattern, backend="triton", return_lse=True, **more)
    torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))


def judge(pattern: str) -> None:
    """With and without somebody who listens to what is left out."""
    q, k, v = (torch.randn(1, h, 256, 128).to(torch.bfloat16) for h in (4, 2, 2))
    for context in (mass_left_out(), nullcontext()):
        with context:
            content_plan(plain_call(q, k, v, Pattern.parse(pattern)))


def decode() -> None:
    q, k, v = (torch.randn(1, h, n, 32).to(torch.bfloat16) for h, n in ((4, 1), (2, 150), (2, 150)))
    slots_attention(q, k, v, Filled(torch.tensor(99)), "window(20, 0)", Scoring(0.125))


def choose_latents() -> None:
    """With the widths of DeepSeek V3.2."""
    scores = torch.randn(1, 40, 64, 128), torch.randn(1, 40, 128)
    scores = IndexerScores(*(t.to(torch.bfloat16) for t in scores), torch.randn(1, 40, 64))
    chosen = choose(scores, 16, Limits(q_offset=0))
    shapes = (1, 128, 40, 192), (1, 40, 512), (1, 40, 64), (128, 128, 512), (128, 128, 512)
    query, *parts = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    attend_latent(query.requires_grad_(), Latents(*parts), chosen, scale=0.1).sum().backward()


def choose_from_many() -> None:
    choose(DotScores(torch.randn(1, 2, 40, 64), torch.randn(1, 2, 4096, 64)), 16, Limits(q_offset=0))


def add_marked_keys() -> None:
    q = torch.randn(1, 2, 256, 32).to(torch.bfloat16)
    lse, places = torch.zeros(1, 2, 256), find(torch.arange(256)[None] % 50 == 0)
    absorb(q, q, q, q.clone(), lse, places, (20, 20, 256, 256), 0.125)
    add_gradients(
        (q, q, q), Given(q, lse, q, lse), [q.clone(), q.clone(), q.clone()], places, (20, 20, 256, 256), 0.125
    )


CALLS: tuple[Callable[[], None], ...] = (
    lambda: attend("window(20, 0) | first(4)", softcap=2.0, dropout=0.1),
    lambda: attend("topk(8) & window(None, 0)", (32, 16)),
    *(
        lambda heads=heads: attend("topk_blocks(2, 64, per='group') & window(None, 0)", (128, 128), heads)
        for heads in ((16, 1), (4, 4))
    ),
    lambda: attend("(window(70, 0) | topk_blocks(2, 64, 'bounds', 64)) & window(None, 0)"),
    lambda: judge("(window(70, 0) | threshold(0.1)) & window(None, 0)"),
    choose_latents,
    choose_from_many,
    decode,
    add_marked_keys,
)

if __name__ == "__main__":
    walk.DEVICES.add("cpu")
    launch.Launch.__call__ = compile_only
    for call in CALLS:
        call()
    sys.exit(any(found.startswith("FAILED") for found in compiled.values()))
