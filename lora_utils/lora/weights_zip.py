"""weights.zip: the LoRA file and `meta.json`, how they are written and how they are found again.

This module owns the archive's layout and the schema of `meta.json`. It doesn't know tensors or models.
"""

import json
import tarfile
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from lora_utils.errors import UserError
from lora_utils.io.archive import ExtractionBudget, archive_members, damage_as_user_error
from lora_utils.io.files import atomic_path

LORA_MEMBER = "lora/lora_weights.safetensors"
META_MEMBER = "meta.json"
META_SCHEMA = 1


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True, slots=True)
class Meta:
    """What `meta.json` says of a training. Files of older versions lack fields: those read as None."""

    base_model: str | None = None
    train_placeholder_token: bool | None = None
    placeholder_token: str | None = None  # this and the next two are null in baseline mode
    placeholder_token_id: int | list[int] | None = None  # a list where a run trained several tokens; and so is the next
    placeholder: dict[str, Any] | list[dict[str, Any]] | None = (
        None  # the trained embedding: token, key, norms, sha256, ...
    )
    rank: int | None = None
    lora_alpha: int | None = None
    lora_targets: str | None = None
    training_steps: int | None = None
    learning_rate: float | None = None
    resolution: str | None = None
    batch_size: int | None = None
    seed: int | None = None
    num_images: int | None = None
    final_loss: float | None = None
    config: dict[str, Any] = field(default_factory=dict)  # the resolved TrainConfig
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None  # ISO 8601, UTC
    schema: int = META_SCHEMA

    @property
    def placeholders(self) -> list[dict[str, Any]]:
        """What it says of each trained embedding."""
        return _as_list(self.placeholder)

    @classmethod
    def from_json(cls, text: str, source: str) -> "Meta":
        """Read a meta.json; `source` is the archive that errors speak of. Raises UserError for another content."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{META_MEMBER} in {source} isn't JSON ({error}).") from error
        if not isinstance(values, dict):
            raise UserError(f"{META_MEMBER} in {source} must be an object, got {type(values).__name__}.")
        for placeholder in _as_list(values.get("placeholder")):
            if not (isinstance(placeholder, dict) and {"token", "sha256"} <= set(placeholder)):
                raise UserError(f"{META_MEMBER} in {source}: placeholder must be null or name a token and its sha256.")
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_json(self) -> str:
        """Return the content of meta.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def write_weights_zip(target: Path, lora_path: Path, meta: Meta) -> None:
    """Write `weights.zip`: the LoRA file and its meta.json, stored uncompressed, for safetensors don't compress."""
    with atomic_path(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.write(lora_path, LORA_MEMBER)
        archive.writestr(META_MEMBER, meta.to_json())


def extract_weights(weights: Path, folder: Path) -> tuple[Path, Meta | None]:
    """Extract the LoRA file and the meta of a weights.zip, a tar of the same, or a bare .safetensors (meta None).

    Other layouts of archives are taken as long as they hold exactly one .safetensors file.
    """
    budget = ExtractionBudget.of(weights)
    if not zipfile.is_zipfile(weights) and not tarfile.is_tarfile(weights):
        return weights, None  # bare safetensors; what it is shows when it is read
    lora_paths, meta = [], None
    for member in archive_members(weights):
        path = PurePosixPath(member.name)
        if path.suffix == ".safetensors":
            lora_paths.append(folder / f"{len(lora_paths)}.safetensors")
            with damage_as_user_error(weights):
                budget.copy(member.source, lora_paths[-1])
        elif path.name == META_MEMBER:
            with damage_as_user_error(weights):
                meta = Meta.from_json(member.source.read(1 << 24).decode("utf-8", "replace"), weights.name)
    if len(lora_paths) != 1:
        raise UserError(f"{weights.name} holds {len(lora_paths)} .safetensors files, expected one: {LORA_MEMBER}.")
    return lora_paths[0], meta
