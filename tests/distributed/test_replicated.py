"""Two real processes over gloo against one: the same run."""

import socket
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from tests.runs import TINY, final_tensors, metrics, moe_lm, write_corpus

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONFIGURATIONS = Path(__file__).parents[2] / "scripts/accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / "cpu2.yaml")]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    directory = tmp_path_factory.mktemp("replicated")
    write_corpus(directory / "corpus")
    options = [
        "pretrain",
        *TINY,
        "data.paths=[corpus]",
        "optimizer=adamw",
        "trainer.max_steps=6",
        "finish.export=false",
    ]
    moe_lm(*options, "run_name=single", cwd=directory)
    return directory, options


def test_two_ranks_give_the_single_process_run(single):
    """Catches gradients averaged instead of summed, counts of one rank only, ranks that see the same rows, or weights
    that drift apart: losses of every step within fp32 rounding, weights after six steps, validation."""
    directory, options = single
    sizes = ["trainer.micro_batch_size=3"]  # two micro-batches on each rank, against one of twelve rows
    moe_lm(*options, *sizes, "run_name=double", cwd=directory, launcher=TORCHRUN)
    one, two = directory / "runs/single", directory / "runs/double"
    assert sorted(metrics(two)) == [1, 2, 3, 4, 5, 6]
    for name, tolerance in (("loss", 2e-6), ("load_balancing_loss", 1e-5), ("gradient_norm", 1e-4)):
        ours, theirs = metrics(two, name), metrics(one, name)
        assert ours == pytest.approx(theirs, rel=tolerance), name
    bits = "validation_bits_per_byte"
    assert metrics(two, bits) == pytest.approx(metrics(one, bits), rel=1e-5)
    weights, expected = final_tensors(two), final_tensors(one)
    assert weights.keys() == expected.keys()
    for name in weights:
        if name.startswith("model/"):
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_run_goes_on_with_another_number_of_processes(single):
    """Catches data order or state that depends on the number of processes: six steps on one, then on two."""
    directory, options = single
    longer = [*options, "trainer.max_steps=8", "schedule.name=constant", "checkpoint.interval=4"]
    moe_lm(*longer, "run_name=elastic", "trainer.micro_batch_size=6", cwd=directory)
    whole = metrics(directory / "runs/elastic")
    checkpoints = directory / "runs/elastic/checkpoints"
    for file in sorted((checkpoints / "step-00000008").iterdir()):
        file.unlink()
    (checkpoints / "step-00000008").rmdir()
    (directory / "runs/elastic/state.json").unlink()
    done = moe_lm(*longer, "run_name=elastic", "trainer.micro_batch_size=6", cwd=directory, launcher=TORCHRUN)
    assert "resumed" in done.stdout and "step 4 of 8" in done.stdout
    assert metrics(directory / "runs/elastic") == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("mode", ["replicated", "fsdp_ep"])
def test_accelerate_launch_gives_the_same_run(single, mode):
    """Catches a launcher under which every rank takes itself for the main one (its figures come out twice, or differ),
    and a checked-in configuration that starts one process."""
    directory, options = single
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [*ACCELERATE, "--main_process_port", str(port)]
    sizes = [f"run_name=launched-{mode}", f"parallel={mode}", "trainer.micro_batch_size=6"]
    done = moe_lm(*options, *sizes, cwd=directory, launcher=launcher)
    assert done.stdout.count("parameters,") == 1 and "2 x cpu" in done.stdout
    assert metrics(directory / f"runs/launched-{mode}") == pytest.approx(metrics(directory / "runs/single"), rel=2e-6)


@pytest.mark.parametrize(("name", "machines", "processes"), [("cpu2", 1, 2), ("gpu8", 1, 8), ("gpu4x8", 4, 32)])
def test_the_configurations_of_accelerate_can_be_read(name, machines, processes):
    """Catches a key that accelerate does not know: it refuses the file then, on a cluster, at night."""
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)


def test_bad_input_ends_on_every_process(single):
    """Catches a mistake that only the main process meets, and peers that wait for it or die with a traceback."""
    directory, options = single
    (directory / "small").mkdir()
    (directory / "small/a.txt").write_text("too little")
    wrong = ["data.paths=small", "run_name=wrong", "trainer.micro_batch_size=6"]
    done = moe_lm(*options, *wrong, cwd=directory, launcher=TORCHRUN, check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("moe-lm")]
    # The launcher may end one process before it has spoken; whoever speaks says the same, and nobody shows a traceback.
    assert {line.split(":")[0] for line in ours} <= {"moe-lm", "moe-lm (rank 1)"}
    assert len({line.partition(": ")[2] for line in ours}) == 1 and "tokenizer.vocab_size" in ours[0]
    assert done.returncode != 0 and "moe_lm/parallel" not in done.stderr
    assert not (directory / "runs/wrong").exists()
