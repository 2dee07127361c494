"""A stand-in for ComfyUI, as far as nodes/ knows it: enough to run every node without one.

`load_pack()` imports this repository as the package that ComfyUI makes of it. What the nodes tell the page is in
`host.sent` and `host.progress`; `host.stop_after` presses Stop. The real thing is in test_host.py, which also holds the
schemas that this double makes against the real ones.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PACK = "linear_pack"
CPU = torch.device("cpu")


class Interrupted(BaseException):
    """ComfyUI's InterruptProcessingException; an Exception on older hosts."""


class Host:
    """What the stand-in was told, and what it is to answer."""

    def __init__(self) -> None:
        self.reset(Path())

    def reset(self, folder: Path) -> None:
        self.models, self.temp = folder / "models", folder / "temp"
        self.progress: list[tuple[int, int]] = []  # done, total
        self.sent: list[tuple[Any, Any]] = []  # event, data
        self.loaded: list[tuple[list[Patcher], int]] = []  # models, memory_required
        self.fetched: list[tuple[Any, ...]] = []  # layers with what was fetched for them, once it was given back
        self.stop_after: int | None = None  # rows, after which Stop is pressed
        self.stop_where = ""  # the name of the only thread that is told; empty: whichever asks first
        self.stops = 0
        self.free = 2**30
        self.context: Any = None  # of the node that runs: its list_index, where it runs for each entry of a list
        folder_names_and_paths.clear()

    def stop_if_asked(self) -> None:
        """ComfyUI tells of a Stop once: to whom asks first, on any thread."""
        done = self.progress[-1][0] if self.progress else 0
        if self.stops or self.stop_after is None or done < self.stop_after:
            return
        if threading.current_thread().name.startswith(self.stop_where):
            self.stops += 1
            raise Interrupted


folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}
host = Host()


# -- schemas ---------------------------------------------------------------------------------------------------------


class Input:
    """Any input: its type, its name, and what the page is told of it."""

    io_type = ""
    always: dict[str, Any] = {}  # noqa: RUF012 (never written to)

    def __init__(self, id: str, *, optional: bool = False, extra_dict: dict[str, Any] | None = None, **options: Any):
        self.id, self.optional, self.extra, self.given = id, optional, extra_dict or {}, options
        vars(self).update(options)

    def told(self) -> list[Any]:
        names = {"dynamic_prompts": "dynamicPrompts"}
        options = {names.get(k, k): v for k, v in self.given.items() if v is not None}
        return [self.io_type, {**self.always, **options, **self.extra}]


class Output:
    def __init__(self, *, display_name: str | None = None, tooltip: str | None = None, io_type: str = ""):
        self.io_type, self.display_name, self.tooltip = io_type, display_name or io_type, tooltip


def comfytype(io_type: str) -> Any:
    """Gives a type's Input and Output their name."""

    def mark(kind: type) -> type:
        kind.io_type = io_type
        if hasattr(kind, "Input"):
            kind.Input.io_type = io_type
        return kind

    return mark


def kind(name: str, always: dict[str, Any] | None = None) -> Any:
    """A type of socket or widget."""
    made = type("Input", (Input,), {"io_type": name, "always": always or {}})
    return SimpleNamespace(Input=made, Output=lambda **more: Output(io_type=name, **more), io_type=name)


class _DynamicInput(Input):
    io_type = "COMFY_DYNAMICCOMBO_V3"

    def __init__(self, id: str, options: list[Any], **more: Any):
        super().__init__(id, **more)
        self.options = options

    def told(self) -> list[Any]:
        name, options = super().told()
        return [name, {**options, "options": [{"key": c.key, "inputs": inputs(c.inputs)} for c in self.options]}]


class Option:
    def __init__(self, key: str, inputs: list[Input]):
        self.key, self.inputs = key, inputs


def inputs(declared: list[Input]) -> dict[str, dict[str, Any]]:
    """Inputs as /object_info tells them; there is always a group of required ones."""
    told: dict[str, dict[str, Any]] = {"required": {}}
    for entry in declared:
        told.setdefault("optional" if entry.optional else "required", {})[entry.id] = entry.told()
    return told


class Schema:
    def __init__(self, node_id: str, inputs: list[Input] = (), outputs: list[Output] = (), **more: Any):
        self.node_id, self.inputs, self.outputs, self.more = node_id, list(inputs), list(outputs), more


