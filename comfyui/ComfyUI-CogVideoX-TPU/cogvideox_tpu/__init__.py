"""The nodes and what they need of ComfyUI. Importing this imports neither JAX nor a model library."""  # noqa: N999 (the folder above has the name of the pack)
