"""Command lines that fail in one clear line. Standard library only, so that --help answers at once."""

import argparse
import errno
import math
import os
import re
import signal
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BAD_INPUT, FAILED, CLOSED_PIPE = 2, 1, 141  # exit codes; for a signal 128 + its number
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LONGEST, LONG_WORD = 400, 80  # characters of a line that reports a failure, and of a word in one that is too long
GRACE = 3  # seconds that another process waits for process 0 to report the same failure
CONTINUE = "the same command with --resume continues"


class UserError(Exception):
    """Bad input. The message names the flag and the fix. The script prints it as one line and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot continue, such as one with a NaN loss. The message names the step and the fix. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS. Its args: what is saved and how to continue, and the signal's number. Exit code 128 + number."""


def printable(text: str) -> str:
    """The text as one line: what could change the terminal, such as a line break or a colour, is written as `\\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def say(*lines: str) -> None:
    """Prints lines on stdout, from one process. All that the scripts print there goes through here."""
    if os.environ.get("RANK", "0") == "0":
        print(*map(printable, lines), sep="\n")


def cut(name: str) -> str:
    """A very long name without its middle."""
    return name if len(name) <= LONG_WORD else f"{name[: LONG_WORD // 2]}...{name[-LONG_WORD // 2 :]}"


def report(line: str, process: str = "0") -> None:
    """Prints a line on stderr, from one process. A very long one loses the middle of its long names, so that the reason and
    the fix stay, and its own middle only if it is still too long."""
    line, half = printable(line), LONGEST // 2
    if len(line) > LONGEST:
        line = re.sub(r"\S+", lambda word: cut(word[0]), line)
    line = line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"
    with suppress(OSError, RuntimeError):  # a closed pipe; a signal that came while a line was printed
        if sys.stderr and os.environ.get("RANK", "0") == process:
            print(line, file=sys.stderr)


def layout(lines: list[list[str]]) -> str:
    """Aligns cells in columns. The first line is the header. Empty columns are left out."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    lines = [list(line) for line in zip(*columns, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)


class Parser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, no abbreviated flags, and one-line errors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        report(f"{self.prog}: error: {message}")
        self.exit(BAD_INPUT)

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)  # argparse would pass over a closed pipe and a full disk


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden else super()._get_help_string(action)


def number(convert: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float within [low, high]."""

    def parse(text: str):
        with suppress(ValueError):
            if low <= (value := convert(text)) <= high and value < math.inf:  # NaN fails the comparison
                return value
        bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise argparse.ArgumentTypeError(f"{text!r} must be a{'n integer' if convert is int else ' number'} {bounds}")

    return parse


def path(kind: str) -> Callable[[str], str]:
    """An argparse type: a path, with the `~` that a shell leaves in --flag=~/path expanded. `kind`: file or folder, for one
    that can be read; new file, for one in a folder that exists; new folder; model, for a folder or a name of the hub."""
    what = kind.replace("model", "folder").removeprefix("new ")
    is_right, access = (stat.S_ISDIR, os.R_OK | os.X_OK) if what == "folder" else (stat.S_ISREG, os.R_OK)

    def parse(text: str) -> str:
        name = os.path.expanduser(text)
        try:
            name.encode()  # libraries take no other names
            fits = is_right(os.stat(name).st_mode) and os.access(name, access)
            reason = None if fits else f"it is not a {what} that can be read"
        except FileNotFoundError:
            long = max(map(len, name.encode().split(b"/"))) > 255  # which the system finds after making the folders above
            fits = what != kind and (kind != "new file" or os.path.isdir(os.path.dirname(name) or "."))
            absent = "folder" if kind == "new file" else what
            reason = "File name too long" if long else None if fits else f"no such {absent}"
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeError) else getattr(error, "strerror", error)
        if not text or name.startswith("~"):
            reason = "there is no such user" if text else "the name is empty"
        if reason:
            raise argparse.ArgumentTypeError(f"{cut(repr(text))}: {reason}; name another {what}, or leave the flag out")
        return name

    return parse


def handle_signals(handler: Callable) -> Callable[[], object]:
    """Sets the handler of SIGNALS, except of those that are ignored, as SIGHUP is under nohup. Returns what undoes it."""
    before = {number: signal.signal(number, handler) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    return lambda: [*map(signal.signal, before.keys(), before.values())]


def run_main(prog: str, main: Callable, resumes: bool = True):
    """Runs a script's main, or a part of it such as the parsing of its options, and returns the result. Bad input, failures,
    signals and a closed pipe become an exit code and at most one line on stderr, from process 0, or from another one if that
    fails alone. Signals do so from then on, also between two parts. `resumes`: the script trains, and the same command with
    --resume continues."""
    at_work, line = True, None

    def on_signal(number, _):
        if at_work:
            raise Interrupted("", number)
        if line is None:  # between two parts: an exception would end up in a library's imports
            report(f"{prog}: interrupted")
        os._exit(128 + number)

    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a pipe may have an encoding of few characters
    with suppress(AttributeError):  # there is none
        sys.stdin.reconfigure(errors="replace")
    handle_signals(on_signal)
    try:
        return main()
    except SystemExit as error:
        line, code = "", error.code
    except UserError as error:
        line, code = f"error: {error}", BAD_INPUT
    except RunFailed as error:
        line, code = f"stopped: {error}", FAILED
    except BrokenPipeError:  # of `| head -1`
        line, code = "", CLOSED_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        line, code = f"stopped: {error}; free the disk{', then ' + CONTINUE if resumes else ''}", FAILED
    except (MemoryError, RuntimeError) as error:
        text = "out of memory" if isinstance(error, MemoryError) else str(error)
        if not (found := re.search(r"(out of|not enough|can't allocate) memory[^\n]{,60}", text)):
            raise
        line, code = f"stopped: {found[0]}; lower --batch-size or --max-length, or use a smaller model", FAILED
    except KeyboardInterrupt as error:
        said, number = error.args or ("", signal.SIGINT)
        said = said or f"finished runs are kept, {CONTINUE}" * resumes
        line, code = f"interrupted{': ' * bool(said)}{said}", 128 + number
    finally:
        at_work = False
    if line:
        report(f"{prog}: {line}")
        rank = os.environ.get("RANK", "0")
        if rank != "0" and code in (BAD_INPUT, FAILED):
            time.sleep(GRACE)  # the launcher ends this process meanwhile, if process 0 has failed too
            report(f"{prog}: process {rank}: {line}", rank)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # Python tries again at its end, and fails with an exit code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
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
    return os.path.isdir(os.path.join(os.path.expanduser(cache), f"models--{name.replace('/', '--')}"))
