"""Memory and time of conversions: a synthetic Mixtral checkpoint of some gigabytes, imported, exported behind its gate
and verified by hand; and one of that size made of a dense model.

    python scripts/benchmark_conversion.py [GIGABYTES [GIGABYTES_OF_A_SHARD]]

Memory is the most that the command's process was resident with, Python and torch (some 0.3 GiB) included. That of an
import, an export and a verification must stay under twice the largest shard plus 1 GiB; so the gate runs each layer by
itself, and not the whole model. Times are of this machine and hour.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from moe_lm.checkpoint.tensor_file import write_tensors
from moe_lm.data.tokenizer_export import save_tokenizer_files
from moe_lm.data.tokenizer_sentencepiece import train_tokenizer
from moe_lm.files import write_json
from moe_lm.hf.layout import model_type, to_disk, to_hf_config
from moe_lm.model.accounting import count_parameters
from moe_lm.model.config import ModelConfig, ModelFamily
from moe_lm.model.decoder import CausalLM

GIB = 2**30

COMMAND = """
import re, sys
from moe_lm import cli
code = cli.main(sys.argv[1:])
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(f"peak {peak}")
sys.exit(code)
"""


def main(size: float, shard: float) -> None:
    """Write the checkpoint, convert it, print."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        config = config_of(int(size * 1e9))
        largest = write_checkpoint(directory / "hf", config, int(shard * 1e9))
        count = count_parameters(config).total
        print(f"{count:,} parameters, {2 * count / 1e9:.2f} GB in bf16, the largest shard {largest / 1e9:.2f} GB")
        bound = 2 * largest + GIB
        texts = [Path(module.__file__).read_text() for module in (dataclasses, json, shutil, subprocess, tempfile)]
        save_tokenizer_files(train_tokenizer(texts, 400, directory / "hf"), directory / "hf", 4096)
        native, output = f"checkpoint={directory / 'native'}", directory / "export"
        options = ("dtype=bf16", f"max_shard_size={int(shard * 1e9)}", "whole_model=false")
        for command in (
            ("import", f"checkpoint={directory / 'hf'}", f"output={directory / 'native'}"),
            ("export", native, f"output={output}", *options),
            ("verify", f"checkpoint={output}", "whole_model=false"),
        ):
            peak = measure(*command)
            print(f"  {'under' if peak < bound else 'OVER'} the bound of {bound / GIB:.2f} GiB")
        shutil.rmtree(output)
        shutil.rmtree(directory / "native")
        dense = dataclasses.replace(config, family=ModelFamily.dense)
        write_checkpoint(directory / "dense", dense, int(shard * 1e9))
        print(f"{count_parameters(dense).total:,} parameters of a dense model, to the same mixture")
        measure("upcycle", f"checkpoint={directory / 'dense'}", f"output={directory / 'native'}")


def config_of(num_bytes: int) -> ModelConfig:
    """A mixture with as many layers as make so many bytes in bf16."""
    shape = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16}
    one, two = (count_parameters(ModelConfig(**shape, num_hidden_layers=n)).total for n in (1, 2))
    return ModelConfig(**shape, num_hidden_layers=max(1, round((num_bytes / 2 - one) / (two - one)) + 1))


def write_checkpoint(directory: Path, config: ModelConfig, shard_bytes: int) -> int:
    """A Hugging Face directory of random weights in bf16; returns the size of its largest shard, in bytes."""
    directory.mkdir(parents=True)
    with torch.device("meta"):
        names = dict(to_disk(CausalLM(config).named_parameters()))
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in names.items():
        if shards[-1] and sum(t.numel() * 2 for t in shards[-1].values()) + tensor.numel() * 2 > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # One random row repeated, each tensor its own: it is quick to make, and no two tensors are the same.
        values = {
            name: torch.empty(tensor.shape[-1], dtype=torch.bfloat16).normal_().expand(tensor.shape).contiguous()
            for name, tensor in shard.items()
        }
        write_tensors(directory / file, values)
        weight_map |= dict.fromkeys(shard, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    (directory / "config.json").write_text(json.dumps({"model_type": model_type(config), **to_hf_config(config)}))
    return max(path.stat().st_size for path in directory.glob("*.safetensors"))


def measure(command: str, *options: str) -> int:
    """Run a command in a process of its own, and print what it took; returns its peak memory, in bytes."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, command, *options], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{command} failed: {done.stdout}{done.stderr}")
    peak = int(done.stdout.rsplit("peak ", 1)[1])
    print(f"{command}: {seconds:.1f} s, peak {peak / GIB:.2f} GiB")
    return peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("size", nargs="?", type=float, default=4.0, help="of the checkpoint, in GB")
    parser.add_argument("shard", nargs="?", type=float, default=1.0, help="of a file of it, in GB")
    given = parser.parse_args()
    main(given.size, given.shard)
