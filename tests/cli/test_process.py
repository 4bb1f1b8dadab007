"""Commands that compute ask glibc for huge pages."""

import os
import platform
import subprocess
import sys

import pytest

from seqjax.cli._process import THP, TUNABLE, with_huge_pages

GLIBC = platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split(".")[:2])) >= (2, 35)
PROGRAM = """
import resource
import jax, jax.numpy as jnp

step = jax.jit(lambda x: jnp.sin(x) + x.T)
x = jnp.ones((3000, 3000))  # 34 MiB: always above the size that glibc gives back
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
before = faults()
for _ in range(4):
    step(x).block_until_ready()
print(faults() - before)
"""


@pytest.fixture
def madvise(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return tmp_path / "enabled"


@pytest.mark.skipif(not GLIBC, reason="glibc 2.35 or later")
def test_only_commands_that_compute_and_only_where_it_helps(madvise, tmp_path):
    assert with_huge_pages(["train", "x"], {"A": "1"}, madvise) == {"A": "1", "GLIBC_TUNABLES": TUNABLE}
    other = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2"}
    assert with_huge_pages(["bench"], other, madvise) == {"GLIBC_TUNABLES": f"glibc.cpu.hwcaps=-AVX2:{TUNABLE}"}
    assert with_huge_pages(["train"], {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, madvise) is None
    for command in ([], ["prepare"], ["--help"]):
        assert with_huge_pages(command, {}, madvise) is None
    madvise.write_text("[always] madvise never\n")
    assert with_huge_pages(["train"], {}, madvise) is None
    assert with_huge_pages(["train"], {}, tmp_path / "missing") is None


@pytest.mark.skipif(not GLIBC or not THP.exists() or "[madvise]" not in THP.read_text(), reason="no such huge pages")
def test_huge_pages_spare_page_faults():
    environment = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}

    def faults(environment):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
        )
        return int(run.stdout)

    assert faults(with_huge_pages(["train"], environment)) * 10 < faults(environment)


@pytest.mark.skipif(not GLIBC, reason="glibc 2.35 or later")
@pytest.mark.parametrize("arguments", [["bench", "ops", "--lengths", "x"], ["evaluate"]])
def test_the_restarted_command_keeps_its_arguments_and_exit_code(arguments):
    run = subprocess.run([sys.executable, "-W", "ignore", "-m", "seqjax", *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and arguments[-1] in run.stdout + run.stderr
