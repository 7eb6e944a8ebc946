"""Loading from the Hugging Face hub, its cache, or a folder, with one-line errors."""

from collections.abc import Callable
from pathlib import Path

from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from lab.run.cli import GLUE_WAYS, UserError, is_offline, offline_message


def from_hub(what: str, flag: str, name: str, load: Callable, ways: str = GLUE_WAYS):
    """Runs `load`. UserError if neither the hub nor its cache has `name`; the message adds `ways`, what to do then."""
    try:
        return load()
    except (OSError, ValueError, HTTPError, DatasetGenerationError, SafetensorError) as error:  # absent, truncated, damaged
        if is_offline() and not Path(name).is_dir():
            raise UserError(offline_message(what, name, ways)) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        again = "if a download was interrupted, run the command again to continue it"
        if Path(name).is_dir():
            again = "save or fetch it again"
        raise UserError(f"{flag}: {what} {name} cannot be loaded ({reason}); {again}") from None
