"""torchax, imported and set up for this project without changing anything for the rest of the process.

torchax 0.0.13 names operator overloads for named tensors (`aten.prod.dim_Dimname`, ...) that torch 2.13 no longer has,
and so fails on import. Placeholders stand in for them while it is imported. Upstream has fixed this after 0.0.13: with
a later release, delete `_MISSING_OVERLOADS` and what `torchax_module` does with it, and write `import torchax`.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_MISSING_OVERLOADS = {
    "all": ("dimname", "dimname_out"),
    "index_add": ("dimname",),
    "index_copy": ("dimname",),
    "index_copy_": ("dimname",),
    "index_fill": ("Dimname_Scalar", "Dimname_Tensor"),
    "index_fill_": ("Dimname_Scalar", "Dimname_Tensor"),
    "norm": ("names_ScalarOpt_dim", "names_ScalarOpt_dim_dtype", "names_dtype_out", "names_out"),
    "prod": ("dim_Dimname",),
    "std": ("correction_names", "correction_names_out", "names_dim", "names_out"),
    "std_mean": ("correction_names", "names_dim"),
    "unbind": ("Dimname",),
}


@functools.cache
def torchax_module() -> Any:
    """Return the torchax package, imported on first use."""
    placeholders = []
    for operator, overloads in _MISSING_OVERLOADS.items():
        packet = getattr(torch.ops.aten, operator)
        for overload in overloads:
            if overload not in packet.overloads():
                setattr(packet, overload, f"placeholder for aten.{operator}.{overload}, gone from torch")
                placeholders.append((packet, overload))
    # The import also turns off a fast path of torch.nn.MultiheadAttention for the whole process: put it back.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        import torchax
        import torchax.decompositions
        import torchax.interop
        import torchax.ops.ops_registry
        import torchax.tensor
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for packet, overload in placeholders:
            delattr(packet, overload)
    return torchax


@functools.cache
def environment() -> Any:
    """Return this project's own torchax environment, a context manager in which torch operators run on JAX arrays."""
    return torchax_module().tensor.Environment()


def torch_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a CPU tensor as a numpy array of the same dtype (bfloat16 included), without a copy where possible."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def numpy_to_torch(array: np.ndarray) -> torch.Tensor:
    """Invert `torch_to_numpy`; copies, because numpy views of JAX arrays are read-only."""
    array = np.array(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def jax_function(module: torch.nn.Module) -> Callable[..., Any]:
    """Return a pure JAX function `(weights, *args, **kwargs)` of a torch module's forward, ready for `jax.jit`.

    weights: dict of JAX arrays by parameter or buffer name. Tensors in arguments and results are JAX arrays.
    """

    def call(weights: dict[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        env = environment()
        tensors, args, kwargs = env.j2t_iso((weights, args, kwargs))
        with warnings.catch_warnings(), env, torch.no_grad(), _named_scopes(module):
            # torch's int64 positions become int32, as everything in JAX without x64: nothing here is that large.
            warnings.filterwarnings("ignore", message="Explicitly requested dtype int64")
            result = torch.func.functional_call(module, tensors, args, kwargs)
        return env.t2j_iso(result)

    return call


@contextlib.contextmanager
def _named_scopes(module: torch.nn.Module) -> Iterator[None]:
    """Run each part of the module in a `jax.named_scope` of its name within the block, for profiles."""
    entered: list[Any] = []

    def enter(name: str, *_: Any) -> None:
        entered.append(jax.named_scope(name))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    handles = []
    for name, part in module.named_modules():
        parent, _, scope = name.rpartition(".")
        if parent and isinstance(module.get_submodule(parent), torch.nn.ModuleList):  # never called, has no scope
            scope = f"{parent.rpartition('.')[2]}.{scope}"
        if scope:
            handles.append(part.register_forward_pre_hook(functools.partial(enter, scope)))
            handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
