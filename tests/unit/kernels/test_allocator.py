"""Memory that is kept from step to step: in processes of their own, for torch's allocator is changed for good."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from moe_lm.kernels import allocator, native

if sys.platform != "linux":
    pytest.skip("the arena is for Linux", allow_module_level=True)

ARENA = pytest.mark.skipif(native.library() is None, reason="no compiler, or MOE_LM_NATIVE=0")

START = """
import gc, os, random, threading, torch
from moe_lm.kernels.allocator import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
MB = 2**18  # numbers of fp32

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
"""


def run(code: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "error", **environment}
    command = [sys.executable, "-c", START + code]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@ARENA
def test_it_compiles_against_this_torch() -> None:
    """Catches a source that does not compile, which would leave everybody with glibc's allocator."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocator._arena.__wrapped__() is not None


@ARENA
def test_tensors_keep_their_numbers() -> None:
    """Catches blocks that overlap, are freed twice or lie across cache lines, with several threads at it, whatever the
    sizes and the order; and a child that hangs on a lock of another thread."""
    code = """
def work(seed):
    chance, held = random.Random(seed), []
    for number in range(3000):
        if held and (len(held) > 60 or chance.random() < 0.5):
            tensor, value = held.pop(chance.randrange(len(held)))
            assert (tensor == value).all()
        size = int(2 ** chance.uniform(0, 20))
        held.append((torch.full((size,), float(number)), number))
        assert held[-1][0].data_ptr() % 64 == 0
    assert all((tensor == value).all() for tensor, value in held)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        assert torch.full((3 * MB,), 7.0).sum() == 21 * MB
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
for thread in threads:
    thread.join()
print("whole")
"""
    assert run(code) == "whole"


@ARENA
def test_a_hole_takes_the_next_of_its_size_and_neighbours_join() -> None:
    """Catches what is wrong with glibc's heap: a hole that takes no other block of its own size, and holes that stay
    apart."""
    code = """
blocks = [torch.ones(MB) for _ in range(8)]
places = [block.data_ptr() for block in blocks]
assert places == list(range(places[0], places[0] + 8 * 4 * MB, 4 * MB))
blocks[2] = None
assert torch.ones(MB).data_ptr() == places[2]
blocks[4] = blocks[3] = None
assert torch.ones(3 * MB).data_ptr() == places[2]
print("joined")
"""
    assert run(code) == "joined"


@ARENA
def test_memory_is_kept_until_it_is_given_back() -> None:
    """Catches pages that are faulted in again at every step, and memory that a process never lets go of."""
    code = """
torch.ones(MB)
before = resident()
held = [torch.ones(MB) for _ in range(200)]
assert resident() > before + 190
held = held[::20]
assert resident() > before + 190
give_back_freed_memory()
assert resident() < before + 40, (before, resident())
assert all((tensor == 1).all() for tensor in held)
assert torch.zeros(200 * MB).sum() == 0
print("given back")
"""
    assert run(code) == "given back"


@ARENA
@pytest.mark.skipif(Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1", reason="nothing is too much")
@pytest.mark.parametrize("numbers", ["10**15", "os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGESIZE') "])
def test_too_much_is_an_error(numbers: str) -> None:
    """Catches a process that the system kills later, or another error than torch's own: at twice the machine's."""
    code = f"""
try:
    torch.empty({numbers})
except RuntimeError as error:
    print("can't allocate memory" in str(error))
"""
    assert run(code) == "True"


def test_nothing_compiled_is_no_fault() -> None:
    """Catches a run that needs what only makes it faster."""
    assert run("print(torch.ones(MB).sum().item() / MB)", MOE_LM_NATIVE="0") == "1.0"


@pytest.mark.parametrize("gigabytes", [10, 1000])
def test_where_addresses_are_limited(gigabytes: int) -> None:
    """Catches a run that needs what only makes it faster, and one that leaves no address to others."""
    limited = f"""
import resource, torch
from moe_lm.kernels import allocator
if allocator._arena() is not None:
    resource.setrlimit(resource.RLIMIT_AS, ({gigabytes} * 2**30,) * 2)
    assert allocator._arena().arena_use() == 0
allocator.keep_freed_memory()
print(torch.ones(2**20).sum().item())
"""
    process = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stdout.strip()) == (0, f"{2.0**20}"), process.stderr
