"""Looks for an accelerator in device files and environment, before JAX starts a backend."""

import glob
import importlib.util
import os
import sys

_TPU_DEVICE_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_TPU_VARIABLES = ("TPU_NAME", "COLAB_TPU_ADDR")  # set where the chips are reached without a local device file
_GPU_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # CUDA, ROCm, CUDA under WSL


def accelerator_visible() -> bool:
    """Return whether files or variables of a TPU or a GPU are seen, without touching a device or importing JAX."""
    return tpu_visible() or any(map(glob.glob, _GPU_DEVICE_FILES))


def tpu_visible() -> bool:
    """Return whether files or variables of a TPU are seen, without touching a device or importing JAX."""
    return any(os.environ.get(name) for name in _TPU_VARIABLES) or any(map(glob.glob, _TPU_DEVICE_FILES))


def quiet_jax_without_accelerator() -> bool:
    """Choose JAX's CPU backend where libtpu is installed but there is no accelerator for it to find. Returns whether.

    Otherwise JAX, when it starts its backends, loads libtpu, which searches for chips and prints errors. Entry points
    call this before they use JAX; child processes inherit it. What the user chose (JAX_PLATFORMS) is respected.
    """
    jax = sys.modules.get("jax")
    if os.environ.get("JAX_PLATFORMS") or (jax is not None and jax.config.jax_platforms):
        return False
    if importlib.util.find_spec("libtpu") is None or accelerator_visible():
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if jax is not None:  # it has read its environment already
        jax.config.update("jax_platforms", "cpu")
    return True
