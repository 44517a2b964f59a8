"""What the nodes' schemas have in common. What they say to users is in locales/en/nodeDefs.json."""

import json
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import settings

_TEXTS = json.loads(Path(__file__).parents[1].joinpath("locales", "en", "nodeDefs.json").read_text(encoding="utf-8"))

EmbedsIO = io.Custom("COGVIDEOX_EMBEDS")
LatentsIO = io.Custom("COGVIDEOX_LATENTS")
#: A model by its id.
MODEL_ID = (io.String, "model_id", {"default": settings.DEFAULT_MODEL})


def node_schema(node_id: str, inputs: list[Any], outputs: list[Any], **keywords: Any) -> io.Schema:
    """Return a schema with the node's texts. inputs, outputs: (type, id, keywords) and types."""
    texts = _TEXTS[node_id]
    return io.Schema(
        node_id=node_id,
        display_name=texts["display_name"],
        category="CogVideoX TPU",
        description=texts["description"],
        inputs=[kind.Input(name, tooltip=texts["inputs"][name]["tooltip"], **more) for kind, name, more in inputs],
        outputs=[
            kind.Output(
                display_name=texts["outputs"][str(index)]["name"], tooltip=texts["outputs"][str(index)]["tooltip"]
            )
            for index, kind in enumerate(outputs)
        ],
        hidden=[io.Hidden.unique_id],
        **keywords,
    )


def combo(name: str, options: Any, **keywords: Any) -> tuple[Any, str, dict[str, Any]]:
    """Describe a choice; its default is the first option."""
    return io.Combo, name, {"options": list(options), "default": next(iter(options)), **keywords}