class ComfyNode:
    hidden = SimpleNamespace(unique_id="7")

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        return cls.define_schema()


class NodeOutput:
    def __init__(self, *values: Any, ui: Any = None):
        self.result, self.ui = values, ui


class ComfyExtension:
    pass


def execute(node: type[ComfyNode], **inputs: Any) -> NodeOutput:
    """What a node puts out, inputs that are not given at their defaults."""
    known = {entry.id: entry for entry in node.GET_SCHEMA().inputs}
    assert set(inputs) <= set(known), "an input that the node does not have"
    defaults = {name: entry.given["default"] for name, entry in known.items() if "default" in entry.given}
    return node.execute(**{**defaults, **inputs})


def object_info(node: type[ComfyNode]) -> dict[str, Any]:
    """What /object_info says of a node, less what says nothing of ours (see `ours` in comfy_server.py)."""
    schema, more = node.GET_SCHEMA(), node.GET_SCHEMA().more
    told = inputs(schema.inputs)
    order = {group: list(entries) for group, entries in told.items()}
    added = ["prompt", "extra_pnginfo"] if more.get("is_output_node") else []  # ComfyUI does, for those that save
    for hidden in [*more.get("hidden", []), *added]:
        told.setdefault("hidden", {})[hidden] = [hidden.upper()]
        order.setdefault("hidden", []).append(hidden)
    return {
        "input": told,
        "input_order": order,
        "output": [output.io_type for output in schema.outputs],
        "output_name": [output.display_name for output in schema.outputs],
        "output_tooltips": [output.tooltip for output in schema.outputs],
        "name": schema.node_id,
        "display_name": more["display_name"],
        "description": more["description"],
        "category": more["category"],
        "search_aliases": more["search_aliases"],
        "output_node": more.get("is_output_node", False),
    }


# -- devices and memory ----------------------------------------------------------------------------------------------


class Patcher:
    """ModelPatcher: the model, and whether it is on the device."""

    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        model.device = offload_device  # the real one does, whatever the model thinks of it


class DynamicPatcher(Patcher):
    """The patcher that ComfyUI uses for its own models where it can fetch weights layer by layer."""


def cast_bias_weight(layer: nn.Module, *, dtype: torch.dtype, device: torch.device, **_: Any) -> tuple[Any, Any, str]:
    """Matrix and bias on the device, as numbers of this kind."""
    return layer.weight.to(device, dtype, copy=True), layer.bias, "stream"


def layers(casting: bool) -> Any:
    """Layers that ask for Stop before they compute, as ComfyUI's do."""

    def one(layer: type[nn.Module]) -> type[nn.Module]:
        def forward(self: nn.Module, *args: Any) -> torch.Tensor:
            host.stop_if_asked()
            return layer.forward(self, *args)

        return type(layer.__name__, (layer,), {"forward": forward, "comfy_cast_weights": casting})

    return SimpleNamespace(
        **{
            n: one(getattr(nn, n))
            for n in ("Linear", "Embedding", "Conv1d", "Conv2d", "GroupNorm", "LayerNorm", "RMSNorm")
        }
    )


def load_models_gpu(models: list[Patcher], memory_required: int = 0) -> None:
    host.loaded.append((models, memory_required))
    for patcher in models:
        patcher.model.device = patcher.load_device


class ProgressBar:
    def __init__(self, total: int, node_id: str | None = None):
        self.total, self.node_id = total, node_id

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        host.stop_if_asked()
        host.progress.append((value, total or self.total))
        if preview:
            host.sent.append(("preview", preview))


# -- files -----------------------------------------------------------------------------------------------------------


def get_full_path(folder: str, name: str) -> str | None:
    for place in folder_names_and_paths[folder][0]:
        path = Path(place, *Path("/", name).resolve().parts[1:])  # never above the folder
        if path.is_file():
            return str(path)
    return None


def get_filename_list(folder: str) -> list[str]:
    places, suffixes = folder_names_and_paths.get(folder, ([], set()))
    found = {p.relative_to(d).as_posix() for d in places for p in Path(d).rglob("*") if p.suffix in suffixes}
    return sorted(found)


# -- all of it -------------------------------------------------------------------------------------------------------


