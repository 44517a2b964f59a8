"""The denoising steps of one request, from the first or a saved state."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pipeline.model.denoise_step import StepWork
from pipeline.model.latents import (
    from_rows,
    position_rows,
    rotary_embedding,
    rotary_rows,
    to_rows,
)
from pipeline.model.noise_schedule import build_scheduler, guidance_scales, step_table
from pipeline.model.placement import put, to_host
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.requests.errors import NonFiniteError
from pipeline.requests.media import read_latents
from pipeline.requests.request import GenerateRequest
from pipeline.stages.conditioning import image_condition, noisy_video, sample_posterior
from pipeline.stages.programs import abstract_arguments, build_step
from pipeline.stages.progress import Interrupted, StageClock, StageEvent
from pipeline.stages.resume import DenoiseState, StateFile

if TYPE_CHECKING:
    from pipeline.stages.denoise import Denoiser


class DenoiseLoop:
    """Run the steps of one request, from the first or a saved state, with the same bits; see `Denoiser.denoise`."""

    def __init__(
        self,
        denoiser: "Denoiser",
        request: GenerateRequest,
        embeddings: np.ndarray,
        clock: StageClock,
        latents: np.ndarray | None,
        state_file: StateFile | None,
        moments: np.ndarray | None,
    ):
        self._denoiser, self._clock, self._state_file = denoiser, clock, state_file
        self._windows = windows = denoiser.windows(request)
        self._geometry = geometry = windows.whole
        scheduler = build_scheduler(denoiser.configs["scheduler"], request.scheduler)
        self._table = table = step_table(scheduler, request.num_inference_steps, request.steps_left_out)
        self._schedule = schedule = denoiser.schedule(request, table.timesteps)
        self._step = step = build_step(
            denoiser.module,
            windows.seen,
            embeddings.shape[1],
            denoiser.plan,
            denoiser.devices,
            attention=denoiser.attention,
            guided=request.do_classifier_free_guidance,
            noisy=table.needs_noise,
            reuse=schedule.reuse,
        )
        rotary = rotary_embedding(windows.seen, denoiser.configs["transformer"])
        tables = rotary if step.plan.uses_stock_block or rotary is None else rotary_rows(rotary, step.layout)
        placed = None if tables is None else tuple(put(each, step.sharding("rotary")) for each in tables)
        self._rotary = placed
        prompts = {work.negative for work in schedule.steps}
        #: By whether a step has the negative prompt.
        self._embeddings = {
            negative: put(embeddings if negative else embeddings[-1:], step.sharding("embeddings"))
            for negative in prompts
        }
        self._guidance = guidance_scales(request.guidance_scale, table.timesteps, request.use_dynamic_cfg)
        self._dtype = getattr(torch, request.dtype)
        self._generator = torch.Generator().manual_seed(request.seed)
        encoded = None if moments is None else sample_posterior(moments, self._generator, self._dtype)
        self._conditions = self._place_conditions(encoded)
        saved = None
        if state_file is not None:
            attention = denoiser.describe_attention(request, embeddings.shape[1])
            of_work = {work: dataclasses.replace(step, work=work) for work in schedule.kinds}
            state_file.depends_on(
                attention={name: attention[name] for name in ("implementation", "block_sizes", "variant")},
                options={str(work): each.options(denoiser.weights) for work, each in of_work.items()},
            )
            saved = state_file.load()
        if saved is not None:
            self._generator.set_state(torch.from_numpy(saved.generator))
            clock.timings.step_times_s[:] = saved.step_times_s
            clock.timings.run_time_s += sum(saved.step_times_s)
            self._start, sample, x0 = saved.step, saved.sample, saved.x0
        else:
            if latents is None:
                # As diffusers' pipeline draws it on the CPU for the same seed, dtype and shape.
                if request.latents is not None:
                    noise = read_latents(request.latents, geometry.shape).to(self._dtype)
                else:
                    noise = torch.randn(geometry.shape, generator=self._generator, dtype=self._dtype)
                if encoded is not None and "image" not in self._conditions:
                    noise = noisy_video(encoded, noise, geometry, denoiser.configs["vae"], scheduler, table.timesteps)
                latents = torch_to_numpy(noise * table.init_noise_sigma)
            self._start, sample, x0 = 0, latents, np.zeros(geometry.shape, np.float32)
        #: What steps left for the next, of each window.
        self._kept = self._place_kept(saved.kept if saved is not None else {})
        #: The sample and x0: rows on the devices; with several windows, latents on the host.
        self._state: list[Any] = [sample, x0] if windows.several else self._place_state(sample, x0)

    def _place_state(self, sample: np.ndarray, x0: np.ndarray) -> list[jax.Array]:
        named = (("sample", sample), ("x0", x0))
        return [put(self._to_rows(value), self._step.sharding(name)) for name, value in named]

    def _place_kept(self, saved: Mapping[str, np.ndarray]) -> list[dict[str, jax.Array]]:
        """Place what a saved state has of `DenoiseStep.kept_arrays`; zeros for what it has not."""
        shapes = self._step.kept_arrays(jnp.dtype(str(self._dtype).removeprefix("torch.")))
        return [
            {
                name: put(np.asarray(saved[key]), like.sharding)
                if (key := f"{window}.{name}") in saved
                else jax.jit(functools.partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding)()
                for name, like in shapes.items()
            }
            for window in range(len(self._windows.starts))
        ]

    def _place_conditions(self, encoded: torch.Tensor | None) -> dict[str, jax.Array]:
        """Place the arguments of `TransformerShape.condition_channels`. encoded: latents of the image or video."""
        step, configs, values = self._step, self._denoiser.configs, {}
        if "image" in step.shape.condition_channels:
            assert encoded is not None, "checked before: an image-to-video model has an image"
            values["image"] = self._to_rows(torch_to_numpy(image_condition(encoded, self._geometry, configs["vae"])))
        if "positions" in step.shape.condition_channels:
            learned = self._denoiser.positions
            values["positions"] = position_rows(self._windows.seen, configs["transformer"], step.layout, learned)
        dtype = jnp.dtype(str(self._dtype).removeprefix("torch."))
        return {name: put(value.astype(dtype), step.sharding("condition")) for name, value in values.items()}

    def run(self) -> np.ndarray:
        """Run the steps that are left; return latents without padding frames."""
        total = len(self._table.timesteps)
        programs = self._compile()
        with self._clock.measure("run"):
            self._clock.start(total, self._tell)
            for index in range(self._start, total):
                if not self._advance(programs[self._schedule.steps[index]], self._arguments(index)):
                    raise NonFiniteError(
                        f"denoise: step {index + 1} of {total}: the latents hold NaN or infinity; "
                        "try dtype=float32 or a lower guidance_scale; else the checkpoint's weights are damaged"
                    )
                self._clock.tick(functools.partial(self._video_latents, self._state[1]))
        if self._schedule.reuse.residual:
            decided = sum(int(to_host(kept["steps_reused"])) for kept in self._kept if "steps_reused" in kept)
            self._clock.timings.steps_computed = self._schedule.steps_computed - decided // len(self._kept)
        return self._video_latents(self._state[0])

    def kept(self, name: str) -> jax.Array:
        """Return one of `DenoiseStep.kept_arrays` as the last step left it; of the first window."""
        return self._kept[0][name]

    @property
    def timesteps(self) -> np.ndarray:
        """Return what the model is told, int64 [steps]."""
        return self._table.timesteps

    @property
    def video_rows(self) -> slice:
        """Return where the video's tokens lie among rows."""
        return slice(self._step.layout.text, self._step.layout.tokens)

    def _compile(self) -> dict[StepWork, Any]:
        """Return the program of each kind of step, compiled before the first is run."""
        config = self._denoiser.configs["transformer"]
        dtype = jnp.dtype(str(self._dtype).removeprefix("torch."))
        programs = {}
        for work in self._schedule.kinds:
            step = dataclasses.replace(self._step, work=work)
            programs[work] = self._denoiser.program(step, abstract_arguments(step, config, dtype), self._clock)
        return programs

    def _advance(self, program: Any, arguments: list[tuple[Any, ...]]) -> bool:
        """Run a step, on each window; empties `arguments`, which are donated. Returns whether all of it is finite."""
        results = []
        while arguments:
            results.append(program(self._denoiser.weights, *arguments.pop(0)))
        self._kept = [result[3] for result in results]
        if not self._windows.several:
            self._state = list(results[0][:2])
        else:
            layout, seen = self._step.layout, self._windows.seen
            for index, before in enumerate(self._state):
                parts = [from_rows(to_host(result[index]), seen, layout) for result in results]
                self._state[index] = self._windows.blend(parts).astype(before.dtype)
        return all(bool(result[2]) for result in results)

    def _arguments(self, index: int) -> list[tuple[Any, ...]]:
        """Return what the program takes after the weights, for each window; draws the step's noise."""
        step, table, cut = self._step, self._table, self._windows.cut
        embeddings = self._embeddings[self._schedule.steps[index].negative]
        noise = self._noise(index)
        scalars = (
            np.asarray(table.timesteps[index], np.int32),
            np.asarray(self._guidance[index], np.float32),
            table.coefficients[index].astype(np.float32),
        )
        states = [self._state]
        if self._windows.several:
            states = [self._place_state(*parts) for parts in zip(*map(cut, self._state), strict=True)]
        noises = [self._to_rows(part) for part in cut(noise)] if noise.ndim else [noise] * len(states)
        return [
            (
                *state,
                put(part, step.sharding("noise")),
                embeddings,
                self._rotary,
                *(put(scalar, step.sharding("scalar")) for scalar in scalars),
                self._conditions,
                kept,
            )
            for state, part, kept in zip(states, noises, self._kept, strict=True)
        ]

    def _noise(self, index: int) -> np.ndarray:
        if not self._table.needs_noise:
            return np.zeros((), np.float32)
        noise = torch.zeros(self._geometry.shape, dtype=self._dtype)
        for _ in range(self._table.noise_draws[index]):
            noise = torch.randn(self._geometry.shape, generator=self._generator, dtype=self._dtype)
        return torch_to_numpy(noise)

    def _tell(self, event: StageEvent) -> None:
        """Pass on a step's event, and save its state. Called within the clock's tick, which counts none of it."""
        file, new = self._state_file, event.step > self._start
        due = new and file is not None and file.due(event.step, self._clock.timings.step_times_s)
        if due:
            self._save(event.step)
        try:
            self._clock.progress(event if event.step else dataclasses.replace(event, step=self._start))
        except BaseException as error:
            # Fetching takes all processes, and others may not be interrupted, or at another step.
            together = jax.process_count() == 1 or (isinstance(error, Interrupted) and error.everywhere)
            if new and file is not None and not due and together:
                self._save(event.step)
            raise

    def _save(self, steps_done: int) -> None:
        assert self._state_file is not None
        sample, x0 = map(self._latents, self._state)
        generator = self._generator.get_state().numpy().copy()
        reads = steps_done < len(self._schedule.steps) and self._schedule.needs_kept[steps_done]
        kept = {
            f"{window}.{name}": to_host(value)
            for window, arrays in enumerate(self._kept if reads else [])
            for name, value in arrays.items()
        }
        times = self._clock.timings.step_times_s
        self._state_file.save(DenoiseState(steps_done, sample, x0, generator, times, kept))

    def _to_rows(self, latents: np.ndarray) -> np.ndarray:
        return to_rows(latents, self._windows.seen, self._step.layout)

    def _latents(self, state: Any) -> np.ndarray:
        return state if self._windows.several else from_rows(to_host(state), self._geometry, self._step.layout)

    def _video_latents(self, state: Any) -> np.ndarray:
        return self._latents(state)[:, self._geometry.padding_frames :]
