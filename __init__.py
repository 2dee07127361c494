"""LineAR for ComfyUI: autoregressive images that keep only a few lines of the key-value cache."""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    try:
        from .nodes import LineARExtension
    except Exception:
        # ComfyUI logs one line without the place; without the place nobody can help.
        logging.getLogger(__name__).exception("LineAR could not be loaded:")
        raise
    return LineARExtension()
