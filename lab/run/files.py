"""All that a run writes or removes goes through here, so that a user's files in its folder are safe.

The run folder holds `written.txt`, the list of the files that runs wrote there. A file is listed before it appears, and one
that exists without being listed is refused, never replaced. `--overwrite` and cleaning up remove what is listed, and folders
that become empty. The process that writes has a lock on the list, which the system releases when the process ends.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO

from lab.run.cli import UserError

RECORD, LIST = "results.json", "written.txt"
HEADER = "# What runs wrote here: --overwrite removes this and nothing else."
PART = ".part"  # the ending of a temporary folder


def read_list(folder: Path) -> list[str] | None:
    """The listed paths below the run folder; None without a list. A listed folder is temporary and ends in .part/. No other
    line, such as one that a full disk cut, names what may be removed."""
    try:
        header, *names = (folder / LIST).read_text(errors="replace").splitlines() or [""]
    except OSError:
        return None
    below = [name for name in names if name and not Path(name).is_absolute() and ".." not in Path(name).parts]
    return [name for name in below if name[-1] != "/" or name.endswith(PART + "/")] if header == HEADER else None


def find_list(path: Path) -> tuple[Path, list[str]] | None:
    """The run folder that a path lies in, and what it lists; None outside of one."""
    found = ((folder, read_list(folder)) for folder in path.parents)
    return next((one for one in found if one[1] is not None), None)


def refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    """UserError for the first of these that exists in a run folder although neither it nor anything in it is listed, or that
    lies below a file."""
    listed = read_list(folder) or []
    for name in names:
        ours = any(one == name or one.startswith(f"{name}/") for one in listed)
        below = [one for one in Path(name).parents if os.path.lexists(folder / one) and not (folder / one).is_dir()]
        if below or (os.path.lexists(folder / name) and not ours):
            name = below[0] if below else name
            raise UserError(f"--output-dir {folder}: {name} exists, but no run wrote it: move it, or name another folder")


def claim(*paths: Path, made: bool = False) -> None:
    """Lists files before they are written. UserError for one that exists and is not ours, unless it was `made` just now."""
    folder, listed = find_list(paths[0]) if paths and find_list(paths[0]) else (None, [])
    temporary = tuple(name for name in listed if name[-1:] == "/")
    names = [path.relative_to(folder).as_posix() + "/" * (path.suffix == PART) for path in paths] if folder else []
    names = [name for name in names if name not in listed and not (temporary and name.startswith(temporary))]
    if not names:
        return
    if not made:
        refuse_foreign(folder, names)
    with open(folder / LIST, "a") as file:
        file.writelines(f"{name}\n" for name in names)
        sync(file)


def remove(path: Path) -> None:
    """Removes what is listed of a run folder, or below a path in it, and the folders that become empty. The record goes
    first: a folder without one is never taken for a complete run."""
    folder, listed = find_list(path / LIST) or (path, [])
    inside = path.relative_to(folder).as_posix() + "/"
    names = [name for name in listed if path == folder or name.startswith(inside)]
    for name in sorted(names, key=lambda name: name != RECORD):
        one = folder / name
        if name[-1] == "/" and not one.is_symlink():
            shutil.rmtree(one, ignore_errors=True)
        elif one.is_symlink() or one.is_file():
            one.unlink()
        if name == RECORD:
            sync_folder(folder)
        for parent in one.parents[: len(Path(name).parts) - 1]:
            try:
                parent.rmdir()
            except OSError:  # it is not empty
                break


@contextmanager
def written(target: Path, folder: bool = False, new_only: bool = False) -> Iterator[Path]:
    """Yields a path to write a file to, or a `folder` to fill. It becomes `target` in one step, once it is on the disk: a
    kill leaves the old one or the new one. It lies in a temporary folder that did not exist before. `new_only`: a file for
    the user, which is not listed and replaces nothing."""
    part = make_part(target.parent)
    new = part / target.name
    try:
        if folder:
            new.mkdir()
        yield new
        files = [path for path in sorted(new.rglob("*")) if path.is_file()] if folder else [new]
        for path in files:
            with open(path, "rb+") as file:
                sync(file)
        places = [target / path.relative_to(new) for path in files]
        if not new_only:
            claim(*places)
        elif os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists")
        if folder and target.is_dir():  # of an earlier attempt, maybe with files of the user
            for path, place in zip(files, places):
                os.replace(path, place)
        else:
            os.replace(new, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_part(parent: Path) -> Path:
    """A new temporary folder. One that a killed run left is removed."""
    folder, listed = find_list(parent / LIST) or (parent, [])
    for number in count():
        part = parent / f"unfinished{number or ''}{PART}"
        if f"{part.relative_to(folder).as_posix()}/" in listed and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        try:
            if not os.path.lexists(part):
                claim(part, made=True)
                part.mkdir()
                return part
        except FileExistsError:  # made by another process since
            pass


def write_json(path: Path, content: dict) -> None:
    """Writes atomically: a reader finds the old file or the new one, also after a crash."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with written(path) as new:
        new.write_text(text)


def sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def lock_list(folder: Path) -> IO:
    """The list of a run folder, made if there is none. It is locked until it is closed or the process ends. UserError if
    another process has it, or if a file of that name is not such a list."""
    descriptor = os.open(folder / LIST, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    file, flag = open(descriptor, "r+", errors="replace"), f"--output-dir {folder}:"
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)  # behind the text, since others cannot read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
    except OSError as error:  # another one: a file system that has no locks
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            file.close()
            raise UserError(f"{flag} another process is writing there; wait until it ends, or name another folder") from None
    text = file.read()
    if text and not text.startswith(HEADER + "\n"):
        file.close()
        raise UserError(f"{flag} {LIST} exists, but no run wrote it: move it, or name another folder")
    file.write("" if text.endswith("\n") else "\n" if text else HEADER + "\n")  # a kill may have cut the last line
    sync(file)
    return file
