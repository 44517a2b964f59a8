"""`splash_workbench.accelerator`, in processes of its own: it acts on the environment before JAX starts."""

import subprocess
import sys

import pytest

from helpers import PLENTY_S

PROBE = """
import os, sys
os.environ.pop("JAX_PLATFORMS", None)
for name in ("TPU_NAME", "COLAB_TPU_ADDR"):
    os.environ.pop(name, None)
{before}
import importlib.util
import splash_workbench.accelerator as platform
platform.glob.glob = lambda pattern: {files}
platform.importlib.util.find_spec = lambda name: {libtpu}
print(platform.quiet_jax_without_accelerator(), os.environ.get("JAX_PLATFORMS"), platform.accelerator_visible())
{after}
"""


def _probe(before="", files="[]", libtpu="object()", after="") -> list[str]:
    code = PROBE.format(before=before, files=files, libtpu=libtpu, after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PLENTY_S)
    assert done.stderr == ""
    return done.stdout.split()


def test_libtpu_without_a_device_means_cpu():
    assert _probe(after="import jax; print(jax.default_backend())") == ["True", "cpu", "False", "cpu"]


@pytest.mark.parametrize("pattern", ["/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*"])
def test_a_device_file_leaves_the_choice_to_jax(pattern):
    assert _probe(files=f"[1] if pattern == {pattern!r} else []") == ["False", "None", "True"]


def test_a_named_tpu_leaves_the_choice_to_jax():
    assert _probe(before='os.environ["TPU_NAME"] = "local"') == ["False", "None", "True"]


def test_what_the_user_chose_stays():
    assert _probe(before='os.environ["JAX_PLATFORMS"] = "cuda,cpu"')[:2] == ["False", "cuda,cpu"]
    assert _probe(before='import jax; jax.config.update("jax_platforms", "cpu")')[:2] == ["False", "None"]


def test_without_libtpu_there_is_nothing_to_quieten():
    assert _probe(libtpu="None")[:2] == ["False", "None"]
