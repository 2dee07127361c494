"""All calls into ComfyUI: folders, devices, memory, progress. No other file here imports comfy or the server."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.model_patcher as model_patcher
import comfy.ops
import comfy.utils
import comfyui_version
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api import feature_flags
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import BinaryEventTypes, PromptServer
from torch import Tensor, nn

from ..linear_core.errors import UserError
from ..linear_core.loop.memory import STREAMED_ROOM
from ..linear_core.models import quantised

log = logging.getLogger(__name__)
FOLDER = "ar_image"
JANUS = "Janus-Pro"  # below models/, where other packs have people put Janus' folders
SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}
# What a page says that shows text under a node and leaves it at that. Earlier ones write it among the widgets' values
# into the workflow, where it would become the value of the next widget that the node gets.
SHOWS_TEXT = "supports_progress_text_metadata"


# -- files -----------------------------------------------------------------------------------------------------------


def register_folder() -> None:
    """Make models/ar_image a model folder, beside those that extra_model_paths.yaml may have named before us.

    Folders of Janus that are there for another pack already need not be moved or fetched again.
    """
    paths, suffixes = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    ours = [os.path.join(folder_paths.models_dir, name) for name in (FOLDER, JANUS)]
    paths = [*paths, *(path for path in ours if path not in paths)]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, suffixes | SUFFIXES)


def filenames(folder: str = FOLDER) -> list[str]:
    """The files in the model folders, as the widgets list them."""
    return folder_paths.get_filename_list(folder)


def folders(folder: str = FOLDER) -> list[str]:
    return folder_paths.get_folder_paths(folder)


def full_path(name: str, folder: str = FOLDER) -> str | None:
    """The path of the file that a widget names; None if there is none. Never outside the model folders."""
    return folder_paths.get_full_path(folder, name)


def t5_tokenizer() -> Path | None:
    """The tokenizer that ComfyUI brings for T5 text encoders: FLAN-T5's too, all T5 of version 1.1 share it."""
    path = Path(comfy.ops.__file__).parent / "text_encoders" / "t5_tokenizer" / "tokenizer.json"
    return path if path.is_file() else None


def versions() -> dict[str, str]:
    """Of ComfyUI and its page."""
    found = {"ComfyUI": str(comfyui_version.__version__)}
    with suppress(metadata.PackageNotFoundError):
        found["its frontend"] = metadata.version("comfyui-frontend-package")
    return found


# -- devices and memory ----------------------------------------------------------------------------------------------


class Layers:
    """The layers a model is built from: ComfyUI's, which can compute on a device that their weights are not on.

    ComfyUI may leave a Linear or an Embedding without weights until its own loader fills it. Ours is told the shapes
    first, so these two are built the ordinary way.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        __init__ = nn.Linear.__init__
        _load_from_state_dict = nn.Module._load_from_state_dict

    class Embedding(comfy.ops.disable_weight_init.Embedding):
        __init__ = nn.Embedding.__init__
        _load_from_state_dict = nn.Module._load_from_state_dict

    Conv1d = comfy.ops.disable_weight_init.Conv1d
    Conv2d = comfy.ops.disable_weight_init.Conv2d
    GroupNorm = comfy.ops.disable_weight_init.GroupNorm
    LayerNorm = comfy.ops.disable_weight_init.LayerNorm
    RMSNorm = comfy.ops.disable_weight_init.RMSNorm

    class QuantisedLinear(quantised.QuantisedLinear):
        """As ComfyUI keeps its own: it may leave the matrix where it is and have the layer fetch it for every use."""

        comfy_cast_weights = False
        weight_function: tuple[Any, ...] = ()
        bias_function: tuple[Any, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            if not self.comfy_cast_weights:
                return super().forward(x)
            fetched = comfy.ops.cast_bias_weight(
                self, dtype=self.weight.dtype, device=x.device, bias_dtype=x.dtype, offloadable=True
            )
            weight, bias, stream = fetched
            out = self.multiply(x, weight, self.scale.to(x.device), bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return out


class CastingLayers(Layers):
    """The same layers for large matrices that are stored in fewer bits than they are computed in."""

    class Linear(Layers.Linear):
        comfy_cast_weights = True


WEIGHT_DTYPES = {
    "default": None, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": "int8", "int4": "int4"
}  # fmt: skip


def device_type() -> str:
    """Type of the device that models compute on: "cpu", "cuda", …"""
    return str(management.get_torch_device().type)


def compute_dtype() -> torch.dtype:
    """bfloat16 where ComfyUI considers it fast, float32 on a CPU; a dtype forced on the command line wins."""
    wanted = management.unet_dtype(management.get_torch_device(), supported_dtypes=[torch.bfloat16, torch.float32])
    return wanted if wanted in (torch.bfloat16, torch.float16) else torch.float32


def compute_device() -> torch.device:
    """The device that models compute on."""
    return management.get_torch_device()


def managed(module: nn.Module, streamed: bool = False) -> ModelPatcher:
    """`module` in ComfyUI's care, which moves it to the device for use and away when room is needed.

    Only on request (`streamed`) by the patcher that fetches weights layer by layer, where ComfyUI has it: a picture
    calls every layer hundreds of times, for one token each, and the fetching takes longer than the layers.
    """
    make = getattr(model_patcher, "CoreModelPatcher", ModelPatcher) if streamed else ModelPatcher
    patcher = make(module, management.get_torch_device(), management.unet_offload_device())
    patcher.linear_streamed = streamed
    return patcher


def is_streamed(model: ModelPatcher) -> bool:
    """Whether `model`'s weights are fetched layer by layer."""
    return bool(getattr(model, "linear_streamed", False))


