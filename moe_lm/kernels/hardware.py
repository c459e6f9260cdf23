"""Whether the processor multiplies bf16 matrices in hardware, and which kernels the user has switched off; asked when
it matters and never at import.

`torch.ops.mkldnn._is_mkldnn_bf16_supported` says yes wherever bf16 can be emulated, where it is slower than fp32: so
the instruction sets themselves are asked for. The questions are private functions of torch: a version without them
counts as no.
"""

import os

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run on hardware made for them (CPU: AMX, AVX512-BF16; CUDA: Ampere on)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        questions = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(question is not None and question() for question in questions)
    return False


def is_switched_off(variable: str) -> bool:
    """Whether an environment variable that stands for some kernels is set to 0, or another word for it."""
    return os.environ.get(variable, "").lower() in ("0", "false", "no", "off")
