"""A small NOVA in a folder as published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from linear_core.tokenizers import network
from tests.models import nova_reference as upstream


def published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files are wide enough that all have 32 groups, and their number of heads follows from the width."""
    monkeypatch.setattr(network, "groups", lambda channels: 32)
    monkeypatch.setattr("linear_core.models.nova.HEADS", {upstream.WIDTH: upstream.HEADS})


def write(folder: Path) -> Path:
    transformer = {"image_base_size": [upstream.SIDE] * 2, "text_token_len": upstream.LENGTH, "image_stride": 8}
    scheduler = {
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing",
        "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    }  # fmt: skip
    phi = {"num_attention_heads": upstream.PHI_HEADS, "partial_rotary_factor": upstream.ROTATED}
    words = {"[UNK]": 0, **{f"word{n}": n for n in range(1, upstream.VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    for name, config, weights in (
        ("transformer/diffusion_pytorch_model", transformer, upstream.nova_weights()),
        ("vae/diffusion_pytorch_model", {"scaling_factor": upstream.VAE_SCALE}, upstream.vae_weights()),
        ("text_encoder/model", phi, upstream.phi_weights()),
    ):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        save_file(weights, file)
        file.with_name("config.json").write_text(json.dumps(config))
    for name, text in (
        ("scheduler/scheduler_config.json", json.dumps(scheduler)),
        ("tokenizer/tokenizer.json", tokenizer.to_str()),
        ("model_index.json", "{}"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder
