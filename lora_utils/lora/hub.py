"""Sharing: finished weights to a repository on the hub, with a model card that says what they are and how to load them.

The token that allows it is passed along, and never written.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError

from lora_utils import constants
from lora_utils.config import HUB_REPO_PATTERN
from lora_utils.errors import UserError
from lora_utils.lora.weights_zip import META_MEMBER, Meta, extract_weights

ARCHIVE_NAME, LORA_NAME = constants.HUB_WEIGHT_NAMES[:2]
_FAILURES = (OSError, httpx2.HTTPError, HFValidationError)  # the hub's own errors are OSErrors
_NOT_A_SETTING = ("seed", "default_caption")


def need_token(repository: str, token: str | None) -> str:
    """Return the token to push with. Raises UserError without one: whose it is, the caller has decided."""
    if not token:
        raise UserError(f"hub_repo {repository} needs hub_token, a token of the hub that may write there.")
    return token


def ensure_repository(repository: str, token: str | None, private: bool) -> None:
    """Make sure that the repository is there and may be written to, before a training is begun for it.

    Raises UserError where it may not.
    """
    api = HfApi(token=need_token(repository, token))
    try:
        who = api.whoami()
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":  # one that is there would let it pass
            raise UserError(f"hub_repo {repository} can't be written to with a token that may only read; give another.")
        api.create_repo(repository, private=private, exist_ok=True)
    except _FAILURES as error:
        raise UserError(
            f"hub_repo {repository} can't be written to ({_first_line(error)}); check the name and that hub_token may "
            "write there, or leave hub_repo empty."
        ) from error


def push_weights(repository: str, token: str | None, weights: Path, sheets: Sequence[Path]) -> str:
    """Push the archive, its LoRA for other tools, meta.json, previews and a model card as one commit. -> its URL

    Raises UserError where it fails; the files here are as they were.
    """
    with TemporaryDirectory() as folder:
        found = extract_weights(weights, Path(folder))
        lora, meta = found.lora_path, found.meta
        if meta is None:
            raise RuntimeError(f"{weights} has no {META_MEMBER}")
        images = {f"samples/{sheet.name}": sheet for sheet in sheets}
        card = model_card(repository, meta, list(images))
        files = {ARCHIVE_NAME: weights, LORA_NAME: lora, **images}
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationAdd("README.md", card.encode()), CommitOperationAdd(META_MEMBER, _json_of(meta))]
        try:
            done = HfApi(token=need_token(repository, token)).create_commit(
                repository, operations, commit_message=f"A LoRA of {meta.training_steps} steps"
            )
        except _FAILURES as error:
            raise UserError(f"the weights couldn't be pushed to {repository} ({_first_line(error)})") from error
    return done.commit_url


def _json_of(meta: Meta) -> bytes:
    return meta.to_json().encode()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- the card -------------------------------------------------------------------------------------------------------


def model_card(repository: str, meta: Meta, sheets: Sequence[str]) -> str:
    """Return README.md as the hub reads it: what its search needs in front, then what a person wants to know."""
    # What it is a LoRA of, and the word that calls up what it was taught.
    named, edits = meta.base_model or "", meta.pipeline in constants.EDIT_PIPELINES
    base = named if HUB_REPO_PATTERN.fullmatch(named) and not Path(named).is_dir() else None
    tokens = [described["token"] for described in meta.placeholders]
    trigger = tokens[0] if tokens else meta.config.get("trigger_word") or None

    # The header, which the hub's search reads.
    header = [
        "---",
        "library_name: diffusers",
        f"pipeline_tag: {'image-to-image' if edits else 'text-to-image'}",
        f"tags: [lora, qwen-image, {'image-to-image' if edits else 'text-to-image'}]",
        *([f"base_model: {base}", "base_model_relation: adapter"] if base else []),
        *([f"instance_prompt: {json.dumps(trigger)}"] if trigger else []),
        "---",
    ]

    # The text, which people read.
    settings = {
        name: value
        for name, value in meta.config.items()
        if value not in ("", None) and _tells(name) and (edits or not name.startswith("control_"))
    }
    parts = [
        "\n".join(header),
        f"# {repository.rpartition('/')[2]}",
        f"A LoRA of {base or ('Qwen-Image-Edit' if edits else 'Qwen-Image')}, rank {meta.rank}, "
        f"{meta.training_steps} steps on {meta.num_images} images.{_named(tokens, trigger)}",
        *([f"![samples]({sheets[-1]})"] if sheets else []),
        "## Use it",
        _with_diffusers(repository, base, str(meta.pipeline) if edits else "", tokens, trigger),
        f"`{ARCHIVE_NAME}` holds the same with `{META_MEMBER}`, for the Cog model that it was trained with: give it as "
        "`replicate_weights`, or this repository's name as `extra_lora`.",
        "## Settings",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in settings.items())]),
    ]
    return "\n\n".join(parts) + "\n"


def _tells(name: str) -> bool:
    """Return whether a setting is of interest: captions are the owner's business, and a seed says nothing to others."""
    return name not in _NOT_A_SETTING and not name.startswith("autocaption")


def _named(tokens: Sequence[str], trigger: str | None) -> str:
    if tokens:
        return (
            f" What it was taught is called {' and '.join(f'`{token}`' for token in tokens)}: a token of its own that "
            "meant nothing before. Its embedding is in the file, and has to be loaded too."
        )
    return f" What it was taught is called `{trigger}`." if trigger else ""


def _with_diffusers(repository: str, base: str | None, editing: str, tokens: Sequence[str], trigger: str | None) -> str:
    """Return a program that uses the LoRA in diffusers; `editing` is the class of a pipeline that edits images."""
    pipeline = editing or "QwenImagePipeline"
    base = base or (constants.EDIT_MODEL if editing else constants.DEFAULT_BASE_MODEL)
    lines = [
        "```python",
        "import torch",
        f"from diffusers import {pipeline}",
        *(["from diffusers.utils import load_image"] if editing else []),
        *(["from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file"] if tokens else []),
        *(["from transformers import AddedToken"] if tokens else []),
        "",
        f'pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f'pipeline.load_lora_weights("{repository}", weight_name="{LORA_NAME}")',
    ]
    if tokens:
        lines += [
            f'embeddings = load_file(hf_hub_download("{repository}", "{LORA_NAME}"))',
            f"for token in {json.dumps(list(tokens))}:",
            "    pipeline.tokenizer.add_tokens(AddedToken(token, normalized=False))",
            "    index = pipeline.tokenizer.convert_tokens_to_ids(token)",
            "    matrix = pipeline.text_encoder.get_input_embeddings().weight",
            '    matrix.data[index] = embeddings[f"bundle_emb.{token}.lora.qwen25_7b"][0].to(matrix)',
        ]
    usual = "make it winter" if editing else "a photo of a lighthouse"
    prompt = (f"put {trigger} on the table" if editing else f"a photo of {trigger}") if trigger else usual
    given = 'image=load_image("photo.jpg"), prompt=' if editing else ""
    call = f'pipeline({given}"{prompt}", true_cfg_scale=4.0, negative_prompt=" ")'
    lines += [f'{call}.images[0].save("image.png")', "```"]
    return "\n".join(lines)
