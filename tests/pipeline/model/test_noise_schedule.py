import math

import numpy as np
import pytest
import torch

from pipeline.model.noise_schedule import build_scheduler, guidance_scales, step_table
from pipeline.requests.errors import CheckpointError, RequestError

# CogVideoX 1.5's scheduler.
CONFIG = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.0120,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


def _model(sample, index):
    return torch.sin(3 * sample + index)


def _run_stock(scheduler, name, steps, sample, generator):
    scheduler.set_timesteps(steps)
    old = None
    for index, timestep in enumerate(scheduler.timesteps):
        output = _model(sample, index)
        if name == "dpm":
            previous = scheduler.timesteps[index - 1] if index else None
            sample, old = scheduler.step(
                output, old, timestep, previous, sample, generator=generator, return_dict=False
            )
        else:
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def _run_table(table, sample, generator):
    old = torch.zeros_like(sample)
    for index, row in enumerate(table.coefficients):
        output = _model(sample, index)
        noise = torch.zeros_like(sample)
        for _ in range(table.noise_draws[index]):
            noise = torch.randn(sample.shape, generator=generator, dtype=sample.dtype)
        x0 = row[0] * sample + row[1] * output
        sample = row[2] * sample + row[3] * x0 + row[4] * old + row[5] * noise
        old = x0
    return sample


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_table_is_the_stock_scheduler(name, steps, prediction_type):
    scheduler = build_scheduler({**CONFIG, "prediction_type": prediction_type}, name)
    table = step_table(scheduler, steps)
    sample = torch.randn(101, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = _run_stock(scheduler, name, steps, sample, torch.Generator().manual_seed(3))
    actual = _run_table(table, sample, torch.Generator().manual_seed(3))
    # Both in float64, where stock keeps its schedule in float64, too: only rounding is left.
    assert torch.allclose(actual, expected, rtol=0, atol=1e-9)
    assert np.array_equal(table.timesteps, scheduler.timesteps.numpy())


def test_noise_is_drawn_as_often_as_in_stock():
    assert step_table(build_scheduler(CONFIG, "ddim"), 4).noise_draws == (0, 0, 0, 0)
    # First and last step of DPM are first order and draw once; the others draw twice and use the second.
    assert step_table(build_scheduler(CONFIG, "dpm"), 4).noise_draws == (1, 2, 2, 1)


def test_the_checkpoint_names_its_scheduler():
    assert type(build_scheduler(CONFIG)).__name__ == "CogVideoXDDIMScheduler"
    dpm = build_scheduler({**CONFIG, "_class_name": "CogVideoXDPMScheduler"})
    assert type(dpm).__name__ == "CogVideoXDPMScheduler"
    assert dpm.config.snr_shift_scale == 1.0
    with pytest.raises(CheckpointError, match="'EulerDiscreteScheduler', expected one of"):
        build_scheduler({**CONFIG, "_class_name": "EulerDiscreteScheduler"})


def test_too_many_steps():
    with pytest.raises(RequestError, match="num_inference_steps=1001: this scheduler has at most 1000"):
        step_table(build_scheduler(CONFIG), 1001)


def test_a_schedule_that_divides_by_zero_is_refused():
    # Noise prediction cannot start at zero signal: x0 = (sample - noise) / 0.
    with pytest.raises(CheckpointError, match="step 0 is not finite"):
        step_table(build_scheduler({**CONFIG, "prediction_type": "epsilon"}), 4)


def test_guidance():
    timesteps = np.array([999, 499])
    assert guidance_scales(6.0, timesteps, False).tolist() == [6.0, 6.0]
    expected = [1 + 6.0 * (1 - math.cos(math.pi * ((2 - t) / 2) ** 5.0)) / 2 for t in timesteps.tolist()]
    assert guidance_scales(6.0, timesteps, True).tolist() == pytest.approx(expected, abs=1e-12)
