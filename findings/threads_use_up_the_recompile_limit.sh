#!/bin/sh
# Eight threads that call a model under torch.compile at once, before anything is compiled, compile the same graph eight times: a thread
# that waited for another does not look again. Eight is also torch's recompile limit, so that the next shape runs uncompiled from then
# on. After one call by one thread they share its graph.
# Seen: after one call first: 1 graph for 8 threads, 2 with another shape; all at once: 8 graphs for 8 threads, 8 with another shape
# Fails if this changes.
set -eu
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from torch._dynamo.testing import CompileCounterWithBackend
print("torch", torch.__version__, "recompile limit", torch._dynamo.config.recompile_limit)
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
THREADS, model = 8, torch.nn.Linear(8, 8)
def graphs(first):
    torch._dynamo.reset()
    counter, start = CompileCounterWithBackend("eager"), threading.Barrier(THREADS)
    compiled = torch.compile(model, backend=counter)
    if first:
        compiled(torch.randn(3, 8))
    def call(number):
        start.wait()
        compiled(torch.randn(3, 8))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(call, range(THREADS)))
    before = counter.frame_count
    compiled(torch.randn(5, 8))
    return before, counter.frame_count
warm, cold = graphs(True), graphs(False)
print(f"after one call first: {warm[0]} graph for 8 threads, {warm[1]} with another shape; "
      f"all at once: {cold[0]} graphs for 8 threads, {cold[1]} with another shape")
seen = warm == (1, 2) and cold == (8, 8)
print("as described" if seen else "CHANGED")
sys.exit(not seen)
PY
