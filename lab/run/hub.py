"""Loading from the Hugging Face hub, its cache, or a folder, with one-line errors."""

from collections.abc import Callable
from pathlib import Path

from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from lab.run.cli import GLUE_WAYS, UserError, is_offline, offline_message


def from_hub(what: str, flag: str, name: str, load: Callable, ways: str = GLUE_WAYS):
    """Runs `load`; where the hub or its cache cannot give `name`, UserError names the ways on."""
    try:
        return load()
    except (OSError, ValueError, HTTPError, DatasetGenerationError, SafetensorError) as error:  # absent, cut off, damaged
        if is_offline() and not Path(name).is_dir():
            raise UserError(offline_message(what, name, ways)) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        again = "a download that broke off goes on where it stopped when the command is run again"
        if Path(name).is_dir():
            again = "save or fetch it again"
        raise UserError(f"{flag}: {what} {name} cannot be loaded ({reason}); {again}") from None
