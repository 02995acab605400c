#!/bin/sh
# axolotl-ringmaster splits a text over processes. Layers with a sliding window go by its all-gather ring alone (its other ring refuses
# them), and that fetches the keys and values of the whole text, however narrow the window is: each process holds all of them, and on
# CPUs a mask of its queries by all keys besides. Answers are right.
# Seen, two processes, two layers with a window of 16: 512 tokens, 512 keys gathered a layer, a mask of 256 x 512; 1,024 tokens, 1,024
# and 512 x 1,024. What a window of 16 needs of the neighbour are 15 keys at both lengths.
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 axolotl-ringmaster==0.2.7
cat > "$work/ring.py" <<'PY'
import os, sys
import torch, transformers, torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM
import ringmaster as rm
from ringmaster.adapters.raw import context_parallel_region

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
torch.manual_seed(0)
model = MistralForCausalLM(MistralConfig(
    vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    sliding_window=16, initializer_range=0.2, max_position_embeddings=2048)).eval()
if rank == 0:
    print("torch", torch.__version__, "transformers", transformers.__version__)
gathered = []
gather = dist.all_gather
def counted(out, x, **kwargs):
    gathered.append(sum(t.shape[1] for t in out))
    return gather(out, x, **kwargs)
class Masks(TorchDispatchMode):
    largest = (0, 0)
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool and out.dim() >= 2:
            self.largest = max(self.largest, tuple(out.shape[-2:]), key=lambda shape: shape[0] * shape[1])
        return out
right = {}
for n in (512, 1024):
    ids = torch.randint(4, 60, (1, n), generator=torch.Generator().manual_seed(n))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(ids).logits
    runtime = rm.setup(rm.RingmasterConfig(size=2, backend=rm.Backend.RING), num_kv_heads=2, device_mesh=mesh, device_type="cpu", inner_attn="sdpa")
    model.set_attn_implementation(runtime.attn_implementation)
    dist.all_gather = counted
    gathered.clear()
    with torch.no_grad(), context_parallel_region({"input_ids": ids}) as part, Masks() as masks:
        part.pop("shift_labels", None)
        found = model(**part, use_cache=False).logits
    dist.all_gather = gather
    error = float((found - whole.chunk(2, 1)[rank]).abs().max())
    right[n] = error < 1e-4, gathered[0] == n, masks.largest
    if rank == 0:
        print(f"{n} tokens: error {error:.0e}, keys gathered a layer {gathered[0]}, the largest mask {masks.largest[0]} x {masks.largest[1]}")
    rm.teardown()
seen = all(ok and whole and mask == (n // 2, n) for n, (ok, whole, mask) in right.items())
if rank == 0:
    print("as described" if seen else "CHANGED")
dist.destroy_process_group()
sys.exit(not seen)
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$work/ring.py"
