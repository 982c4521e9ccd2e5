"""Which base model weights were trained on, and what is said where it is another than the one that is loaded."""

import logging

from lora_utils import constants
from lora_utils.errors import UserError
from lora_utils.io.download import base_model_name
from lora_utils.lora.formats import LoraFile
from lora_utils.lora.keys import foreign_name, names_editing_model
from lora_utils.lora.strength import named_bases
from lora_utils.lora.weights_zip import Meta
from lora_utils.model.components import Components

log = logging.getLogger(__name__)


def trained_to_edit(lora: LoraFile, meta: Meta | None) -> bool | None:
    """Return whether weights were trained on a model that edits images; None where nothing says it."""
    if meta is not None and meta.pipeline is not None:
        return meta.pipeline in constants.EDIT_PIPELINES
    named = named_bases(lora.metadata) + ([meta.base_model] if meta is not None and meta.base_model else [])
    return any(map(names_editing_model, named)) if named else None


def check_variant(lora: LoraFile, meta: Meta | None, components: Components, name: str) -> None:
    """Warn of weights of a text-to-image model on one that edits, or the other way round: both have the same layers."""
    edits = trained_to_edit(lora, meta)
    if edits is not None and edits != components.variant.edits:
        kinds = ("makes images from text", "edits images")
        log.warning(
            "%s was trained on a model that %s, and the base model %s: it does there what it can",
            name,
            kinds[edits],
            kinds[not edits],
        )


def check_base_model(trained_on: str, name: str) -> None:
    """Warn of weights that were trained on another base model. Raises UserError for one of another kind."""
    if model := foreign_name(trained_on):
        raise UserError(f"{name} was trained on {trained_on}, a {model} model; use weights of Qwen-Image.")
    ours, theirs = (each.rstrip("/").rpartition("/")[2] for each in (base_model_name(), trained_on))
    if ours != theirs:
        log.warning("%s was trained on %s, and the base model is %s: images may differ", name, theirs, ours)
