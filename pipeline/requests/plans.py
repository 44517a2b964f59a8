"""Parallel plans: how the denoise step is laid out over the devices of a mesh ("dp", "model").

The negative and the positive prompt (classifier-free guidance) go to the "dp" axis, each transformer pass to "model":

- ulysses: the joint sequence is split; an all-to-all before and one after attention trade sequence for heads
  (DeepSpeed-Ulysses, arXiv:2309.14509). Weights are whole on every device, or split at rest and gathered by layer.
- megatron: q, k, v and the up projection are split by columns, the output and down projections by rows; two all-reduces
  a layer (Megatron-LM, arXiv:1909.08053). Norms and gates run on the whole sequence on every device.
- seed_tp: the weight table of the published CogVideoX TPU nodes, over the stock diffusers block; XLA's partitioner
  decides the rest. For comparison.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pipeline.requests.errors import RequestError

DP, MODEL = "dp", "model"
Plan = Literal["ulysses", "megatron", "seed_tp"]
PlanChoice = Literal["auto", "ulysses", "megatron", "seed_tp"]
WeightsAtRest = Literal["replicated", "sharded"]
Rules = Mapping[str, tuple[str | None, ...]]

#: The published table (README of ComfyUI-CogVideoX-TPU, TRANSFORMER_SHARDINGS_TP), with its axis "tp" named "model".
#: A torch weight is [out, in]: q, k and v are split along what they contract. The rule for ff.net.0 matches nothing,
#: since the parameter is ff.net.0.proj.weight, which every device holds whole. Reproduced as published. Of that the
#: partitioner makes, a layer (compiled for v6e-8, with or without the scan): all-reduces of q, k and v, one all-gather
#: of [tokens, channels], and an all-reduce of the up projection's [tokens, 4 channels], the most costly of them.
SEED_RULES: Rules = {
    r".*\.to_q\.weight$": (None, MODEL),
    r".*\.to_k\.weight$": (None, MODEL),
    r".*\.to_v\.weight$": (None, MODEL),
    r".*\.to_out.*\.weight$": (MODEL, None),
    r".*\.ff\.net\.0\.weight$": (None, MODEL),
    r".*\.ff\.net\.2\.weight$": (MODEL, None),
}
MEGATRON_RULES: Rules = {
    r".*\.to_[qkv]\.(weight|bias)$": (MODEL,),
    r".*\.to_out\.0\.weight$": (None, MODEL),
    r".*\.ff\.net\.0\.proj\.(weight|bias)$": (MODEL,),
    r".*\.ff\.net\.2\.weight$": (None, MODEL),
}
#: Weights at rest: every matrix of the blocks by its rows.
SHARDED_RULES: Rules = {r"transformer_blocks\..*(linear|to_[qkv]|to_out\.0|proj|ff\.net\.2)\.weight$": (MODEL,)}


@dataclasses.dataclass(frozen=True)
class ParallelOptions:
    """What the user asks for.

    plan: see the module; "auto" is ulysses, the fastest as predicted for v6e. num_devices: None, all there are. dp: 2,
    1, or None: 2 with guidance on an even number of devices. weights: at rest; "sharded" is for ulysses only. Raises
    RequestError.
    """

    plan: PlanChoice = "auto"
    num_devices: int | None = None
    dp: int | None = None
    weights: WeightsAtRest = "replicated"

    def __post_init__(self) -> None:
        for name, choices in (("plan", PlanChoice), ("weights", WeightsAtRest)):
            if getattr(self, name) not in get_args(choices):
                raise RequestError(
                    f"parallel.{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(choices))}"
                )
        if self.dp not in (None, 1, 2):
            raise RequestError(f"parallel.dp={self.dp!r}: expected 1, or 2 (one for each prompt of guidance), or null")
        if self.num_devices is not None and self.num_devices < 1:
            raise RequestError(f"parallel.num_devices={self.num_devices!r}: expected 1 or more, or null for all")
        if self.weights == "sharded" and self.plan not in ("auto", "ulysses"):
            raise RequestError(
                f"parallel.weights='sharded': only with parallel.plan=ulysses; {self.plan} splits them anyway"
            )


@dataclasses.dataclass(frozen=True)
class ParallelPlan:
    """A plan for a number of devices: `dp` times `model` of them."""

    plan: Plan
    dp: int
    model: int
    weights: WeightsAtRest = "replicated"

    @property
    def num_devices(self) -> int:
        return self.dp * self.model

    @property
    def splits_sequence(self) -> bool:
        return self.plan == "ulysses"

    @property
    def rules(self) -> Rules:
        if self.plan == "ulysses":
            return SHARDED_RULES if self.weights == "sharded" else {}
        return SEED_RULES if self.plan == "seed_tp" else MEGATRON_RULES

    def weight_spec(self, name: str) -> tuple[str | None, ...]:
        """Mesh axes of the leading dimensions of one stock weight, by its name in the checkpoint."""
        for pattern, axes in self.rules.items():
            if re.match(pattern, name):
                return axes
        return ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        at_rest = "" if self.plan != "ulysses" else f", weights {self.weights}"
        return f"{self.plan} dp={self.dp} x model={self.model}{at_rest}"


def resolve_plan(options: ParallelOptions, num_devices: int, guided: bool, num_heads: int) -> ParallelPlan:
    """The plan for the devices there are.

    Raises RequestError when there are fewer devices than asked for, or when they or the heads do not divide.
    """
    wanted = options.num_devices or num_devices
    if wanted > num_devices:
        raise RequestError(f"parallel.num_devices={wanted}: only {num_devices} are here")
    dp = options.dp or (2 if guided and wanted % 2 == 0 else 1)
    if dp == 2 and not guided:
        raise RequestError("parallel.dp=2: without guidance there is one prompt only; expected parallel.dp=1")
    if wanted % dp:
        raise RequestError(f"parallel.dp={dp}: does not divide {wanted} devices")
    model = wanted // dp
    if num_heads % model:
        raise RequestError(
            f"parallel.num_devices={wanted}: {model} devices a prompt do not divide {num_heads} heads; "
            f"expected {dp} x one of {', '.join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)}"
        )
    return ParallelPlan("ulysses" if options.plan == "auto" else options.plan, dp, model, options.weights)


def build_mesh(plan: ParallelPlan, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh ("dp", "model") over the first devices, each half of "dp" on neighbouring chips where these tell."""
    return Mesh(np.array(devices[: plan.num_devices]).reshape(plan.dp, plan.model), (DP, MODEL))


def weight_partition(plan: ParallelPlan, name: str) -> PartitionSpec:
    """Return the PartitionSpec of a weight of `model.weights`, where blocks' weights have a leading axis of layers."""
    axes = plan.weight_spec(name)
    return PartitionSpec(None, *axes) if name.startswith("transformer_blocks.") else PartitionSpec(*axes)
