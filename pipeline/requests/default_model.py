"""The model where none is named. Imports no JAX, and starts it only where there may be an accelerator."""

import sys

from splash_workbench.accelerator import accelerator_visible, tpu_visible

BIG_MODEL, TINY_MODEL = "cogvideox1.5-5b", "tiny"


def default_model() -> str:
    """Return the model where none is named: the full one where JAX runs on a TPU, else the tiny one."""
    return BIG_MODEL if _default_backend() == "tpu" else TINY_MODEL


def _default_backend() -> str:
    if not accelerator_visible():
        return "cpu"  # known without starting JAX, which a mere --help should not do
    if any(argument.startswith(("distributed.", "engine=")) for argument in sys.argv[1:]):
        # JAX must not start before the hosts have met, and not here where slices want the chips.
        return "tpu" if tpu_visible() else "cpu"
    import jax

    return jax.default_backend()
