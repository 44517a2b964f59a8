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
    @settings.in_widget_terms
    def execute(cls, latents: Any) -> io.NodeOutput:
        return io.NodeOutput(exchange.to_native(latents))


class CogVideoXTPUFromLatent(io.ComfyNode):
    """ComfyUI's own latents -> latents of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [(io.Latent, "samples", {}), MODEL_ID, combo("dtype", settings.DTYPES, optional=True)]
        return node_schema("CogVideoXTPUFromLatent", inputs, [LatentsIO])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, samples: Any, **values: Any) -> io.NodeOutput:
        values = settings.checked_widgets(cls.define_schema(), values)
        return io.NodeOutput(exchange.from_native(samples, **values))


def _savenode_schema(node_id: str, kind: Any, name: str) -> io.Schema:
    prefix = (io.String, "filename_prefix", {"default": f"{name}/CogVideoX"})
    return node_schema(node_id, [(kind, name, {}), prefix], [], is_output_node=True)


class CogVideoXTPUSaveEmbeddings(io.ComfyNode):
    """Embeddings -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _savenode_schema("CogVideoXTPUSaveEmbeddings", EmbedsIO, "embeddings")

    @classmethod
    @settings.in_widget_terms
    def execute(cls, embeddings: Any, **values: Any) -> io.NodeOutput:
        name = exchange.save(embeddings, **settings.checked_widgets(cls.define_schema(), values))
        return io.NodeOutput(ui=host.show(cls.hidden.unique_id, name))


class CogVideoXTPUSaveLatents(io.ComfyNode):
    """Latents -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _savenode_schema("CogVideoXTPUSaveLatents", LatentsIO, "latents")

    @classmethod
    @settings.in_widget_terms
    def execute(cls, latents: Any, **values: Any) -> io.NodeOutput:
        name = exchange.save(latents, **settings.checked_widgets(cls.define_schema(), values))
        return io.NodeOutput(ui=host.show(cls.hidden.unique_id, name))


def _loadnode_schema(node_id: str, kind: Any, name: str) -> io.Schema:
    files = host.saved_files(exchange.SUFFIXES[name]) or [settings.NO_FILE]
    return node_schema(node_id, [combo("file", files)], [kind])


class CogVideoXTPULoadEmbeddings(io.ComfyNode):
    """A file -> embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _loadnode_schema("CogVideoXTPULoadEmbeddings", EmbedsIO, "embeddings")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """A file that is written anew is read anew."""
        return host.file_version(file, exchange.SUFFIXES["embeddings"])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        file = settings.checked_widgets(cls.define_schema(), values)["file"]
        return io.NodeOutput(exchange.load(file, "embeddings"))


class CogVideoXTPULoadLatents(io.ComfyNode):
    """A file -> latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _loadnode_schema("CogVideoXTPULoadLatents", LatentsIO, "latents")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """A file that is written anew is read anew."""
        return host.file_version(file, exchange.SUFFIXES["latents"])

    @classmethod
    @settings.in_widget_terms
    def execute(cls, **values: Any) -> io.NodeOutput:
        file = settings.checked_widgets(cls.define_schema(), values)["file"]
        return io.NodeOutput(exchange.load(file, "latents"))


NODES: list[type[io.ComfyNode]] = [
    CogVideoXTPUToLatent,
    CogVideoXTPUFromLatent,
    CogVideoXTPUSaveEmbeddings,
    CogVideoXTPULoadEmbeddings,
    CogVideoXTPUSaveLatents,
    CogVideoXTPULoadLatents,
]
