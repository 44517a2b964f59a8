"""ComfyUI nodes: CogVideoX 1.5 text to video on TPU. What they do is in the packages `pipeline` and `splash_attn`."""  # noqa: N999 (the folder's name is the pack's)

from comfy_api.latest import ComfyExtension, io

from .cogvideox_tpu.nodes import NODES

WEB_DIRECTORY = "./web"  # the nodes' help pages


class CogVideoXExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CogVideoXExtension:
    """Called by ComfyUI when it loads the pack."""
    return CogVideoXExtension()
