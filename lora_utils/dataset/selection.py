"""Which of a folder's files are the dataset: its images, their masks and settings, and the caption of each image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_utils.config import TrainConfig
from lora_utils.dataset.caption_texts import regularisation_caption, taught_caption
from lora_utils.dataset.controls import ControlFiles, match_controls
from lora_utils.dataset.conventions import folder_class
from lora_utils.dataset.folder_settings import DatasetSettings, FolderSettings, read_folder_settings
from lora_utils.dataset.masks import Masks, match_masks
from lora_utils.errors import UserError
from lora_utils.io.archive import is_litter
from lora_utils.io.images import IMAGE_ENDINGS


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """Which of a folder's files is what."""

    images: list[Path]
    masks: Masks
    regularisation: list[Path]  # of the images; left out where they aren't wanted
    own: list[Path]  # all but what archivers left
    settings: DatasetSettings
    controls: ControlFiles

    @property
    def known(self) -> set[Path]:
        """The images of any use."""
        return {
            *self.images,
            *self.masks.files.values(),
            *self.masks.orphans,
            *self.regularisation,
            *self.settings.files,
            *self.controls.files,
        }


def sort_files(folder: Path, config: TrainConfig) -> DatasetFiles:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    own = [path for path in files if not is_litter(PurePosixPath(path.relative_to(folder)))]
    readable = [path for path in own if path.suffix.lower() in IMAGE_ENDINGS]
    settings = read_folder_settings(folder, own)
    controls = match_controls(folder, readable, own)
    # One that a table names as both is both: an edited image may be edited again.
    readable = [path for path in readable if path not in controls.files or path in controls.of_image]
    regularisation = [path for path in readable if settings.of(path).regularisation]
    if len(regularisation) == len(readable):  # they are what there is to learn from
        regularisation = []
    used = readable if config.prior_loss_weight else [path for path in readable if path not in set(regularisation)]
    masks = match_masks(folder, used)
    apart = {*masks.files.values(), *masks.orphans}
    images = [path for path in used if path not in apart]
    return DatasetFiles(images, masks, [path for path in regularisation if path not in apart], own, settings, controls)


@dataclass(frozen=True, slots=True)
class ChosenImages:
    """The images that are used, which of them are regularisation, and the others that have no caption of any kind."""

    images: list[Path]
    regularisation: frozenset[Path]
    without_caption: list[Path]
    settings: Mapping[Path, FolderSettings]


def choose_images(files: DatasetFiles, texts: Mapping[Path, str], config: TrainConfig) -> ChosenImages:
    """Leave out regularisation images that nothing says the content of and, if that is asked for, others too."""
    apart, folder = set(files.regularisation), files.settings.folder
    settings = {path: files.settings.of(path) for path in files.images}
    unexplained = {path for path in apart if not (texts.get(path) or folder_class(folder, path) or config.class_word)}
    without_caption = [
        path
        for path in files.images
        if path not in apart and path not in texts and not config.default_caption and not config.autocaption
    ]
    left_out = unexplained | (set(without_caption) if config.uncaptioned == "skip" else set())
    images = [path for path in files.images if path not in left_out]
    return ChosenImages(images, frozenset(path for path in images if path in apart), without_caption, settings)


def make_captions(
    folder: Path, chosen: ChosenImages, texts: Mapping[Path, str], config: TrainConfig
) -> tuple[dict[Path, str], list[str]]:
    """Return the caption of each image with its trigger, and what is wrong with those that have none."""
    captions, problems = {}, []
    for path in chosen.images:
        own, settings = texts.get(path, ""), chosen.settings[path]
        try:
            if path in chosen.regularisation:
                captions[path] = regularisation_caption(own, folder_class(folder, path), config)
            else:
                captions[path] = taught_caption(own or config.default_caption, settings.caption_prefix or "", config)
        except UserError as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
    return captions, problems
