"""weights.zip: the LoRA file and `meta.json`, how they are written and how they are found again.

This module owns the archive's layout and the schema of `meta.json`. It doesn't know tensors or models.
"""

import json
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import IO, Any, get_args, get_origin

from lora_utils.constants import PEFT_CONFIG, PEFT_WEIGHTS
from lora_utils.errors import UserError
from lora_utils.io.archive import ExtractionBudget, archive_kind, archive_members, damage_as_user_error
from lora_utils.io.files import atomic_path
from lora_utils.lora.strength import parse_config

LORA_MEMBER = "lora/lora_weights.safetensors"
META_MEMBER = "meta.json"
META_SCHEMA = 1
MAX_JSON_BYTES = 1 << 24


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True, slots=True)
class Meta:
    """What `meta.json` says of a training. Files of older versions lack fields: those read as None."""

    base_model: str | None = None
    pipeline: str | None = None  # diffusers' class for it: whether it edits images
    train_placeholder_token: bool | None = None
    placeholder_token: str | None = None  # this and the next two are null in baseline mode
    placeholder_token_id: int | list[int] | None = None  # a list where a run trained several tokens; and so is the next
    placeholder: dict[str, Any] | list[dict[str, Any]] | None = (
        None  # the trained embedding: token, key, norms, sha256, ...
    )
    rank: int | None = None
    lora_alpha: int | float | None = None
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
        except (ValueError, RecursionError) as error:
            raise UserError(f"{META_MEMBER} in {source} isn't JSON ({error}).") from error
        if not isinstance(values, dict):
            raise UserError(f"{META_MEMBER} in {source} must be an object, got {type(values).__name__}.")
        for placeholder in _as_list(values.get("placeholder")):
            named = isinstance(placeholder, dict) and [placeholder.get(name) for name in ("token", "sha256")]
            if not named or not all(isinstance(value, str) for value in named):
                raise UserError(f"{META_MEMBER} in {source}: placeholder must be null or name a token and its sha256.")
        for item in fields(cls):
            value, kinds = values.get(item.name), _kinds(item.type)
            if item.name in values and not isinstance(value, (*kinds, float) if int in kinds else kinds):
                raise UserError(f"{META_MEMBER} in {source}: {item.name} can't be {str(value)[:60]!r}.")
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


@dataclass(frozen=True, slots=True)
class ExtractedWeights:
    """A LoRA's file, and what came with it: its meta.json, and the adapter_config.json that peft keeps its alpha in."""

    lora_path: Path
    meta: Meta | None = None
    adapter_config: dict[str, Any] | None = None


def extract_weights(weights: Path, folder: Path) -> ExtractedWeights:
    """Find the LoRA file of a weights.zip, a tar of the same, a bare .safetensors, or an adapter folder of peft's.

    What is packed is extracted into `folder`. Other layouts of archives are taken as long as they hold exactly one
    .safetensors file. Raises UserError for what holds none or several, and for a file that can't be read.
    """
    # A folder, or a file that is no archive: what it is shows when it is read.
    if weights.is_dir():
        found = sorted(weights.glob("*.safetensors"))
        own = [path for path in found if path.name == PEFT_WEIGHTS] or found
        if len(own) != 1:
            raise UserError(f"{weights.name} holds {len(own)} .safetensors files, expected one: {PEFT_WEIGHTS}.")
        return ExtractedWeights(own[0], adapter_config=_config_beside(own[0], weights.name))
    budget = ExtractionBudget.of(weights)
    if archive_kind(weights) is None:
        config = _config_beside(weights, weights.name) if weights.name == PEFT_WEIGHTS else None
        return ExtractedWeights(weights, adapter_config=config)

    # An archive.
    lora_paths: dict[PurePosixPath, Path] = {}
    configs: dict[PurePosixPath, dict[str, Any]] = {}
    metas: dict[PurePosixPath, Meta] = {}
    for member in archive_members(weights):
        path = PurePosixPath(member.name)
        with damage_as_user_error(weights):
            if path in {*lora_paths, *metas, *configs}:
                raise UserError(f"{weights.name} holds {member.name!r} twice; pack each file once.")
            if path.suffix == ".safetensors":
                lora_paths[path] = folder / f"{len(lora_paths)}.safetensors"
                budget.copy(member.source, lora_paths[path])
            elif path.name == META_MEMBER:
                metas[path] = Meta.from_json(_text(member.source), weights.name)
            elif path.name == PEFT_CONFIG:
                configs[path] = parse_config(_text(member.source), f"{PEFT_CONFIG} in {weights.name}")
    if len(lora_paths) != 1:
        raise UserError(f"{weights.name} holds {len(lora_paths)} .safetensors files, expected one: {LORA_MEMBER}.")
    if len(metas) > 1:
        raise UserError(f"{weights.name} holds {len(metas)} files {META_MEMBER}; pack one archive's.")
    ((inside, lora_path),) = lora_paths.items()
    return ExtractedWeights(lora_path, next(iter(metas.values()), None), configs.get(inside.with_name(PEFT_CONFIG)))


def _text(source: IO[bytes]) -> str:
    """Return a JSON file's text, with or without the mark that some editors put in front."""
    return source.read(MAX_JSON_BYTES).decode("utf-8-sig", "replace")


def _config_beside(lora_path: Path, name: str) -> dict[str, Any] | None:
    """Return the adapter_config.json beside a file of peft's, if there is one."""
    path = lora_path.with_name(PEFT_CONFIG)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = _text(file)
    return parse_config(text, f"{PEFT_CONFIG} beside {name}")


def _kinds(annotation: Any) -> tuple[type, ...]:
    """Return the types that a field's value may have."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(get_origin(part) or part for part in parts)
