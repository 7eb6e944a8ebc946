"""Command lines that fail in one clear line. Standard library only, so that --help answers at once."""

import argparse
import errno
import math
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit codes
GO_ON = "the same command with --resume goes on"


class UserError(Exception):
    """Bad input. The message names the flag and the fix; the script prints it as one line and exits with 2."""


class RunFailed(Exception):
    """A run that cannot go on (a loss that is NaN). The message names the step and a way out; exit code 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM. The message says what is saved and how to go on; exit code 130."""


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown where there is one to show, and the description's line breaks kept."""

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
    """Runs a script's main; bad input, failures and Ctrl-C become one line on stderr (of one process) and an exit code.
    `resumes`: it trains, and the same command with --resume goes on."""
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
        line, code = f"stopped: {error}; free the disk{', then ' + GO_ON if resumes else ''}", FAILED
    except KeyboardInterrupt:
        line, code = f"interrupted{'; finished runs are kept, ' + GO_ON if resumes else ''}", INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {line}", file=sys.stderr)
    sys.exit(code)


def is_offline() -> bool:
    """Whether the Hugging Face libraries were told to stay offline."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_is_reachable(seconds: float = 6.0) -> bool:
    """Whether the model and data hub answers at all. Where it does not, the Hugging Face libraries are told to use their
    cache only, which they otherwise find out after minutes of retries. Call it before they are imported."""
    if is_offline():
        return False
    answers = []

    def ask():
        try:
            url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # it answered
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up has no timeout of its own
    thread.start()
    thread.join(seconds)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    return bool(answers)


GLUE_WAYS = "give local folders (--model DIR --data-dir DIR), or try the whole path without any download (--toy)"


def offline_message(what: str, name: str, ways: str) -> str:
    """What to do where the hub cannot be reached and `name` was never fetched."""
    return f"{what} {name} is not in the local cache and the Hugging Face hub cannot be reached: {ways}"


def model_is_cached(name: str) -> bool:
    """Whether the hub's cache on this disk knows the model: a look at one folder, without importing anything heavy."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}").is_dir()
