"""Shared by all tests: one thread, Triton's interpreter without a GPU, and the directory of outside data."""

import os
from pathlib import Path

# Tests use tiny shapes, where a second thread only waits; when cores are shared, it waits for milliseconds at every
# barrier.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch

torch.set_num_threads(1)
# Before anything imports Triton, which reads it once. On a GPU the same tests run what is compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for every test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def outside_data() -> Path:
    """The directory of real texts named by MOE_LM_TEST_DATA; tests that want it are skipped where it is not set."""
    directory = os.environ.get("MOE_LM_TEST_DATA")
    if not directory:
        pytest.skip("MOE_LM_TEST_DATA is not set")
    return Path(directory)
