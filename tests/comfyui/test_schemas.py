"""Schemas against the published nodes, against `pipeline`'s limits, and against the pack's texts and metadata."""

import asyncio
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

from offline_tpu.machine.devices import DEVICES
from pipeline.requests import limits, request, reuse
from pipeline.requests.models import MODEL_FIELDS, MODELS
from pipeline.requests.options import PlanChoice, WeightsAtRest
from splash_attn.types import QkDtype, Softmax
from splash_workbench.provenance import CONFIG_DIR

# The published nodes: inputs (name, type, default) in order, None where there is no default; outputs' types.
PUBLISHED = {
    "CogVideoXTextEncoder": (
        [
            ("prompt", "STRING", None),
            ("negative_prompt", "STRING", ""),
            ("model_id", "STRING", "zai-org/CogVideoX1.5-5B"),
        ],
        ["COGVIDEOX_EMBEDS"],
    ),
    "CogVideoXTPUSampler": (
        [
            ("embeddings", "COGVIDEOX_EMBEDS", None),
            ("height", "INT", 720),
            ("width", "INT", 1280),
            ("num_frames", "INT", 81),
            ("num_inference_steps", "INT", 50),
            ("guidance_scale", "FLOAT", 6.0),
            ("seed", "INT", 42),
            ("num_devices", "INT", 8),
        ],
        ["COGVIDEOX_LATENTS"],
    ),
    # Published with fps as an INT, also as an output, which Create Video (FLOAT) refuses.
    "CogVideoXTPUVAEDecoder": ([("latents", "COGVIDEOX_LATENTS", None), ("fps", "FLOAT", 16)], ["IMAGE", "FLOAT"]),
}
NODES = [
    *PUBLISHED,
    *("CogVideoXTPUInfo", "CogVideoXTPUModel", "CogVideoXTPUImage", "CogVideoXTPUVideo", "CogVideoXTPULora"),
    *("CogVideoXTPUToLatent", "CogVideoXTPUFromLatent"),
    *("CogVideoXTPUSaveEmbeddings", "CogVideoXTPULoadEmbeddings", "CogVideoXTPUSaveLatents", "CogVideoXTPULoadLatents"),
]


@pytest.mark.parametrize("node", PUBLISHED)
def test_published_inputs_and_outputs(schemas: dict[str, Any], node: str) -> None:
    inputs, outputs = PUBLISHED[node]
    schema = schemas[node]
    required = [slot for slot in schema.inputs if not slot.get("optional")]
    assert [(slot.id, slot.io_type) for slot in required] == [(name, io_type) for name, io_type, _ in inputs]
    for slot, (name, _, default) in zip(required, inputs, strict=True):
        assert default is None or slot.get("default") == default, name
    assert schema.inputs[: len(required)] == required, "what is new comes after, so that positions stay"
    assert [slot.io_type for slot in schema.outputs] == outputs


def test_extension_lists_the_nodes(_loaded: Any, nodes: dict[str, Any]) -> None:
    extension = asyncio.run(_loaded[0].comfy_entrypoint())
    assert asyncio.run(extension.get_node_list()) == list(nodes.values())
    assert list(nodes) == NODES


def test_a_keyword_of_a_newer_comfyui_is_refused(stub: Any, schemas: dict[str, Any]) -> None:
    io = sys.modules["comfy_api.latest"].io
    with pytest.raises(TypeError, match="advanced"):
        io.Int.Input("height", default=1, advanced=True)
    with pytest.raises(TypeError, match="search_aliases"):
        io.Schema(node_id="x", display_name="x", search_aliases=["y"])


def test_limits_and_choices_are_the_pipelines(part: Any, schemas: dict[str, Any]) -> None:
    settings, info = part("settings"), part("info")
    slots = {slot.id: slot for schema in schemas.values() for slot in schema.inputs}
    for side in ("height", "width"):
        assert (slots[side].get("step"), slots[side].get("max")) == (limits.SIZE_MULTIPLE, limits.MAX_SIDE)
        assert slots[side].get("min") % limits.SIZE_MULTIPLE == 0
    assert (slots["num_frames"].get("step"), slots["num_frames"].get("min") % 8) == (limits.FRAME_MULTIPLE, 1)
    for name in ("frames", "fps", "guidance", "steps"):
        slot = next(slot for key, slot in slots.items() if name in key)
        assert slot.get("max") == getattr(limits, f"MAX_{name.upper()}")
    assert slots["fps"].get("step") == 0.001, "23.976"
    assert get_args(request.Scheduler) == settings.SCHEDULERS
    assert get_args(reuse.Quality) == settings.QUALITIES
    for name, fields in settings.CACHES.items():  # as the command line's group has them
        file = CONFIG_DIR / "cache" / f"{name.replace(' ', '_')}.yaml"
        given = {key: value for key, value in OmegaConf.load(file).items() if key != "defaults" and value is not None}
        assert {key: given[key] for key in fields} == fields and (name == "by quality" or set(given) == set(fields)), (
            name
        )
    assert {path.stem for path in (CONFIG_DIR / "cache").glob("*.yaml")} == {
        name.replace(" ", "_") for name in settings.CACHES
    }
    assert set(settings.DTYPES) - {"auto"} == set(get_args(request.Dtype))
    assert {plan for plan, _ in settings.PARALLEL_PLANS.values()} == set(get_args(PlanChoice))
    assert {weights for _, weights in settings.PARALLEL_PLANS.values()} == set(get_args(WeightsAtRest))
    implementations, softmaxes, qk_dtypes = zip(*settings.KERNELS.values(), strict=True)
    assert set(implementations) == {None, *get_args(request.Implementation)}
    assert set(softmaxes) == {None, *get_args(Softmax)}
    assert set(qk_dtypes) == {None, "int8"} and "int8" in get_args(QkDtype)
    assert set(info.DEVICE_KINDS) == {spec.device_kind for spec in DEVICES.values()}


