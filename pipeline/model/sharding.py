"""Sharding plans: how weights and activations of the denoise step are split over a mesh ("dp", "model", "kv").

The negative and the positive prompt (classifier-free guidance) go to the "dp" axis, each transformer pass to the
others, of which "kv" is 1 in all plans but one:

- ulysses: the joint sequence is split; an all-to-all before and one after attention trade sequence for heads
  (DeepSpeed-Ulysses, arXiv:2309.14509). Weights are whole on every device, or split at rest and gathered by layer.
  Where devices do not divide the heads, a few heads are computed twice: 32 for the 30 of CogVideoX-2b on 4 devices.
- ulysses_allgather: for more devices than divide the heads. "model" is the largest part of them that does, and as in
  ulysses; over "kv" keys and values are gathered, as in the context parallelism of Llama 3 (arXiv:2407.21783), and each
  device attends with its part of the queries to all keys. A ring (USP, arXiv:2405.07719) would move the same bytes and
  have partial results to add up.
- megatron: q, k, v and the up projection are split by columns, the output and down projections by rows; two all-reduces
  a layer (Megatron-LM, arXiv:1909.08053). Norms and gates run on the whole sequence on every device.
- seed_tp: the weight table of the published CogVideoX TPU nodes, over the stock diffusers block; XLA's partitioner
  decides the rest. For comparison.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pipeline.requests.errors import RequestError
from pipeline.requests.options import ParallelOptions, Plan, WeightsAtRest

DP, MODEL, KV = "dp", "model", "kv"
#: The axes that split rows, in the order of the rows: the all-to-all joins neighbouring ones.
SEQUENCE = (KV, MODEL)
_MOST_REPEATED = 1 / 8  # of the heads, beyond which a number of devices is refused
Rules = Mapping[str, tuple[str | None, ...]]
_BY_SEQUENCE: tuple[Plan, ...] = ("ulysses", "ulysses_allgather")

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
    r".*\.to_[qkv]\.(weight|bias|weight_scale)$": (MODEL,),
    r".*\.to_out\.0\.weight$": (None, MODEL),
    r".*\.ff\.net\.0\.proj\.(weight|bias|weight_scale)$": (MODEL,),
    r".*\.ff\.net\.2\.weight$": (None, MODEL),
    r".*\.ff\.net\.2\.smoothing$": (MODEL,),
}
#: Weights at rest: every matrix of the blocks by its rows.
SHARDED_RULES: Rules = {r"transformer_blocks\..*(linear|to_[qkv]|to_out\.0|proj|ff\.net\.2)\.weight$": (MODEL,)}


@dataclasses.dataclass(frozen=True)
class ParallelPlan:
    """A plan for dp * model * kv devices: where weights and activations lie, and what devices exchange."""

    plan: Plan
    dp: int
    model: int
    weights: WeightsAtRest = "replicated"
    kv: int = 1

    @property
    def num_devices(self) -> int:
        return self.dp * self.model * self.kv

    @property
    def splits_sequence(self) -> bool:
        """Return whether each device of a prompt holds a part of the tokens, outside attention."""
        return self.plan in _BY_SEQUENCE

    @property
    def sums_partial_products(self) -> bool:
        """Return whether devices hold parts of a contraction, whose products are summed."""
        return self.plan == "megatron" and self.model > 1

    @property
    def gathers_weights(self) -> bool:
        """Return whether a layer's weights are split at rest, and gathered before use."""
        return self.weights == "sharded" and self.model > 1

    @property
    def uses_stock_block(self) -> bool:
        """Return whether blocks are diffusers' own on whole arrays, split by XLA's partitioner; else ours."""
        return self.plan == "seed_tp"

    @property
    def sequence_shards(self) -> int:
        return self.model * self.kv if self.splits_sequence else 1

    def local_heads(self, num_heads: int) -> int:
        """Return the heads that each device of "model" attends with."""
        return -(-num_heads // self.model)

    def weight_spec(self, name: str) -> tuple[str | None, ...]:
        """Return the mesh axes of the leading dimensions of one stock weight, by its name in the checkpoint."""
        sharded = SHARDED_RULES if self.weights == "sharded" else {}
        rules = {"megatron": MEGATRON_RULES, "seed_tp": SEED_RULES}.get(self.plan, sharded)
        return next((axes for pattern, axes in rules.items() if re.match(pattern, name)), ())

    def stacked_weight_spec(self, name: str) -> PartitionSpec:
        """Return the PartitionSpec of a weight of `model.weights`, where blocks' have a leading axis of layers."""
        axes = self.weight_spec(name)
        return PartitionSpec(None, *axes) if name.startswith("transformer_blocks.") else PartitionSpec(*axes)

    def mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        """Return the mesh ("dp", "model", "kv") over the first devices.

        Each half of "dp" is on neighbouring chips, and in it those of "kv", between which the most bytes go.
        """
        shape = (self.dp, self.model, self.kv)
        return Mesh(np.array(devices[: self.num_devices]).reshape(shape), (DP, MODEL, KV))

    def __str__(self) -> str:
        at_rest = f", weights {self.weights}" if self.splits_sequence else ""
        kv = f" x kv={self.kv}" if self.kv > 1 else ""
        return f"{self.plan} dp={self.dp} x model={self.model}{kv}{at_rest}"


def resolve_plan(parallel: ParallelOptions, num_devices: int, guided: bool, num_heads: int) -> ParallelPlan:
    """Return the plan for `num_devices` devices and a transformer of `num_heads` heads.

    Raises RequestError when there are fewer devices than asked for, or when they or the heads do not divide.
    """
    wanted = parallel.num_devices or num_devices
    if wanted > num_devices:
        raise RequestError(f"parallel.num_devices={wanted}: only {num_devices} are here")
    dp = parallel.dp or (2 if guided and wanted % 2 == 0 else 1)
    if dp == 2 and not guided:
        raise RequestError("parallel.dp=2: without guidance there is one prompt only; expected parallel.dp=1")
    if wanted % dp:
        raise RequestError(f"parallel.dp={dp}: does not divide {wanted} devices")
    choice = "ulysses" if parallel.plan == "auto" else parallel.plan
    plan = ParallelPlan(choice, dp, wanted // dp, parallel.weights)
    if parallel.plan == "ulysses_allgather" or (parallel.plan == "auto" and not _heads_fit(plan, num_heads)):
        plan = _with_gathered_keys(plan, num_heads)
    if not _heads_fit(plan, num_heads):
        divisors = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise RequestError(
            f"parallel.num_devices={wanted}: {plan.model} devices a prompt do not divide {num_heads} heads; "
            f"expected {dp} x one of {divisors}, or parallel=ulysses_allgather"
        )
    if plan.weights == "sharded" and plan.kv > plan.model == 1:
        raise RequestError(
            f"parallel.weights='sharded': {plan.kv} devices a prompt share no heads, nor would they weights; "
            "expected 'replicated', or another parallel.num_devices"
        )
    return plan


def _with_gathered_keys(plan: ParallelPlan, num_heads: int) -> ParallelPlan:
    """Return the plan for as many devices whose "model" is the most that heads fit, the rest of them in "kv"."""
    devices = plan.model * plan.kv
    sizes = (n for n in range(devices, 0, -1) if devices % n == 0)
    plans = (dataclasses.replace(plan, plan="ulysses_allgather", model=n, kv=devices // n) for n in sizes)
    return next(each for each in plans if _heads_fit(each, num_heads))


def check_quantization(quantization: str | None, plan: ParallelPlan) -> None:
    """Raise RequestError for a plan that cannot take quantized weights."""
    if quantization == "int8" and plan.uses_stock_block:
        raise RequestError(
            f"quantization={quantization} and parallel={plan.plan}: its block is diffusers' own, in dtype only; "
            "expected parallel=ulysses, ulysses_sharded, ulysses_allgather or megatron"
        )


def _heads_fit(plan: ParallelPlan, num_heads: int) -> bool:
    """Return whether heads divide over the devices, or nearly so under a plan that can compute some twice."""
    most = num_heads * (1 + _MOST_REPEATED) if plan.splits_sequence else num_heads
    return num_heads <= plan.local_heads(num_heads) * plan.model <= most
