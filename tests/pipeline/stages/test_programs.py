import jax
import pytest

from pipeline.stages.programs import model_program, model_request


@pytest.mark.parametrize("stage", ["text", "denoise", "vae"])
def test_the_published_models_programs_need_no_weights(stage: str) -> None:
    made = model_program("cogvideox1.5-5b", stage, jax.devices()[:1], None)  # type: ignore[arg-type]
    weights = made.program.arguments[0]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    expected = {"text": 4.76e9, "denoise": 5.57e9, "vae": 0.12e9}
    assert parameters == pytest.approx(expected[stage], rel=0.05)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(made.program.arguments))
    assert made.arguments["num_frames"] == 81


def test_small_chips_hold_the_weights_in_parts() -> None:
    small, large = (model_request("cogvideox1.5-5b", 8, gib * 2**30)[2] for gib in (16, 32))
    assert (small.weights, large.weights) == ("sharded", "replicated")
    assert model_request("cogvideox1.5-5b", 2, 16 * 2**30)[2].weights == "replicated"  # each prompt has one
