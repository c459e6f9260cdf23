"""What reliability costs: the stall of a save, the guards' share of a step, and the speed of verifying a checkpoint.

    python scripts/benchmark_reliability.py [OPTION=VALUE ...]

The default experiment's model trains some steps, with a checkpoint at every fourth. The stall of each save is held
against a plain copy of the same tensors, made just before it or just after, in turn; the guards' share is their
functions' own time under Python's profiler, with all that they call.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path

from moe_lm.checkpoint.checkpoint import Checkpoint
from moe_lm.config import load as load_config
from moe_lm.data.prepare import prepare
from moe_lm.data.prepared import load as load_data
from moe_lm.parallel.runtime import Runtime
from moe_lm.training.loop import train
from moe_lm.training.run import Run
from moe_lm.training.state import saved_slices
from moe_lm.training.watchdog import Watchdog

STEPS = 40
GUARDS = ("guards.py", "requests.py", "interrupts.py", "watchdog.py")


def main(options: list[str]) -> None:
    """Train, and print what was measured."""
    with tempfile.TemporaryDirectory() as directory:
        of_all = [f"output_dir={directory}", f"trainer.max_steps={STEPS}", "trainer.eval_interval=0"]
        config = load_config("pretrain", [*of_all, "checkpoint.interval=4", *options])
        path = Path(directory) / "run"
        prepare(config.data, config.tokenizer, path, report=print, progress=lambda done, total: None)
        run = Run(config, Runtime(), load_data(config.data, config.tokenizer, path), path)
        run.store.open()
        stalls = watch_saves(run)
        profile = cProfile.Profile()
        begin = time.perf_counter()
        with Watchdog(1800, print) as watchdog:
            profile.runcall(train, run, watchdog.beat)
        seconds = time.perf_counter() - begin
        print_stalls(stalls)
        print_guards(profile, seconds)
        print_verification(run.store.paths()[-1])


def watch_saves(run: Run) -> list[tuple[float, float]]:
    """Let each save be measured: seconds that it held training, and that a plain copy of its tensors took."""
    stalls: list[tuple[float, float]] = []
    save = run.save

    def copy() -> float:
        begin = time.perf_counter()
        copies = [part.data.detach().clone() for part in saved_slices(run.optimizer, run.load_LE, True)]
        seconds = time.perf_counter() - begin
        del copies
        return seconds

    def measured(feed, pulse) -> None:  # type: ignore[no-untyped-def]
        first = len(stalls) % 2 == 0
        copied = copy() if first else 0.0
        begin = time.perf_counter()
        save(feed, pulse)
        stall = time.perf_counter() - begin
        stalls.append((stall, copied if first else copy()))

    run.save = measured  # type: ignore[method-assign]
    return stalls


def print_stalls(stalls: list[tuple[float, float]]) -> None:
    """Compare saves with copies."""
    stall, copied = (statistics.median(values) for values in zip(*stalls))
    ratios = sorted(a / b for a, b in stalls)
    print(
        f"a save holds training for {1000 * stall:.0f} ms, a copy of its tensors takes {1000 * copied:.0f} ms (medians "
        f"of {len(stalls)}); ratio {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )


def print_guards(profile: cProfile.Profile, seconds: float) -> None:
    """Time of what is called from the loop into the guards' files, calls among them counted once."""
    statistics_of = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    spent = 0.0
    for (file, _, _), (_, _, _, _, callers) in statistics_of.items():
        if Path(file).name in GUARDS:
            outside = [times for caller, times in callers.items() if Path(caller[0]).name not in GUARDS]
            spent += sum(cumulative for _, _, _, cumulative in outside)
    share = f"{spent / seconds:.4%}"
    print(f"guards (spikes, requests, signals, watchdog): {1000 * spent / STEPS:.3f} ms a step, {share} of the time")


def print_verification(path: Path) -> None:
    """Open a checkpoint some times."""
    rates = []
    for _ in range(5):
        begin = time.perf_counter()
        size = Checkpoint(path).num_bytes
        rates.append(size / (time.perf_counter() - begin) / 1e6)
    print(f"verifying a checkpoint of {size / 1e6:.0f} MB: {statistics.median(rates):,.0f} MB/s on one core")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("options", nargs="*", help="of the run, as `moe-lm pretrain` takes them")
    main(parser.parse_args().options)
