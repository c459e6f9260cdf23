"""The package outside its checkout: a wheel in an environment of its own, run from another directory."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from moe_lm.kernels import allocator, native
from tests.runs import ENVIRONMENT, TINY, write_corpus

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment that holds the wheel; the dependencies are this environment's, the editable install is
    not."""
    directory = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist"]
    subprocess.run([*build, str(REPOSITORY)], cwd=directory, check=True)
    (wheel,) = (directory / "dist").glob("*.whl")
    environment = directory / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # A path file does not process the path files of the directory it adds: the editable install stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    write_corpus(directory / "elsewhere/corpus")
    return directory / "elsewhere", environment / "bin"


def test_the_wheel_works_from_another_directory(installed):
    """Catches configurations that are missing from the wheel, or a package that leans on its checkout."""
    cwd, bin_directory = installed
    where = subprocess.run(
        [bin_directory / "python", "-c", "import moe_lm.config as c; print(c.__file__, c.config_directory())"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(bin_directory.parent) in where and str(REPOSITORY) not in where
    command = [bin_directory / "moe-lm", "pretrain", *TINY, "data.paths=corpus", "trainer.max_steps=3"]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (cwd / "runs/stdlib/hf/model.safetensors").exists()


def test_the_wheel_has_the_sources_of_native_kernels(installed):
    """Catches a build that packs Python files only: an installed trainer would silently take the plain kernels."""
    _, bin_directory = installed
    (kernels,) = bin_directory.parent.glob("lib/python*/site-packages/moe_lm/kernels")
    for source in (*native.SOURCES, allocator.SOURCE):
        assert (kernels / source.name).read_bytes() == source.read_bytes()


def test_the_checkout_uses_its_own_configurations():
    """Catches a stale copy of configs/ being found before the one that is edited."""
    code = "from moe_lm.config import config_directory; print(config_directory())"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == REPOSITORY / "configs"
