import dataclasses

import jax
import pytest

from pipeline.stages import vae
from pipeline.stages.programs import model_program, model_request, vae_programs


@pytest.mark.parametrize("stage", ["text", "denoise", "vae"])
def test_the_published_models_programs_need_no_weights(stage: str) -> None:
    made = model_program("cogvideox1.5-5b", stage, jax.devices()[:1], None)  # type: ignore[arg-type]
    weights = made.program.arguments[0]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    expected = {"text": 4.76e9, "denoise": 5.57e9, "vae": 0.12e9}
    assert parameters == pytest.approx(expected[stage], rel=0.05)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(made.program.arguments))
    assert made.arguments["num_frames"] == 81


#: Of the transformers, as their checkpoints' files have them: positions that are learned are an argument, no weight.
PARAMETERS = {"cogvideox-2b": 1.69e9, "cogvideox-5b": 5.57e9, "cogvideox-5b-i2v": 5.57e9, "cogvideox1.5-5b-i2v": 5.57e9}
CONDITIONS = {
    "cogvideox-2b": {"positions": 1920},
    "cogvideox-5b": {},
    "cogvideox-5b-i2v": {"image": 64, "positions": 3072},
    "cogvideox1.5-5b-i2v": {"image": 128},
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_every_published_models_step_has_its_arguments(model: str) -> None:
    weights, *arguments = model_program(model, "denoise", jax.devices()[:1], None).program.arguments
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == pytest.approx(PARAMETERS[model], rel=0.02)
    assert {name: value.shape[1] for name, value in arguments[-2].items()} == CONDITIONS[model]
    assert (arguments[4] is None) == (model == "cogvideox-2b"), "rotary tables"


def test_a_video_is_encoded_in_batches() -> None:
    request, configs, _ = model_request("cogvideox-5b", 1, None)
    programs = vae_programs(dataclasses.replace(request, video="any"), configs, jax.devices()[:1])
    assert [count for _, count in programs] == [1, 5, 1, 5]
    assert [program.arguments[1].shape for program, _ in programs] == [
        *((frames, 480, 720, 3) for frames in (9, 8)),
        *((1, frames, 16, 60, 90) for frames in (3, 2)),
    ]


def test_small_chips_hold_the_weights_in_parts() -> None:
    small, large = (model_request("cogvideox1.5-5b", 8, gib * 2**30)[2] for gib in (16, 32))
    assert (small.weights, large.weights) == ("sharded", "replicated")
    assert model_request("cogvideox1.5-5b", 2, 16 * 2**30)[2].weights == "replicated"  # each prompt has one


class _Lowered:
    """Takes the options of a release of XLA that has those of `vae`, or has not, or fails."""

    def __init__(self, says: str | None) -> None:
        self.says, self.given = says, []

    def compile(self, compiler_options=None):
        self.given.append(compiler_options)
        if self.says is not None and compiler_options is not None:
            raise jax.errors.JaxRuntimeError(self.says)
        return "compiled"


def test_the_vae_is_compiled_with_the_options_for_a_cpu():
    lowered = _Lowered(None)
    assert vae._compiled(lowered) == "compiled"
    assert lowered.given == [vae._CPU_OPTIONS]


def test_the_vae_is_compiled_by_a_release_without_these_options():
    lowered = _Lowered("INVALID_ARGUMENT: No such compile option: 'xla_cpu_use_fusion_emitters'")
    assert vae._compiled(lowered) == "compiled"
    assert lowered.given == [vae._CPU_OPTIONS, None]


def test_another_error_of_the_compiler_is_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        vae._compiled(_Lowered("RESOURCE_EXHAUSTED: out of memory"))
