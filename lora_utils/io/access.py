"""What a caller may reach: of this machine's files, its network, and its owner's token of the hub.

Whoever runs a command on the machine is its owner and may reach all that the process may. A request over HTTP is a
stranger's: it reaches what the operator opens to it, by environment variables.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from lora_utils.errors import UserError

RUN_ROOT = "RUN_ROOT"  # the folder that requests may keep their run_dir in
LOCAL_PATHS, PRIVATE_ADDRESSES = "ALLOW_LOCAL_PATHS", "ALLOW_PRIVATE_ADDRESSES"
_MAX_NAME_BYTES = 255  # of a folder, on the file systems of Linux
OPERATORS_TOKEN = "ALLOW_OPERATORS_HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may reach beyond files that came with the request, public addresses and public repositories."""

    local_paths: bool  # files of the machine, by their path
    private_addresses: bool  # URLs of this machine and its network
    operators_token: bool  # the hub's token of this machine, where the caller gives none
    any_run_dir: bool
    run_root: Path | None = None  # below which run_dir must lie, where not any may

    def hub_token(self, given: str | None) -> str | None:
        """Return the token of the hub to use: the caller's own or, where that is allowed, this machine's."""
        if given or not self.operators_token:
            return given or None
        from huggingface_hub import get_token  # noqa: PLC0415 (help and wrong options do without)

        return get_token()

    def run_dir(self, given: str) -> str:
        """Return the folder of a run. Raises UserError for one that the caller may not use."""
        if not given or self.any_run_dir:
            return given
        if self.run_root is None:
            raise UserError(
                f"run_dir isn't open to requests on this server; its operator opens a folder by {RUN_ROOT}."
            )
        root = self.run_root.resolve()
        try:
            folder = (root / given).resolve()  # links are followed
        except (OSError, ValueError):  # with a zero byte, or links in a circle
            folder = root
        too_long = any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in folder.parts)
        if too_long or not folder.is_relative_to(root) or folder == root:
            raise UserError("run_dir must be a folder below the server's own for runs; give a name like 'my-run'.")
        return str(folder)


# A caller in Python reaches what its process may; a command's user is asked for no token that the machine has already.
CALLER = Access(local_paths=True, private_addresses=True, operators_token=False, any_run_dir=True)
OWNER = replace(CALLER, operators_token=True)


def client_access() -> Access:
    """Return what a request over HTTP may reach, as the operator's environment says: by default nothing of its own."""
    root = os.environ.get(RUN_ROOT)
    return Access(
        _is_on(LOCAL_PATHS), _is_on(PRIVATE_ADDRESSES), _is_on(OPERATORS_TOKEN), False, Path(root) if root else None
    )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().casefold() in ("1", "true", "yes", "on")
