"""Command lines that fail in one clear line. Standard library only, so that --help answers at once."""

import argparse
import errno
import math
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit codes
CONTINUE = "the same command with --resume continues"


class UserError(Exception):
    """Bad input. The message names the flag and the fix. The script prints it as one line and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot continue, such as one with a NaN loss. The message names the step and the fix. Exit code 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM. The message says what is saved and how to continue. Exit code 130."""


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


def number(convert: type, low: float, high: float | None = None) -> Callable[[str], float]:
    """An argparse type: an int or a float within [low, high]."""

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not low <= value < math.inf or (high is not None and value > high):  # NaN fails the comparison
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a{'n integer' if convert is int else ' number'} {bounds}")
        return value

    return parse


def run_main(prog: str, main: Callable[[], None], resumes: bool = True) -> None:
    """Runs a script's main. Bad input, failures and Ctrl-C become an exit code and one line on stderr, from one process.
    `resumes`: the script trains, and the same command with --resume continues."""
    try:
        main()
        return
    except UserError as error:
        line, code = f"error: {error}", BAD_INPUT
    except RunFailed as error:
        line, code = f"stopped: {error}", FAILED
    except Interrupted as error:
        line, code = f"interrupted: {error}", INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        line, code = f"stopped: {error}; free the disk{', then ' + CONTINUE if resumes else ''}", FAILED
    except (MemoryError, RuntimeError) as error:
        text = "out of memory" if isinstance(error, MemoryError) else str(error)
        if not (found := re.search(r"(out of|not enough|can't allocate) memory[^\n]{,60}", text)):
            raise
        line, code = f"stopped: {found[0]}; lower --batch-size or --max-length, or use a smaller model", FAILED
    except KeyboardInterrupt:
        line, code = f"interrupted{'; finished runs are kept, ' + CONTINUE if resumes else ''}", INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {line}", file=sys.stderr)
    sys.exit(code)


def is_offline() -> bool:
    """Whether the environment sets the Hugging Face libraries to offline mode."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def hub_is_reachable(parser: Parser, seconds: float = 6.0) -> bool:
    """Whether the model and data hub answers. If it does not, this sets the Hugging Face libraries to offline mode, so that
    they use their cache at once instead of retrying for minutes. Call it before they are imported."""
    if is_offline():
        return False
    url, answers = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), []
    if not url.startswith(("https://", "http://")):
        parser.error(f"HF_ENDPOINT={url:.80} is not an address: it must begin with https://, or be unset")

    def ask():
        with suppress(Exception):  # of urllib: no connection, or an odd address
            with suppress(urllib.error.HTTPError):  # it answered, too
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no timeout of its own
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return bool(answers)


GLUE_WAYS = "give local folders (--model DIR --data-dir DIR), or try the whole path without any download (--toy)"


def offline_message(what: str, name: str, ways: str) -> str:
    """The error message for a `name` that is not in the cache while the hub cannot be reached."""
    return f"{what} {name} is not in the local cache and the Hugging Face hub cannot be reached: {ways}"


def model_is_cached(name: str) -> bool:
    """Whether the hub's cache on this disk has the model. Only looks for a folder and imports nothing heavy."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}").is_dir()
