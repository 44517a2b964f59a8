"""The nodes that convert latents, and keep latents and embeddings in files."""

from typing import Any

from comfy_api.latest import io

from . import exchange, host, settings
from .schema import MODEL_ID, EmbedsIO, LatentsIO, combo, node_schema


class CogVideoXTPUToLatent(io.ComfyNode):
    """Latents -> ComfyUI's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema("CogVideoXTPUToLatent", [(LatentsIO, "latents", {})], [io.Latent])

    @classmethod
    @settings.checked_widgets
    def execute(cls, latents: Any) -> io.NodeOutput:
        return io.NodeOutput(exchange.to_native(latents))


class CogVideoXTPUFromLatent(io.ComfyNode):
    """ComfyUI's own latents -> latents of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [(io.Latent, "samples", {}), MODEL_ID, combo("dtype", settings.DTYPES, optional=True)]
        return node_schema("CogVideoXTPUFromLatent", inputs, [LatentsIO])

    @classmethod
    @settings.checked_widgets
    def execute(cls, samples: Any, model_id: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(exchange.from_native(samples, model_id, dtype))


class _SaveNode(io.ComfyNode):
    """A value -> a file. node_id: of the node; kind, name: of the value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        prefix = (io.String, "filename_prefix", {"default": f"{cls.name}/CogVideoX"})
        return node_schema(cls.node_id, [(cls.kind, cls.name, {}), prefix], [], is_output_node=True)

    @classmethod
    @settings.checked_widgets
    def execute(cls, filename_prefix: str, **value: Any) -> io.NodeOutput:
        saved = exchange.save(value[cls.name], filename_prefix)
        return io.NodeOutput(ui=host.show(cls.hidden.unique_id, saved))


class _LoadNode(io.ComfyNode):
    """A file -> a value. node_id: of the node; kind, name: of the value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = host.saved_files(exchange.SUFFIXES[cls.name]) or [settings.NO_FILE]
        return node_schema(cls.node_id, [combo("file", files)], [cls.kind])

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """A file that is written anew is read anew."""
        return host.file_version(file, exchange.SUFFIXES[cls.name])

    @classmethod
    @settings.checked_widgets
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(exchange.load(file, cls.name))


class CogVideoXTPUSaveEmbeddings(_SaveNode):
    """Embeddings -> a file."""

    node_id, kind, name = "CogVideoXTPUSaveEmbeddings", EmbedsIO, "embeddings"


class CogVideoXTPUSaveLatents(_SaveNode):
    """Latents -> a file."""

    node_id, kind, name = "CogVideoXTPUSaveLatents", LatentsIO, "latents"


class CogVideoXTPULoadEmbeddings(_LoadNode):
    """A file -> embeddings."""

    node_id, kind, name = "CogVideoXTPULoadEmbeddings", EmbedsIO, "embeddings"


class CogVideoXTPULoadLatents(_LoadNode):
    """A file -> latents."""

    node_id, kind, name = "CogVideoXTPULoadLatents", LatentsIO, "latents"


NODES: list[type[io.ComfyNode]] = [
    CogVideoXTPUToLatent,
    CogVideoXTPUFromLatent,
    CogVideoXTPUSaveEmbeddings,
    CogVideoXTPULoadEmbeddings,
    CogVideoXTPUSaveLatents,
    CogVideoXTPULoadLatents,
]
