"""Compiles every Triton kernel for an H200, at sizes of real models, on a machine without a GPU.

    python -m tests.compile_triton

Kernels are launched as they always are, on a CPU's tensors; in the place of a launch the kernel is compiled, by Triton
and NVIDIA's assembler, for the types and sizes that it is called with. Prints its name.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
ALIGNED = [["tt.divisibility", 16]]


def compile_instead(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In the place of `JITFunction.run`: what Triton would specialise the kernel for, compiled and not run."""
    names = [parameter.name for parameter in self.params]
    options = {name: named.pop(name) for name in list(named) if name not in names}
    values = dict(zip(names, arguments)) | named
    types, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(self.params):
        value, types[parameter.name] = values[parameter.name], "fp32"
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name], attributes[(place,)] = POINTERS[value.dtype], ALIGNED
        elif isinstance(value, int):
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            attributes |= {(place,): ALIGNED} if value % 16 == 0 else {}
    compiled = triton.compile(ASTSource(self, types, constants, attributes), target=HOPPER, options=options)
    assert "cubin" in compiled.asm
    print(f"{self.fn.__module__}.{self.fn.__name__}")


def main() -> None:
    """Launch all, forward and backward."""
    JITFunction.run = compile_instead
    from moe_lm.kernels.triton import cross_entropy, experts, normalization, rotary, rows

    ends_E, token_P = torch.tensor([3, 3, 24], dtype=torch.int32), torch.arange(24) // 2
    for dtype in (torch.bfloat16, torch.float32):

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, requires_grad=True)

        for width in (2048, 771):
            normalization.rms_norm(leaf(24, width), leaf(width), 1e-5).sum().backward()
            rows.sum_rows(leaf(24, width).detach(), rows.order(token_P, 12))
        matrices = leaf(3, 4096, 64), leaf(3, 64, 2048)
        experts.expert_mixture(leaf(12, 64), token_P, leaf(24), ends_E, *matrices).sum().backward()
        angles_BSH = torch.zeros(2, 12, 128, dtype=dtype)
        rotary.apply_rotary(leaf(2, 12, 16, 128), angles_BSH, angles_BSH).sum().backward()
        for vocabulary in (32000, 257):
            for gradients in (True, False):
                logits_RV = leaf(24, vocabulary).detach()
                cross_entropy.cross_entropy(logits_RV, torch.zeros(24, dtype=torch.int64), gradients, -100)


if __name__ == "__main__":
    main()
