"""The example workflows against the schemas: positions of widget values, links, and what they run."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.checkpoints.shapes import BACKGROUND_GREYS, COLOURS, parse_caption
from pipeline.requests.models import MODEL_FIELDS, MODELS

TEXT = ["CogVideoXTextEncoder", "CogVideoXTPUSampler", "CogVideoXTPUVAEDecoder", "CreateVideo", "SaveVideo"]
DRAWN = ["EmptyImage", "EmptyImage", "ImageCompositeMasked", "CogVideoXTPUImage"]
#: Template -> the nodes in it, in their order.
NODES = {
    "cogvideox_t2v_720p": TEXT,
    "cogvideox_t2v_tiny": TEXT,
    "cogvideox_lora_tiny": [TEXT[0], "CogVideoXTPULora", *TEXT[1:]],
    "cogvideox_i2v_tiny": [TEXT[0], *DRAWN, *TEXT[1:]],
}
NAMES = tuple(NODES)
# ComfyUI's own nodes, as of 0.3.64: inputs (name, type, is it a widget), outputs.
BUILTIN = {
    "CreateVideo": (
        [("images", "IMAGE", False), ("audio", "AUDIO", False), ("fps", "FLOAT", True)],
        ["VIDEO"],
    ),
    "EmptyImage": ([(name, "INT", True) for name in ("width", "height", "batch_size", "color")], ["IMAGE"]),
    "ImageCompositeMasked": (
        [
            ("destination", "IMAGE", False),
            ("source", "IMAGE", False),
            ("mask", "MASK", False),
            ("x", "INT", True),
            ("y", "INT", True),
            ("resize_source", "BOOLEAN", True),
        ],
        ["IMAGE"],
    ),
    "SaveVideo": (
        [
            ("video", "VIDEO", False),
            ("filename_prefix", "STRING", True),
            ("format", "COMBO", True),
            ("codec", "COMBO", True),
        ],
        [],
    ),
}
_OPTIONAL = {"audio", "mask"}
_PYTHON = {"INT": int, "FLOAT": (int, float), "STRING": str, "COMBO": str, "BOOLEAN": bool}


def check_workflow(workflow: dict[str, Any], schemas: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Raises AssertionError unless ComfyUI reads this UI workflow as it is meant. Returns widget values by node."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link[1:] for link in workflow["links"]}
    outputs, values = {}, {}
    for node in nodes.values():
        kind = node["type"]
        if kind in schemas:
            schema = schemas[kind]
            inputs = {slot.id: slot for slot in schema.inputs}
            names = [(slot.id, slot.io_type, slot.is_widget) for slot in schema.inputs]
            outputs[node["id"]] = [slot.io_type for slot in schema.outputs]
            optional = {slot.id for slot in schema.inputs if slot.get("optional")}
        else:
            inputs = {}
            names, outputs[node["id"]] = BUILTIN[kind]
            optional = _OPTIONAL
        declared = [(slot["name"], slot["type"], "widget" in slot) for slot in node["inputs"]]
        assert declared == names, kind
        for slot in node["inputs"]:
            assert "widget" in slot or slot["link"] is not None or slot["name"] in optional, (kind, slot["name"])
        positions = []
        for name, io_type, is_widget in names:
            if is_widget:
                positions.append((name, io_type))
                if name in inputs and inputs[name].get("control_after_generate"):
                    positions.append((f"{name}: control_after_generate", "CONTROL"))
        given = node["widgets_values"]
        assert len(given) == len(positions), f"{kind}: {len(given)} values, expected {[name for name, _ in positions]}"
        for value, (name, io_type) in zip(given, positions, strict=True):
            if io_type == "CONTROL":
                assert value in ("fixed", "increment", "decrement", "randomize"), (kind, name, value)
                continue
            assert isinstance(value, _PYTHON[io_type]), (kind, name, value)
            slot = inputs.get(name)
            if slot is not None and io_type == "COMBO":
                assert value in slot.get("options"), (kind, name, value)
            if slot is not None and io_type in ("INT", "FLOAT"):
                assert slot.get("min") <= value <= slot.get("max"), (kind, name, value)
        values[kind] = {name: value for value, (name, _) in zip(given, positions, strict=True)}
    for link, (origin, origin_slot, target, target_slot, io_type) in links.items():
        assert outputs[origin][origin_slot] == io_type, link
        slot = nodes[target]["inputs"][target_slot]
        assert (slot["type"], slot["link"]) == (io_type, link)
        assert link in nodes[origin]["outputs"][origin_slot]["links"]
    used = {slot["link"] for node in nodes.values() for slot in node["inputs"]} - {None}
    assert used == set(links)
    return values


def load(pack_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((pack_dir / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_workflow_fits_the_schemas(pack_dir: Path, schemas: dict[str, Any], name: str) -> None:
    workflow = load(pack_dir, name)
    check_workflow(workflow, schemas)
    assert [node["type"] for node in workflow["nodes"]] == NODES[name]


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(pack_dir: Path, name: str) -> None:
    """ComfyUI's frontend asks for the template's name with .jpg."""
    with Image.open(pack_dir / "example_workflows" / f"{name}.jpg") as picture:
        assert picture.format == "JPEG" and picture.width >= 384
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 100, "not blank"


@pytest.mark.parametrize("name", NAMES)
def test_nodes_have_room_to_grow(pack_dir: Path, name: str) -> None:
    """Progress texts, previews and videos make a node longer: nodes stand beside one another, never under."""
    placed = sorted((*node["pos"], *node["size"]) for node in load(pack_dir, name)["nodes"])
    for (x, _, width, _), (next_x, *_) in itertools.pairwise(placed):
        assert x + width + 20 <= next_x


def test_no_other_workflows(pack_dir: Path) -> None:
    assert sorted(path.stem for path in (pack_dir / "example_workflows").glob("*.json")) == sorted(NAMES)


def test_720p_workflow_has_the_published_values(pack_dir: Path, schemas: dict[str, Any]) -> None:
    values = check_workflow(load(pack_dir, "cogvideox_t2v_720p"), schemas)
    sampler = values["CogVideoXTPUSampler"]
    for slot in schemas["CogVideoXTPUSampler"].inputs:
        assert slot.id == "embeddings" or sampler[slot.id] == slot.get("default"), slot.id
    assert values["CogVideoXTextEncoder"]["model_id"] == "zai-org/CogVideoX1.5-5B"
    assert values["CogVideoXTPUVAEDecoder"]["fps"] == 16


@pytest.mark.parametrize(
    ("name", "model"),
    [("cogvideox_t2v_tiny", "tiny"), ("cogvideox_lora_tiny", "tiny"), ("cogvideox_i2v_tiny", "tiny-i2v")],
)
def test_tiny_workflows_run_on_one_device_without_a_download(
    pack_dir: Path, schemas: dict[str, Any], name: str, model: str
) -> None:
    values = check_workflow(load(pack_dir, name), schemas)
    assert values["CogVideoXTextEncoder"]["model_id"] == model
    assert values["CogVideoXTPUSampler"]["num_devices"] == 1
    assert values["CogVideoXTPUVAEDecoder"]["fps"] == MODELS[model].fps
    for field in set(MODEL_FIELDS) & set(values["CogVideoXTPUSampler"]):
        assert values["CogVideoXTPUSampler"][field] == getattr(MODELS[model], field), field


def test_the_image_template_draws_what_its_prompt_names(pack_dir: Path, schemas: dict[str, Any]) -> None:
    """By ComfyUI's own nodes, so that nothing needs to be uploaded: a red square on grey, as the model knows them."""
    workflow = load(pack_dir, "cogvideox_i2v_tiny")
    assert parse_caption(workflow["nodes"][0]["widgets_values"][0])["shape"] == "square"
    ground, square, (x, y, resize) = (node["widgets_values"] for node in workflow["nodes"][1:4])
    assert ground[:2] == [MODELS["tiny-i2v"].width, MODELS["tiny-i2v"].height] and not resize
    assert tuple(square[3].to_bytes(3)) == COLOURS["red"] and square[0] == square[1]
    grey = ground[3].to_bytes(3)
    assert len(set(grey)) == 1 and BACKGROUND_GREYS[0] <= grey[0] <= BACKGROUND_GREYS[1]
    assert 0 < x < x + square[0] < ground[0] and 0 < y < y + square[1] < ground[1]


def _drop_control(workflow: dict[str, Any]) -> None:
    workflow["nodes"][1]["widgets_values"].remove("randomize")  # the published workflow's mistake


def _wrong_option(workflow: dict[str, Any]) -> None:
    workflow["nodes"][1]["widgets_values"][-4] = "euler"


def _int_to_float(workflow: dict[str, Any]) -> None:
    workflow["links"][3][-1] = "INT"


def _unlinked(workflow: dict[str, Any]) -> None:
    workflow["nodes"][2]["inputs"][0]["link"] = None


@pytest.mark.parametrize("spoil", [_drop_control, _wrong_option, _int_to_float, _unlinked])
def test_the_check_notices(pack_dir: Path, schemas: dict[str, Any], spoil: Any) -> None:
    workflow = copy.deepcopy(load(pack_dir, NAMES[0]))
    spoil(workflow)
    with pytest.raises(AssertionError):
        check_workflow(workflow, schemas)
