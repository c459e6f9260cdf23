"""How long `moe-lm pretrain` takes to its first step when tokenizer and shards are there, and where the seconds go.

    python scripts/benchmark_startup.py [OPTION=VALUE …]

Prepares the default experiment's text, then starts a run on it twice: once against the clock, once under Python's
import profile. Options are the run's.
"""

import argparse
import collections
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moe_lm.config import load
from moe_lm.errors import InputError

MOE_LM = ["-m", "moe_lm"]
IMPORT = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*([\w.]+)")
SHOWN = 10
"""Packages in the table."""


RUN = ["data=prepared", "data.paths=[prepared]", "trainer.max_steps=2", "finish.export=false"]
RUN += ["finish.compare_compressors=false"]


def main(options: list[str]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        subprocess.run([sys.executable, *MOE_LM, "prepare", "output=prepared"], cwd=place, check=True)
        run = ["pretrain", *RUN, *options]
        for moment, seconds in moments(place, [*run, "run_name=clock"]):
            print(f"{seconds:5.1f} s  {moment}")
        print("\nimports, by package, without what each imports itself:")
        for package, seconds in imports(place, [*run, "run_name=profile"]).most_common(SHOWN):
            print(f"{seconds:5.2f} s  {package}")


def moments(place: Path, arguments: list[str]) -> list[tuple[str, float]]:
    """Seconds from the start of the process to what it says."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *MOE_LM, *arguments], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        seconds = time.perf_counter() - begin
        if "ready after" in line:
            found.append((f"ready to train ({line.split('; ')[-1].strip()} of them behind the imports)", seconds))
        elif line.startswith("step 1/"):
            found.append(("the first step is done", seconds))
            break
    process.kill()
    process.wait()
    return found


def imports(place: Path, arguments: list[str]) -> "collections.Counter[str]":
    """Seconds that a run spends importing, by top-level package."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *MOE_LM, *arguments], cwd=place, capture_output=True, text=True, check=True
    )
    total: collections.Counter[str] = collections.Counter()
    for match in IMPORT.finditer(done.stderr):
        total[match[2].split(".")[0]] += int(match[1]) / 1e6
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("options", nargs="*", help="of the run, as `moe-lm pretrain` takes them")
    given = parser.parse_args()
    try:
        load("pretrain", [*RUN, *given.options])
    except InputError as error:
        parser.error(str(error))
    main(given.options)
