"""Conversion holds one piece of a checkpoint at a time, however large its files are."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.crosses import slow_but_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BLOCK = 64 << 20
# prints how far the peak of memory was above what was held before, and how many bytes were written. `getrusage` tells the
# same, but a child begins there with the peak of its parent
MEASURED = """
import json, sys
from pathlib import Path
import sparse_hf
def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
source, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
# the first conversion imports what any conversion imports
sparse_hf.convert(source + "-small", str(out) + "-small", "window(63, 0)", progress=False)
before = kilobytes("VmRSS")
sparse_hf.convert(source, out, "window(63, 0)", progress=False, **options)
written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
print(json.dumps({"rise": 1024 * (kilobytes("VmHWM") - before), "written": written}))
"""


@pytest.fixture
def room(tmp_path) -> Iterator[Path]:
    """A folder that is emptied at once, since pytest keeps those of several runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def config_of(layers: int, width: int, rows: int, **changes) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        **changes,
    )


def write_checkpoint(folder: Path, config: transformers.LlamaConfig, shards: int) -> int:
    """Random weights in bfloat16, spread over files; returns their bytes."""
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    names, weight_map, total = list(shapes), {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        weight_map.update(dict.fromkeys(part, file))
        total += write_safetensors(folder / file, {name: shapes[name] for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> int:
    """One block of random numbers again and again, which is quick to write."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(torch.tensor(shape).prod())
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    block = (torch.randn(BLOCK // 2) / 50).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(end // BLOCK):
            file.write(block)
        file.write(block[: end % BLOCK])
    return end


def measure(source: Path, out: Path, **options) -> dict[str, int]:
    transformers.logging.set_verbosity_error()
    write_checkpoint(source.with_name(f"{source.name}-small"), config_of(1, 64, 100), 1)
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(source), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout.splitlines()[-1])


FILES = ["copied", "written anew", "torch"]


@pytest.mark.parametrize("files", slow_but_for(["copied", "torch"], FILES, ["copied"]))
def test_300_megabytes_are_converted_in_less_than_100(files, room):
    source, config = room / "dense", config_of(2, 1024, 64000)
    total = write_checkpoint(source, config, 1)
    file = next(source.glob("*.safetensors"))
    assert total > 290e6 and file.stat().st_size > total
    (source / "model.safetensors.index.json").unlink()
    if files == "torch":
        torch.save(load_file(file), source / "pytorch_model.bin")
        file.unlink()
    else:
        content = file.read_bytes()
        # a header of another kind is not copied
        kind = content if files == "copied" else content.replace(b'"pt"', b'"xx"', 1)
        (source / "model.safetensors").write_bytes(kind)
        file.unlink()
    told = measure(source, room / "sparse")
    print(told)
    assert told["written"] >= total and told["rise"] < 100e6, told


@pytest.mark.slow
@pytest.mark.parametrize("shards", [4, 1])
def test_8_gigabytes_are_converted_in_less_than_one(shards, room):
    # the embedding alone is 2.1 GB, more than may be held
    total = write_checkpoint(room / "dense", config_of(22, 4096, 256000, head_dim=64), shards)
    assert total > 8e9
    told = measure(room / "dense", room / "sparse", max_length=65536, rope="yarn")
    print(told)
    assert told["written"] > total and told["rise"] < 1e9, told
