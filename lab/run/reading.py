"""JSON from outside: objects only, of the kinds that are needed. ValueError, in one line, for anything else."""

import json
from pathlib import Path


def read_json(path: Path, /, **kinds) -> dict:
    """The object in a file, with values of these kinds, see `fits`, under these keys. `int | None`: it may be absent."""
    return parse_json(path.read_bytes(), path.name, **kinds)


def parse_json(text: str | bytes, name: str, /, **kinds) -> dict:
    try:
        content = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a JSON object: {error}") from None
    return check_kinds(content, name, **kinds)


def check_kinds(content: object, name: str, /, **kinds) -> dict:
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    if wrong := [key for key, kind in kinds.items() if not fits(content.get(key), kind)]:
        raise ValueError(f"{name} has no valid {wrong[0]}")
    return content


def fits(value: object, kind) -> bool:
    """Whether a value is of a kind: a type or a union; [kind], a list of such values; {key: kind}, an object."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(key), own) for key, own in kind.items())
    return isinstance(value, kind)


def name_repeated(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict. If a key is given twice, its name is under the key None."""
    found, names = dict(pairs), [name for name, _ in pairs]
    return found if len(found) == len(names) else {**found, None: max(names, key=names.count)}


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """The same. ValueError if a key is given twice, since one of its values would be lost."""
    found = name_repeated(pairs)
    if None in found:
        raise ValueError(f"{found[None]!r:.60} is there twice")
    return found
