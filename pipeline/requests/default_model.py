"""The model where none is named. Imports no JAX, and starts it only where there may be an accelerator."""

import sys

from splash_workbench.accelerator import accelerator_visible, tpu_visible

BIG_MODEL, TINY_MODEL = "cogvideox1.5-5b", "tiny"


def default_model() -> str:
    """Return the model where none is named: the full one where JAX runs on a TPU, else the tiny one."""
    if not accelerator_visible():
        on_tpu = False  # known without starting JAX, which a mere --help should not do
    elif any(argument.startswith(("distributed.", "engine=")) for argument in sys.argv[1:]):
        on_tpu = tpu_visible()  # JAX must not start before the hosts have met, nor here where slices want the chips
    else:
        import jax

        on_tpu = jax.default_backend() == "tpu"
    return BIG_MODEL if on_tpu else TINY_MODEL
