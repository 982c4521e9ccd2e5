"""Which Qwen-Image a folder holds: text-to-image, or one that edits images. The folder's model_index.json says it.

Sources: diffusers 0.42.1, `pipeline_qwenimage.py`, `pipeline_qwenimage_edit.py` and `pipeline_qwenimage_edit_plus.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_utils import constants
from lora_utils.io.download import check_pipeline
from lora_utils.io.model_folder import MODEL_INDEX


@dataclass(frozen=True, slots=True)
class Variant:
    """How a kind of Qwen-Image reads a prompt and the images that it is to edit."""

    pipeline: str  # the class that model_index.json names
    template_prefix: str  # what stands in front of the prompt
    prefix_tokens: int  # of it, whose states are dropped
    most_controls: int  # images to edit that it takes
    image_label: str  # in front of each image's marks; {} is its number, counted from 1
    vision_area_px: int | None  # to which an image is scaled for the text encoder; None: as for the VAE

    @property
    def edits(self) -> bool:
        """Whether it edits images."""
        return self.most_controls > 0

    def prompt(self, text: str, controls: int) -> str:
        """Return what the text encoder reads of a prompt with so many images. Each image's mark is one token yet."""
        marks = "".join(self.image_label.format(i + 1) + constants.IMAGE_MARK for i in range(controls))
        return self.template_prefix + marks + text + constants.TEMPLATE_SUFFIX


TEXT_TO_IMAGE = Variant("QwenImagePipeline", constants.TEMPLATE_PREFIX, constants.TEMPLATE_PREFIX_TOKENS, 0, "", None)
EDIT = Variant("QwenImageEditPipeline", constants.EDIT_TEMPLATE_PREFIX, constants.EDIT_PREFIX_TOKENS, 1, "", None)
EDIT_PLUS = Variant(
    "QwenImageEditPlusPipeline",
    constants.EDIT_TEMPLATE_PREFIX,
    constants.EDIT_PREFIX_TOKENS,
    3,
    "Picture {}: ",
    constants.VISION_AREA_PX,
)
_EDITING = {variant.pipeline: variant for variant in (EDIT, EDIT_PLUS)}


def read_variant(folder: Path) -> Variant:
    """Return which variant a model folder is; parts of one, without a model_index.json, make images from text.

    Raises UserError for a model of another kind.
    """
    if not (folder / MODEL_INDEX).is_file():
        return TEXT_TO_IMAGE
    return _EDITING.get(check_pipeline(folder / MODEL_INDEX, folder.name), TEXT_TO_IMAGE)
