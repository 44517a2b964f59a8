"""Every way to ask for a model gives the same request: Python, command line, batch file, ComfyUI's widgets."""

import dataclasses
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pipeline.requests.batch_file import read_entries
from pipeline.requests.config import GenerateConfig
from pipeline.requests.models import MODEL_FIELDS, MODELS, model_defaults
from pipeline.requests.request import GenerateRequest, to_request
from splash_workbench.provenance import CONFIG_DIR


def _command_line(*arguments: str) -> GenerateConfig:
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
    OmegaConf.register_new_resolver("default_model", lambda: "tiny", replace=True)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_object(compose("generate", overrides=["prompt=x", *arguments]))


def _line(folder: Path, config: GenerateConfig, **fields) -> GenerateRequest:
    (folder / "lines").write_text(json.dumps({"prompt": "x", **fields}))
    return read_entries(folder / "lines", config)[0].request


def test_every_model_has_its_name_on_the_command_line():
    assert {path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")} == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_way_gives_the_same_request(model, tmp_path):
    checkpoint = MODELS[model].checkpoint
    expected = GenerateRequest("x", checkpoint)
    for name in MODEL_FIELDS:
        assert getattr(expected, name) == getattr(MODELS[model], name)
    by_model, by_checkpoint = _command_line(f"model={model}"), _command_line(f"checkpoint={checkpoint}")
    assert to_request(by_model) == to_request(by_checkpoint) == expected
    assert to_request(GenerateConfig(prompt="x", checkpoint=checkpoint)) == expected
    assert _line(tmp_path, by_model) == _line(tmp_path, _command_line("model=tiny"), checkpoint=checkpoint) == expected


def test_a_folder_takes_the_defaults_of_the_model_that_is_named(tmp_path):
    request = to_request(_command_line("model=cogvideox1.5-5b", "checkpoint=a/folder", "num_frames=9"))
    full = dataclasses.asdict(GenerateRequest("x", "zai-org/CogVideoX1.5-5B"))
    assert dataclasses.asdict(request) == {**full, "checkpoint": "a/folder", "num_frames": 9}
    assert GenerateRequest("x", "a/folder").guidance_scale == MODELS["tiny"].guidance_scale


def test_guidance_of_the_models():
    assert MODELS["tiny"].guidance_scale == 1.5
    assert {defaults.guidance_scale for name, defaults in MODELS.items() if "tiny" not in name} == {6.0}


def test_the_hubs_former_ids_have_the_same_defaults():
    assert model_defaults("THUDM/CogVideoX-5b-I2V") == MODELS["cogvideox-5b-i2v"]
