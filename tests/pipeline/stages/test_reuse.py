"""Steps that reuse what earlier ones computed: against diffusers' own hooks and plain loops, resumed, and sharded."""

import dataclasses
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import torch

from helpers import compiling_in_haste
from pipeline.checkpoints.loading import STAGE_PARTS
from pipeline.checkpoints.magcache import MagnitudeRatios, own_ratios, ratios_path, write_ratios
from pipeline.model.denoise_step import DenoiseStep
from pipeline.requests.errors import RequestError
from pipeline.requests.request import AttentionOptions
from pipeline.requests.reuse import TEACACHE_COEFFICIENTS, CacheOptions
from pipeline.stages.denoise import Denoiser
from pipeline.stages.presets import base_checkpoint, settle_here
from pipeline.stages.progress import StageClock
from pipeline.stages.resume import StateFile
from pipeline.stages.step_schedule import magcache_steps, teacache_steps
from pipeline.stages.text import TextEncoder

STEPS = 8
LATENT_TOLERANCE = 2e-4  # as in test_stages
#: One a step, as of a run of eight; the products of neighbours stay near 1 in the middle.
RATIOS = (1.0, 1.3, 1.06, 1.01, 0.99, 1.02, 0.9, 0.7)
TIMESTEPS = tuple(range(999, 0, -125))  # of the checkpoint's scheduler


@pytest.fixture(scope="module", autouse=True)
def in_haste() -> Iterator[None]:
    """Compile without XLA's optimizations: a program for each way to reuse, of few and small steps."""
    with compiling_in_haste():
        yield


@pytest.fixture(scope="module")
def denoiser(checkpoint):
    return Denoiser(checkpoint, torch.float32, AttentionOptions())


@pytest.fixture(scope="module")
def embeddings(checkpoint):
    return TextEncoder(checkpoint, torch.float32).encode(["", "a red circle moves right"])


@pytest.fixture(scope="module")
def ratios(tmp_path_factory):
    path = tmp_path_factory.mktemp("ratios") / "magcache.json"
    write_ratios(path, MagnitudeRatios(TIMESTEPS, RATIOS), {})
    return path


@pytest.fixture
def cached(request_of, checkpoint, ratios):
    """Makes a request with cache options, as a run settles it."""

    def make(**options):
        if options.get("method") == "magcache":
            options.setdefault("ratios", str(ratios))
        return settle_here(request_of(num_inference_steps=STEPS, cache=CacheOptions(**options)), checkpoint)

    return make


EVERY_METHOD = {
    "teacache": {"method": "teacache", "coefficients": (1.0, 0.0), "threshold": 1.5},
    "magcache": {"method": "magcache", "threshold": 0.05, "max_reused": 2},
    "first_block": {"method": "first_block", "threshold": 1.0},
    "unconditional": {"method": "none", "unconditional_every": 2},
    "both": {"method": "magcache", "threshold": 0.05, "unconditional_every": 2},
}


def _run(denoiser, request, embeddings, progress=None, state_file=None):
    clock = StageClock("denoise", *([progress] if progress else []))
    return denoiser.denoise(request, embeddings, clock, state_file=state_file), clock.timings


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_teacache_skips_the_steps_that_the_published_loop_skips(threshold, steps, rng):
    embeddings = np.cumsum(rng.normal(size=(steps, 12)), axis=0)
    coefficients = TEACACHE_COEFFICIENTS["zai-org/CogVideoX1.5-5B"]
    expected, previous, distance = [], None, 0.0
    for count, embedding in enumerate(embeddings):  # as TeaCache4CogVideoX1.5 decides
        if count in (0, steps - 1):
            should_calculate, distance = True, 0.0
        else:
            distance += np.poly1d(coefficients)(np.abs(embedding - previous).mean() / np.abs(previous).mean())
            should_calculate = distance >= threshold
            distance = 0.0 if should_calculate else distance
        previous = embedding
        expected.append(should_calculate)
    assert teacache_steps(embeddings, coefficients, threshold) == expected
    assert expected[0] and expected[-1]


