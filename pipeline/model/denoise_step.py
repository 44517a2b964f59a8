"""The denoise step as one program over a mesh: transformer on each prompt, guidance, and the scheduler's update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pipeline.model import step_options
from pipeline.model.attention import SplashAttentionProcessor, attention_function
from pipeline.model.device_share import DeviceShare
from pipeline.model.latents import TokenLayout
from pipeline.model.sharding import DP, MODEL, SEQUENCE, ParallelPlan
from pipeline.model.torchax_bridge import jax_function
from pipeline.model.transformer import TransformerShape, block, transformer
from pipeline.requests.request import AttentionOptions

_REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What one denoising step computes, see `Reuse`. blocks: whether it runs them. negative: also that prompt."""

    blocks: bool = True
    negative: bool = True

    def __str__(self) -> str:
        return ("computed" if self.blocks else "reused") + ("" if self.negative else ", positive prompt only")


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What the steps of a run keep for later ones, which may then do less. The fields say whether it is kept.

    residual: what the blocks add to their input; a step that does not run them adds it again. guidance: what the
    positive prompt's output has more than the negative's; a step without the negative prompt takes it. first_block:
    threshold; each step runs the first block, and the others only where what it adds has changed by more, relative to
    what it added in the last step that ran them, the mean of absolute values over the video's tokens.
    """

    residual: bool = False
    guidance: bool = False
    first_block: float | None = None


EVERYTHING, NOTHING = StepWork(), Reuse()


@dataclasses.dataclass(frozen=True)
class DenoiseStep:
    """One denoising step, to be compiled as `jitted` with the mesh set.

    The program takes

    - weights: as `pipeline.model.weights` makes them
    - sample: [rows, patch channels] in the weights' dtype; donated
    - old_x0: the x0 of the step before, float32 of the same shape (zeros at first); donated
    - noise: of the same shape, or a scalar 0 for schedulers without noise
    - embeddings: [2 or 1, text tokens, text_embed_dim]: negative, positive; positive alone without guidance
    - rotary: cosines and sines, see `pipeline.model.latents.rotary_rows`; for the stock block as diffusers makes them;
      None for a model without
    - timestep: int32 []; guidance_scale: float32 []; coefficients: float32 [6], a row of `StepTable`
    - conditions: name -> [rows, channels] in the weights' dtype, those of `TransformerShape.condition_channels`
    - kept: name -> array, those of `kept_arrays`, of the step before (zeros at first); donated

    and returns (sample, x0, whether all of it is finite, kept). Guidance and scheduler are computed in float32.
    """

    shape: TransformerShape
    layout: TokenLayout
    plan: ParallelPlan
    mesh: Mesh
    attention: AttentionOptions
    guided: bool
    noisy: bool = False  # whether the scheduler adds noise
    stock_block: torch.nn.Module | None = None  # a CogVideoXBlock without storage, where the plan uses it
    reuse: Reuse = NOTHING
    work: StepWork = EVERYTHING
    compiler_options: Mapping[str, str] | None = None  # on TPUs; None: those of `step_options`

    def kept_arrays(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what `reuse` keeps, without values. dtype: of the weights."""
        rows, prompts = self.layout.rows, 2 if self.guided else 1
        tokens = (prompts, rows, self.shape.num_heads * self.shape.head_dim)
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {}
        if self.reuse.residual:
            arrays["residual"] = tokens, dtype
        if self.reuse.first_block is not None:
            arrays["first_residual"] = tokens, dtype
            arrays["steps_reused"] = (), jnp.int32
        if self.reuse.guidance:
            arrays["guidance"] = (rows, self.shape.patch_channels), jnp.float32
        return {
            name: jax.ShapeDtypeStruct(shape, kind, sharding=self.sharding(name))
            for name, (shape, kind) in arrays.items()
        }

    def sharding(self, argument: str) -> NamedSharding:
        """Return the sharding of an argument of the program other than the weights."""
        return NamedSharding(self.mesh, self._spec(argument))

    def jitted(self, weights: Mapping[str, Any]) -> Any:
        """Return `program` under jit, on TPUs with its compiler options; sample, old_x0 and kept donated."""
        options = self.options(weights) or None
        return jax.jit(self.program(weights), donate_argnums=(1, 2, 10), compiler_options=options)

    def options(self, weights: Mapping[str, Any]) -> dict[str, str]:
        """Return the compiler's options, none but on TPUs; of `weights` only the dtypes count."""
        if self.mesh.devices.flat[0].platform != "tpu":
            return {}
        chosen = self.compiler_options
        return dict(chosen if chosen is not None else step_options.choose(self.call(weights)))

    def call(self, weights: Mapping[str, Any]) -> step_options.StepCall:
        """Return what the tuned compiler options of a step go by; of `weights` only the dtypes count."""
        dtypes = {jnp.dtype(weight.dtype) for weight in weights.values()}
        variant = self.attention.variant
        floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
        return step_options.StepCall(
            device_kind=self.mesh.devices.flat[0].device_kind,
            num_devices=self.mesh.devices.size,
            plan=str(self.plan),
            tokens=self.layout.tokens,
            channels=self.shape.num_heads * self.shape.head_dim,
            dtype=min(floats, key=lambda dtype: dtype.itemsize).name,
            int8_linears=jnp.dtype(jnp.int8) in dtypes,
            int8_attention="int8" in (self.attention.qk_dtype, variant.qk_dtype if variant else None),
            work=str(self.work),
        )

    def program(self, weights: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the function to be jitted with the mesh set; of `weights` only the names count."""
        if self.plan.uses_stock_block:
            return functools.partial(self._step, block=self._stock_block_step())
        attend = attention_function(self.attention)

        def attend_transposed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            # The kernel reads and writes transposed: these transposes and its own cancel in the compiler.
            q, k, v = (x.swapaxes(2, 3) for x in (q, k, v))
            return attend(q, k, v, kv_seq_len=self.layout.tokens).swapaxes(2, 3)

        share = DeviceShare(self.plan, self.layout)
        own_block = functools.partial(block, shape=self.shape, share=share, attend=attend_transposed)
        names = ("sample", "x0", "noise", "embeddings", "rotary", "scalar", "scalar", "scalar")
        conditions = {name: self._spec("condition") for name in self.shape.condition_channels}
        kept = {name: self._spec(name) for name in self.kept_arrays(jnp.float32)}
        return jax.shard_map(
            functools.partial(self._step, block=own_block),
            mesh=self.mesh,
            in_specs=(
                {name: self.plan.stacked_weight_spec(name) for name in weights},
                *map(self._spec, names),
                conditions,
                kept,
            ),
            out_specs=(self._spec("sample"), self._spec("x0"), _REPLICATED, kept),
            check_vma=False,
        )

    def _stock_block_step(self) -> Callable[..., jax.Array]:
        """Return a step of the stock block, its attention split by heads over the mesh, all else by the partitioner."""
        assert self.stock_block is not None
        over_mesh = jax.shard_map(
            attention_function(self.attention),
            mesh=self.mesh,
            in_specs=PartitionSpec(DP, MODEL),
            out_specs=PartitionSpec(DP, MODEL),
            check_vma=False,
        )
        module: Any = self.stock_block
        module.attn1.set_processor(SplashAttentionProcessor(over_mesh))
        stock = jax_function(module)

        def step(x, weights, temb, is_text, rotary):  # type: ignore[no-untyped-def]
            x = lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(DP)))
            text, video = x[:, : self.layout.text], x[:, self.layout.text :]
            temb = jnp.broadcast_to(temb, (x.shape[0], *temb.shape))
            video, text = stock(weights, video, text, temb, image_rotary_emb=rotary)
            return jnp.concatenate([text, video], axis=1)

        return step

    def _spec(self, argument: str) -> PartitionSpec:
        split = SEQUENCE if self.plan.splits_sequence else None
        rows, scalar = PartitionSpec(split), _REPLICATED
        columns, prompts = PartitionSpec(None, split), PartitionSpec(DP)
        specs = {"sample": rows, "x0": rows, "embeddings": prompts, "rotary": columns, "scalar": scalar}
        specs |= {"condition": rows, "guidance": rows}
        specs |= dict.fromkeys(("residual", "first_residual"), PartitionSpec(DP, split))
        specs["steps_reused"] = scalar
        return {**specs, "noise": rows if self.noisy else scalar}[argument]

    @jax.named_scope("denoise")
    def _step(
        self,
        weights,
        sample,
        old_x0,
        noise,
        embeddings,
        rotary,
        timestep,
        guidance_scale,
        coefficients,
        conditions,
        kept,
        *,
        block,
    ):  # type: ignore[no-untyped-def]
        share, kept = DeviceShare(self.plan, self.layout), dict(kept)
        in_shard_map = not self.plan.uses_stock_block
        prediction = transformer(
            weights,
            sample,
            embeddings,
            timestep,
            share.rotary_of_heads(rotary) if in_shard_map else rotary,
            conditions,
            shape=self.shape,
            share=share,
            block=block,
            run=functools.partial(self._run_blocks, kept, share),
        ).astype(jnp.float32)
        with jax.named_scope("guidance"):
            if self.guided and not self.work.negative:
                (positive,) = prediction
                prediction = positive + (guidance_scale - 1) * kept["guidance"]
            elif self.guided:
                if in_shard_map and self.plan.dp > 1:
                    prediction = lax.all_gather(prediction, DP, axis=0, tiled=True)
                negative, positive = prediction
                prediction = negative + guidance_scale * (positive - negative)
                if self.reuse.guidance:
                    kept["guidance"] = positive - negative
            else:
                (prediction,) = prediction
        with jax.named_scope("scheduler"):
            x0_sample, x0_model, prev_sample, prev_x0, prev_old_x0, prev_noise = coefficients
            before = sample.astype(jnp.float32)
            x0 = x0_sample * before + x0_model * prediction
            after = prev_sample * before + prev_x0 * x0 + prev_old_x0 * old_x0 + prev_noise * noise.astype(jnp.float32)
            rows = share.row_ids()[:, None]
            is_video = (rows >= self.layout.text) & (rows < self.layout.tokens)
            x0, after = (jnp.where(is_video, x, 0) for x in (x0, after))
            finite = jnp.isfinite(after).all()
            if in_shard_map and self.plan.splits_sequence:
                finite = lax.pmin(finite.astype(jnp.int32), SEQUENCE) > 0
        return after.astype(sample.dtype), x0, finite, kept

    def _run_blocks(
        self,
        kept: dict[str, jax.Array],
        share: DeviceShare,
        x: jax.Array,
        layer: Callable[..., Any],
        blocks: Mapping[str, jax.Array],
    ) -> jax.Array:
        """Return x after the blocks, run or not, as `reuse` and `work` say; changes `kept`."""

        def layers(x: jax.Array, start: int = 0, stop: int = self.shape.num_layers) -> jax.Array:
            if (start, stop) == (0, self.shape.num_layers):
                return lax.scan(layer, x, blocks)[0]

            def indexed(x: jax.Array, index: jax.Array) -> Any:  # a slice of the weights would be a copy of them
                return layer(x, jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, 0, False), blocks))

            return lax.scan(indexed, x, jnp.arange(start, stop))[0]

        if not self.reuse.residual:
            return layers(x)
        # Of prompts that are not computed the residual stays; the positive one is the last.
        prompts = slice(-x.shape[0], None)
        with jax.named_scope("reuse"):
            if self.reuse.first_block is not None:
                return self._decide_by_first_block(kept, prompts, share, x, layers)
            if not self.work.blocks:
                return x + kept["residual"][prompts]
            after = layers(x)
            kept["residual"] = kept["residual"].at[prompts].set(after - x)
            return after

    def _decide_by_first_block(
        self,
        kept: dict[str, jax.Array],
        prompts: slice,
        share: DeviceShare,
        x: jax.Array,
        layers: Callable[..., jax.Array],
    ) -> jax.Array:
        after_first = layers(x, 0, 1)
        first, old_first, residual = after_first - x, kept["first_residual"][prompts], kept["residual"][prompts]
        rows = share.row_ids()[:, None]
        is_video = (rows >= self.layout.text) & (rows < self.layout.tokens)
        changes = [
            jnp.where(is_video, jnp.abs(value.astype(jnp.float32)), 0).sum()
            for value in (first.astype(jnp.float32) - old_first.astype(jnp.float32), old_first)
        ]
        if self.plan.splits_sequence:
            changes = [lax.psum(change, SEQUENCE) for change in changes]
        if self.plan.dp > 1 and not self.plan.uses_stock_block:
            changes = [lax.psum(change, DP) for change in changes]
        change, whole = changes

        def run_others() -> tuple[jax.Array, ...]:
            after = layers(after_first, 1)
            return after, after - after_first, first

        def reuse() -> tuple[jax.Array, ...]:
            return after_first + residual, residual, old_first

        assert self.reuse.first_block is not None
        # Zeros of before the first step are no residual: no change is less than a part of nothing.
        is_same = change < self.reuse.first_block * whole
        after, residual, first = lax.cond(is_same, reuse, run_others)
        kept["steps_reused"] += is_same.astype(jnp.int32)
        kept["residual"] = kept["residual"].at[prompts].set(residual)
        kept["first_residual"] = kept["first_residual"].at[prompts].set(first)
        return after