def test_defaults_are_the_full_models(part: Any, schemas: dict[str, Any]) -> None:
    model = MODELS["cogvideox1.5-5b"]
    assert model.checkpoint == part("settings").DEFAULT_MODEL
    assert {*part("settings").PUBLISHED, *part("settings").TINY_MODELS} == {each.checkpoint for each in MODELS.values()}
    slots = {
        slot.id: slot for name in ("CogVideoXTPUSampler", "CogVideoXTPUVAEDecoder") for slot in schemas[name].inputs
    }
    for name in set(MODEL_FIELDS) & set(slots):
        assert slots[name].get("default") == getattr(model, name), name


@pytest.mark.parametrize("node", NODES)
def test_defaults_lie_within_limits(schemas: dict[str, Any], node: str) -> None:
    for slot in schemas[node].inputs:
        default = slot.get("default")
        assert not slot.is_widget or default is not None, slot.id
        if slot.io_type in ("INT", "FLOAT"):
            assert slot.get("min") <= default <= slot.get("max"), slot.id
        if slot.io_type == "COMBO":
            assert default in slot.get("options"), slot.id
        assert slot.get("tooltip"), slot.id


def test_english_texts_are_the_schemas(pack_dir: Path, schemas: dict[str, Any]) -> None:
    assert json.loads((pack_dir / "locales" / "en" / "nodeDefs.json").read_text()) == {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {slot.id: {"name": slot.id, "tooltip": slot.get("tooltip")} for slot in schema.inputs},
            "outputs": {
                str(index): {"name": slot.get("display_name"), "tooltip": slot.get("tooltip")}
                for index, slot in enumerate(schema.outputs)
            },
        }
        for name, schema in schemas.items()
    }


def _keys(texts: Any) -> Any:
    return {name: _keys(value) for name, value in texts.items()} if isinstance(texts, dict) else bool(texts)


def test_chinese_texts_are_complete(pack_dir: Path) -> None:
    english, chinese = (
        json.loads((pack_dir / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for language in ("en", "zh")
    )
    assert _keys(chinese) == _keys(english)
    assert all(re.search(r"[\u4e00-\u9fff]", node["description"]) for node in chinese.values())


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node", NODES)
def test_help_page_tells_of_every_input_and_output(
    pack_dir: Path, schemas: dict[str, Any], node: str, language: str
) -> None:
    page = (pack_dir / "web" / "docs" / node / f"{language}.md").read_text(encoding="utf-8")
    for slot in schemas[node].inputs:
        default = f"`{json.dumps(slot.get('default'))}`" if slot.get("default") not in (None, "") else ""
        (line,) = [line for line in page.splitlines() if line.startswith(f"- `{slot.id}`")]
        assert slot.io_type in line and default.lower() in line.lower(), line
        assert language != "en" or slot.get("tooltip") in line
    for slot in schemas[node].outputs:
        assert f"- `{slot.get('display_name')}`" in page
    assert not re.search(r"^\|", page, re.MULTILINE), "the panel cuts a table at its width"


def test_metadata(pack_dir: Path, stub: Any) -> None:
    project = tomllib.loads((pack_dir / "pyproject.toml").read_text())
    root = tomllib.loads((pack_dir.parents[1] / "pyproject.toml").read_text())["project"]
    assert project["project"]["version"] == root["version"]
    assert project["project"]["license"] == root["license"]
    comfy = project["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert comfy["requires-comfyui"] == f">={stub.COMFYUI_VERSION}"
    assert (pack_dir / comfy["Icon"]).is_file()
    requirements = {
        line for line in (pack_dir / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
    }
    assert requirements == set(project["project"]["dependencies"])
    assert requirements <= set(root["dependencies"]), "the same pins as the package itself"
