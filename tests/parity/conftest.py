"""Kernels with and without what the machine has, and the same random numbers for every test."""

from typing import Any

import pytest

from moe_lm.kernels import gemm, native
from tests.kernels import Kernels


@pytest.fixture(params=["plain", "native", "amx"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Every implementation that this machine has; a test that asks for it runs with each."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no compiler, or MOE_LM_NATIVE=0")
    if request.param == "amx" and not native.has_amx():
        pytest.skip("no AMX")
    if request.param != "amx":
        monkeypatch.setattr(native, "has_amx", lambda: False)
    chosen, run = Kernels(request.param, []), native.run

    def recorded(name: str, *arguments: Any) -> int:
        chosen.calls.append(name)
        return run(name, *arguments)

    monkeypatch.setattr(native, "run", recorded)
    monkeypatch.setattr(gemm, "pays", lambda: False)  # else what runs would be another thing on other processors
    return chosen