def modules() -> dict[str, ModuleType]:
    """Every module of ComfyUI's that the nodes import, by name."""

    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(content)
        return made

    io = SimpleNamespace(
        Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput, Input=Input, comfytype=comfytype, Custom=kind,
        ComfyTypeI=object, WidgetInput=Input, Hidden=SimpleNamespace(unique_id="unique_id"),
        Image=kind("IMAGE"), Mask=kind("MASK"), Clip=kind("CLIP"), ClipVision=kind("CLIP_VISION"),
        String=kind("STRING", {"multiline": False}), Int=kind("INT"),
        Float=kind("FLOAT"),
        Boolean=kind("BOOLEAN"), Combo=kind("COMBO", {"multiselect": False}),
        DynamicCombo=SimpleNamespace(Input=_DynamicInput, Option=Option),
    )  # fmt: skip
    management = module(
        "comfy.model_management",
        get_torch_device=lambda: CPU, unet_offload_device=lambda: CPU, intermediate_device=lambda: CPU,
        text_encoder_device=lambda: CPU, text_encoder_offload_device=lambda: CPU,
        unet_dtype=lambda device, supported_dtypes: torch.float32, load_models_gpu=load_models_gpu,
        get_free_memory=lambda device: host.free, free_memory=lambda *_: [], current_loaded_models=[],
        throw_exception_if_processing_interrupted=lambda: host.stop_if_asked(),
        InterruptProcessingException=Interrupted,
    )  # fmt: skip
    ops = module(
        "comfy.ops", disable_weight_init=layers(False), manual_cast=layers(True), __file__=__file__,
        cast_bias_weight=cast_bias_weight, uncast_bias_weight=lambda *fetched: host.fetched.append(fetched),
    )  # fmt: skip
    utils = module("comfy.utils", ProgressBar=ProgressBar)
    patcher = module("comfy.model_patcher", ModelPatcher=Patcher, CoreModelPatcher=DynamicPatcher)
    server = SimpleNamespace(
        client_id="page", sockets_metadata={}, last_prompt_id="job",
        send_sync=lambda event, data, sid: host.sent.append((event, data)),
        send_progress_text=lambda text, node_id, sid: host.sent.append(("text", text)),
    )  # fmt: skip
    flags = module("comfy_api.feature_flags", supports_feature=lambda sockets, sid, name: True)
    return {
        "comfy": module("comfy", model_management=management, ops=ops, utils=utils, model_patcher=patcher),
        "comfy.model_management": management,
        "comfy.ops": ops,
        "comfy.utils": utils,
        "comfy.model_patcher": patcher,
        "comfy_execution.utils": module("comfy_execution.utils", get_executing_context=lambda: host.context),
        "comfy_execution": module("comfy_execution"),
        "comfyui_version": module("comfyui_version", __version__="0.33.0"),
        "comfy_api": module("comfy_api", feature_flags=flags),
        "comfy_api.feature_flags": flags,
        "comfy_api.latest": module("comfy_api.latest", io=io, ComfyExtension=ComfyExtension),
        "server": module(
            "server",
            PromptServer=SimpleNamespace(instance=server),
            BinaryEventTypes=SimpleNamespace(PREVIEW_IMAGE_WITH_METADATA=4),
        ),
        "folder_paths": FolderPaths("folder_paths"),
    }


class FolderPaths(ModuleType):
    """Its folders are those of the test that is running."""

    folder_names_and_paths = folder_names_and_paths
    get_full_path = staticmethod(get_full_path)
    get_filename_list = staticmethod(get_filename_list)

    @property
    def models_dir(self) -> str:
        return str(host.models)

    @staticmethod
    def get_folder_paths(folder: str) -> list[str]:
        return list(folder_names_and_paths[folder][0])

    @staticmethod
    def get_temp_directory() -> str:
        return str(host.temp)


def load_pack() -> ModuleType:
    """This repository as a package, imported once; afterwards nothing else finds the stand-in."""
    if PACK in sys.modules:
        return sys.modules[PACK]
    before = {name: sys.modules.get(name) for name in modules()}
    sys.modules.update(modules())
    try:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        pack = sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        importlib.import_module(f"{PACK}.nodes")
    except BaseException:
        sys.modules.pop(PACK, None)
        raise
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = module
    return pack