@pytest.mark.parametrize("steps", [1, 5, 8, 20])
def test_magcache_computes_often_enough(steps):
    ratios = MagnitudeRatios(TIMESTEPS, RATIOS).at(np.linspace(999, 10, steps))
    runs = magcache_steps(ratios, 0.05, 2, 0.2)
    assert len(runs) == steps and runs[0]
    assert all(any(runs[index : index + 3]) for index in range(steps - 2)), "more than max_reused in a row"
    assert all(magcache_steps(ratios, 9.0, 2, 1.0)), "first_steps=1 computes all"


def test_ratios_of_another_number_of_steps_multiply_to_the_same_magnitude():
    ratios = MagnitudeRatios(TIMESTEPS, RATIOS)
    np.testing.assert_allclose(ratios.at(np.array(TIMESTEPS)), RATIOS)
    np.testing.assert_allclose(np.prod(ratios.at(np.linspace(999, TIMESTEPS[-1], 50))), np.prod(RATIOS))
    fewer = ratios.at(np.array(TIMESTEPS[::2]))
    np.testing.assert_allclose(fewer, [1.0, 1.3 * 1.06, 1.01 * 0.99, 1.02 * 0.9])
    beyond = ratios.at(np.array([TIMESTEPS[-1], TIMESTEPS[-1] - 125 / 2]))
    np.testing.assert_allclose(beyond[1], 0.7**0.5)


