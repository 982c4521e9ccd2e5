"""Logging: which remarks of other libraries are silent, and that no other is."""

import json
import logging

import pytest
from diffusers import QwenImageTransformer2DModel

from lora_utils.io.libraries import configure_libraries
from lora_utils.model.text_encoder import read_text_config

ROPE = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
TEXT = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "rope_scaling": ROPE,
    "rope_theta": 1e6,
}


@pytest.fixture
def remarks():
    """What transformers and diffusers say meanwhile."""
    configure_libraries()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


def read_configs(folder, text, transformer):
    """Read the two configs as a load of the model does, from files like the hub's."""
    for part, config in (("text_encoder", text), ("transformer", transformer)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    read_text_config(folder)
    config = QwenImageTransformer2DModel.load_config(folder / "transformer")
    QwenImageTransformer2DModel.from_config({**config, "num_layers": 1, "attention_head_dim": 32})


def hub_text_config(**changed):
    """The text encoder's config as it lies on the hub: flat, and the same again under text_config."""
    return {
        **TEXT,
        "model_type": "qwen2_5_vl",
        "text_config": {**TEXT, "model_type": "qwen2_5_vl_text", "rope_scaling": {**ROPE, **changed}},
    }


SMALL = {"num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": [8, 12, 12]}


def test_the_hubs_own_configs_are_read_in_silence(tmp_path, remarks):
    read_configs(tmp_path, hub_text_config(), {**SMALL, "pooled_projection_dim": 768})
    assert remarks == []


def test_other_remarks_of_the_same_kinds_are_shown(tmp_path, remarks):
    read_configs(tmp_path, hub_text_config(strange=1), {**SMALL, "pooled_projection_dim": 768, "unknown": 3})
    assert any("strange" in remark for remark in remarks)
    assert any("'unknown': 3" in remark for remark in remarks)