def managed_text_encoder(module: nn.Module) -> ModelPatcher:
    """The same for a text encoder, on the device that ComfyUI uses for those."""
    holder = nn.ModuleList([module])  # ComfyUI writes down the device on it, and transformers' modules refuse
    return ModelPatcher(holder, management.text_encoder_device(), management.text_encoder_offload_device())


def unload(model: ModelPatcher) -> None:
    """Unload `model` from the device, and nothing else."""
    others = [m for m in management.current_loaded_models if m.model is not model]
    management.free_memory(1e32, model.load_device, others)


def load(*models: ModelPatcher, memory: int) -> None:
    """Load `models` onto the device, and leave `memory` bytes free besides them."""
    management.load_models_gpu(list(models), memory_required=memory)


def free_memory() -> int:
    """Free memory of the device, in bytes."""
    return int(management.get_free_memory(management.get_torch_device()))


def room(*models: ModelPatcher) -> int:
    """Memory for a run besides `models`, in bytes, once ComfyUI has unloaded everything else that it can."""
    device = management.get_torch_device()
    if device.type == "cpu":
        return free_memory()  # models are in the computer's memory wherever they are used
    loaded = sum(m.model_loaded_memory() for m in management.current_loaded_models if m.device == device)
    sizes = (min(model.model_size(), STREAMED_ROOM if is_streamed(model) else 1e32) for model in models)
    needed = sum(sizes) * 1.1 + management.extra_reserved_memory()
    return int(free_memory() + loaded - needed)


def to_intermediate(picture: Tensor) -> Tensor:
    """An IMAGE on the device where ComfyUI keeps the outputs of nodes."""
    return picture.to(management.intermediate_device())


# -- CLIP --------------------------------------------------------------------------------------------------------------


def clip_texts(clip: Any, texts: list[str]) -> Tensor:
    """Features of texts in the space that a CLIP model shares with images: float32 B D."""
    projections = [m.weight for name, m in clip.cond_stage_model.named_modules() if name.endswith("text_projection")]
    found = torch.cat([clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1] for text in texts])
    own = [weight for weight in projections if weight.shape[0] == found.shape[1]]
    if not any(not torch.equal(w.float().cpu(), torch.eye(len(w))) for w in own):  # as ComfyUI fills in what is missing
        raise UserError(
            "clip: its file has no projection into the space of images, as in checkpoints of Stable Diffusion 1; load "
            "clip_l.safetensors or clip_g.safetensors."
        )
    return found.float().cpu()


def clip_images(clip_vision: Any, images: Tensor) -> Tensor:
    """Features of images B H W 3 in the same space: float32 B D."""
    features = clip_vision.encode_image(images)["image_embeds"]
    if features is None or features.ndim != 2:
        raise UserError("clip_vision: it has no features that texts share; load the vision half of a CLIP model.")
    return features.float().cpu()


# -- runs and progress -------------------------------------------------------------------------------------------------


Interrupted = management.InterruptProcessingException


def list_index() -> int:
    """Which of the node's runs within one prompt this is: ComfyUI runs a node once for each entry of a list."""
    context = get_executing_context()
    return (context and context.list_index) or 0


def stop_if_asked() -> None:
    """Raises ComfyUI's interrupt when the user pressed Stop."""
    management.throw_exception_if_processing_interrupted()


class Progress:
    """A node's progress bar, with a picture on the node and a line of text under it."""

    def __init__(self, total: int, node_id: str):
        self.total, self.node_id = total, node_id
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)

    def update(self, done: int, text: str = "", picture: Image.Image | None = None) -> None:
        """Raises ComfyUI's interrupt when the user pressed Stop."""
        management.throw_exception_if_processing_interrupted()  # the bar asks too, but leaves out some updates
        # No size is given with the picture: ComfyUI would blur it up to that.
        self.bar.update_absolute(done, self.total, None if picture is None else ("JPEG", picture, None))
        if text:
            tell(self.node_id, text)


def tell(node_id: str, text: str) -> None:
    """Show a line of text under a node, on pages that leave it at that."""
    server = PromptServer.instance
    if feature_flags.supports_feature(server.sockets_metadata, server.client_id, SHOWS_TEXT):
        server.send_progress_text(text, node_id, server.client_id)


def preview(node_id: str, picture: Image.Image) -> None:
    """Send a picture to our widget on a node as ComfyUI sends its own previews, job and all, so that its list of jobs
    and its App mode show it too. Only a node would show it twice: the one named to display it does not exist."""
    server = PromptServer.instance
    if feature_flags.supports_feature(server.sockets_metadata, server.client_id, "supports_preview_metadata"):
        who = {
            "node_id": node_id,
            "real_node_id": node_id,
            "display_node_id": "linear_ar",
            "parent_node_id": "",
            "prompt_id": server.last_prompt_id,
        }
        kind = BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA
        server.send_sync(kind, (("JPEG", picture, None), who), server.client_id)


def send_event(event: str, data: dict[str, Any]) -> None:
    """Send an event to the page that queued the prompt, if a page did."""
    server = PromptServer.instance
    if server.client_id is not None:
        server.send_sync(event, data, server.client_id)


def keep_for_the_page(picture: Image.Image) -> dict[str, str]:
    """Put a picture where pages can fetch it until ComfyUI starts again; returns what they ask for."""
    folder = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    name = f"linear_{uuid.uuid4().hex}.png"
    # A copy: saving sets the picture up for its format, and ComfyUI's own thread may be saving it as a preview.
    picture.copy().save(os.path.join(folder, name), compress_level=1)
    return {"filename": name, "subfolder": "", "type": "temp"}
