"""Command lines that fail in one clear line. Standard library only, so that --help answers at once."""

import argparse
import errno
import math
import os
import signal
import stat
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BAD_INPUT, FAILED, CLOSED_PIPE = 2, 1, 141  # exit codes; for a signal 128 + its number
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LONGEST = 400  # characters of a line that reports a failure
CONTINUE = "the same command with --resume continues"


class UserError(Exception):
    """Bad input. The message names the flag and the fix. The script prints it as one line and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot continue, such as one with a NaN loss. The message names the step and the fix. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS, by its number. The message says what is saved and how to continue. Exit code 128 + number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def printable(text: str) -> str:
    """The text as one line: what could change the terminal, such as a line break or a colour, is written as `\\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def say(*lines: str) -> None:
    """Prints lines on stdout. All that the scripts print there goes through here."""
    print(*map(printable, lines), sep="\n")


def report(line: str) -> None:
    """Prints a line on stderr, from one process, and without the middle of a very long one."""
    line, half = printable(line), LONGEST // 2
    line = line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"
    with suppress(OSError, RuntimeError):  # a closed pipe; a signal that came while a line was printed
        if sys.stderr and os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        report(f"{self.prog}: error: {message}")
        self.exit(BAD_INPUT)

    def exit(self, *args):
        sys.stdout.flush()  # --help into a closed pipe or a full disk: argparse would say nothing
        super().exit(*args)


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


def path(kind: str) -> Callable[[str], str]:
    """An argparse type: a path, with the `~` that a shell leaves in --flag=~/path expanded. `kind`: file or folder, for one
    that can be read; new file or new folder, for one that may be absent; model, for a folder or a name of the hub."""
    what, absent = kind.replace("model", "folder").removeprefix("new "), kind not in ("file", "folder")

    def parse(text: str) -> str:
        name, mode, fault = os.path.expanduser(text), None, None
        try:
            name.encode()  # libraries take no other names
            mode = os.stat(name).st_mode
        except FileNotFoundError:
            fault = None if absent else f"no such {what}; give an existing one"
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", error)
            fault = f"{reason}; name another {what}"
        if not text:
            fault = f"the name is empty; name a {what}, or leave the flag out"
        elif name.startswith("~"):
            fault = "there is no such user; give the whole path"
        elif mode and not (stat.S_ISDIR if what == "folder" else stat.S_ISREG)(mode):
            fault = f"it is not a {what}; name another"
        elif mode and not os.access(name, os.R_OK | os.X_OK * (what == "folder")):
            fault = "it cannot be read; change its permissions, or name another"
        if fault:
            raise argparse.ArgumentTypeError(f"{text!r:.80}: {fault}")
        return name

    return parse


def handle_signals(handler) -> dict:
    """Sets the handler of SIGNALS, except of those that are ignored, as SIGHUP is under nohup. Returns the ones before."""
    return {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


def run_main(prog: str, main: Callable, resumes: bool = True):
    """Runs a script's main, or a part of it such as the parsing of its options, and returns the result. Bad input, failures,
    signals and a closed pipe become an exit code and at most one line on stderr, from one process. Signals do so from then
    on, also between two parts. `resumes`: the script trains, and the same command with --resume continues."""

    def interrupt(number, _):
        raise Interrupted("", number)

    def leave(number, _):  # an exception would end up in the imports of a library
        report(f"{prog}: interrupted")
        os._exit(128 + number)

    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a pipe may have an encoding of few characters
    afterwards, line = signal.SIG_DFL, None  # if this fails, the process ends
    handle_signals(interrupt)
    try:
        result = main()
        sys.stdout.flush()
        afterwards = leave
        return result
    except SystemExit as error:
        code = error.code
    except UserError as error:
        line, code = f"error: {error}", BAD_INPUT
    except RunFailed as error:
        line, code = f"stopped: {error}", FAILED
    except BrokenPipeError:  # of `| head -1`
        code = CLOSED_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        line, code = f"stopped: {error}; free the disk{', then ' + CONTINUE if resumes else ''}", FAILED
    except KeyboardInterrupt as error:
        said = str(error) or (f"finished runs are kept, {CONTINUE}" if resumes else "")
        line, code = f"interrupted{': ' * bool(said)}{said}", 128 + getattr(error, "number", signal.SIGINT)
    finally:
        handle_signals(afterwards)
    if line:
        report(f"{prog}: {line}")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # Python tries again at its end, and fails with an exit code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def is_offline() -> bool:
    """Whether the environment sets the Hugging Face libraries to offline mode."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_is_reachable(seconds: float = 6.0) -> bool:
    """Whether the model and data hub answers. If it does not, this sets the Hugging Face libraries to offline mode, so that
    they use their cache at once instead of retrying for minutes. Call it before they are imported."""
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
    """The error message for a `name` that is not in the cache while the hub cannot be reached."""
    return f"{what} {name} is not in the local cache and the Hugging Face hub cannot be reached: {ways}"


def model_is_cached(name: str) -> bool:
    """Whether the hub's cache on this disk has the model. Only looks for a folder and imports nothing heavy."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}").is_dir()