@pytest.mark.compile
@pytest.mark.parametrize("method", ["magcache", "first_block"])
def test_videos_are_those_of_diffusers_hooks(method, denoiser, embeddings, cached, stock, stock_latents):
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache, apply_mag_cache
    from diffusers.hooks.mag_cache import MagCacheConfig

    options = EVERY_METHOD[method]
    request = cached(**options)
    actual, timings = _run(denoiser, request, embeddings)
    assert 0 < timings.steps_computed < STEPS, "the case is too easy"
    transformer = stock.transformer
    if method == "magcache":
        ratios = torch.tensor(RATIOS)
        config = MagCacheConfig(options["threshold"], options["max_reused"], 0.2, STEPS, ratios)
        apply_mag_cache(transformer, config)
    else:
        apply_first_block_cache(transformer, FirstBlockCacheConfig(options["threshold"]))
    # An earlier test's run left a list of its blocks' hooks, in which these are not.
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()
    expected = stock_latents(request)
    np.testing.assert_allclose(actual, expected[:, -actual.shape[1] :], rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.compile
@pytest.mark.parametrize(
    "method", [pytest.param(it, marks=pytest.mark.slow("8 s") if it == "unconditional" else []) for it in EVERY_METHOD]
)
def test_a_run_that_was_interrupted_gives_the_same_bits(method, denoiser, embeddings, cached, tmp_path):
    request = cached(**EVERY_METHOD[method])
    whole, timings = _run(denoiser, request, embeddings)
    for stop in (1, 4, 5, STEPS - 1):

        def interrupt(event, stop=stop):
            if event.step == stop:
                raise InterruptedError

        state = StateFile(tmp_path / str(stop), "x", every=0)
        with pytest.raises(InterruptedError):
            _run(denoiser, request, embeddings, interrupt, state)
        state = StateFile(tmp_path / str(stop), "x")
        resumed, again = _run(denoiser, request, embeddings, state_file=state)
        assert state.resumed_at_step == stop
        np.testing.assert_array_equal(resumed, whole)
        assert again.steps_computed == timings.steps_computed
    exact, _ = _run(denoiser, dataclasses.replace(request, cache=CacheOptions("none")), embeddings)
    assert np.abs(exact - whole).max() > 1e-3, "nothing was reused"


@pytest.fixture
def denoiser_of_users(checkpoint, monkeypatch):
    """Compiles with XLA:CPU's own choice of emitters: with the tests', a block outside the loop rounds otherwise."""

    def jitted(step, weights):
        options = {"xla_cpu_use_fusion_emitters": True}
        return jax.jit(step.program(weights), donate_argnums=(1, 2, 10), compiler_options=options)

    monkeypatch.setattr(DenoiseStep, "jitted", jitted)
    return Denoiser(checkpoint, torch.float32, AttentionOptions())


@pytest.mark.compile
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_thresholds_of_nothing_are_exact(method, denoiser_of_users, embeddings, cached):
    if method in ("unconditional", "both"):
        options = {"method": "none", "unconditional_every": 1}
    else:
        options = {**EVERY_METHOD[method], "threshold": 0.0}
    exact, _ = _run(denoiser_of_users, cached(method="none"), embeddings)
    np.testing.assert_array_equal(_run(denoiser_of_users, cached(**options), embeddings)[0], exact)


@pytest.mark.compile
def test_a_window_reuses_its_own(denoiser, embeddings, cached):
    request = dataclasses.replace(cached(**EVERY_METHOD["magcache"]), num_frames=17)
    windows = dataclasses.replace(request, context_frames=9, context_overlap=8)
    assert np.isfinite(_run(denoiser, windows, embeddings)[0]).all()


def test_presets_choose_what_the_checkpoint_allows(request_of, checkpoint, ratios):
    fast = settle_here(request_of(quality="fast", cache=CacheOptions("magcache", ratios=str(ratios))), checkpoint)
    assert (fast.cache.method, fast.cache.threshold, fast.attention.qk_dtype) == ("magcache", 0.12, None)
    kernel = AttentionOptions("pallas_interpret")
    exact = request_of(attention=kernel)
    assert settle_here(exact, checkpoint).attention == kernel
    off = request_of(quality="fastest", cache=CacheOptions("none"), attention=kernel)
    settled = settle_here(off, checkpoint)
    assert (settled.attention.qk_dtype, settled.cache.unconditional_every) == ("int8", 2)
    unguided = settle_here(dataclasses.replace(off, guidance_scale=1.0), checkpoint)
    assert unguided.cache.unconditional_every == 1
    with pytest.raises(RequestError, match=r"no ratios at .*magcache.json .*python -m pipeline.calibrate"):
        settle_here(request_of(quality="fast"), checkpoint)
    with pytest.raises(RequestError, match="cache=teacache: no polynomial is published for checkpoint="):
        settle_here(request_of(cache=CacheOptions("teacache")), checkpoint)


def test_own_ratios_of_other_weights_are_told(checkpoint, ratios, tmp_path, caplog):
    mine = dataclasses.replace(checkpoint, folder=tmp_path / "mine")
    shutil.copytree(checkpoint.folder, mine.folder)
    made = MagnitudeRatios(TIMESTEPS, RATIOS)
    write_ratios(ratios_path(mine), made, {"weights": checkpoint.identity(*STAGE_PARTS["denoise"])})
    assert own_ratios(mine) == ratios_path(mine) and not caplog.text
    write_ratios(ratios_path(mine), made, {"weights": "sha256:of-others"})
    for _ in range(2):
        assert own_ratios(mine) == ratios_path(mine)
    assert caplog.text.count("magcache.json are of other weights than are there now") == 1


@pytest.mark.parametrize("quality", ["exact", "fast", "fastest"])
def test_what_was_settled_is_not_settled_otherwise(quality, request_of, checkpoint):
    """A run's stages each settle the request anew; what the user chose beside a preset stays."""
    off = {"quantization": "none", "cache": CacheOptions("none", unconditional_every=1)}
    once = settle_here(request_of(quality=quality, attention=AttentionOptions("pallas_interpret"), **off), checkpoint)
    assert settle_here(once, checkpoint) == once and not once.int8_linears


def test_a_checkpoint_of_a_published_shape_takes_its_polynomial(checkpoint):
    from pipeline.checkpoints.loading import with_defaults
    from pipeline.checkpoints.published import PUBLISHED_CONFIGS

    for name in TEACACHE_COEFFICIENTS:
        config = with_defaults("transformer", PUBLISHED_CONFIGS[name]["transformer"])
        assert base_checkpoint("my/folder", config) == name
    assert base_checkpoint("my/folder", checkpoint.config("transformer")) == "my/folder"
