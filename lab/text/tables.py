"""Files of sentences, one example per row, read and written without any change of the text: csv, tsv, jsonl and parquet.

CHOICE: text is read by the standard library, not by the builders of `datasets`. Those silently shift the
columns of a csv row with a comma too many, fill up short rows, and turn a sentence "2020-01-01" into a date.
"""

import csv
import json
import textwrap
from hashlib import sha256
from pathlib import Path

import pyarrow
from pyarrow.parquet import ParquetFile, write_table

from lab.run.cli import UserError
from lab.run.reading import parse_json, without_repeats

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # .json also means JSON lines
Rows = list[dict] | pyarrow.Table


def read_parquet(file: Path) -> tuple[pyarrow.Table, str]:
    """The table in exactly this file, and the hash of its content. ArrowInvalid for text that is not UTF-8, too.

    The file is opened here: pyarrow takes a name with a colon as an address, `datasets` a name as a pattern.
    """
    content = file.read_bytes()
    table = ParquetFile(pyarrow.BufferReader(content)).read()
    table.validate(full=True)
    without_repeats([(name, None) for name in table.column_names])
    return table, sha256(content).hexdigest()


def read_rows(file: Path) -> Rows:
    """All rows. No text of a csv or tsv becomes a number or a missing value. ValueError for a row that does not fit.

    A tsv has GLUE's format: a quote has no special meaning, and no field contains a tab or a line break. A blank line is a
    row if the csv or tsv has one column, and is skipped otherwise.
    """
    kind, rows = file.suffix.lower(), []
    if kind == ".parquet":
        return read_parquet(file)[0]
    with open(file, encoding="utf-8-sig", newline="" if kind == ".csv" else "\n") as lines:
        if kind in (".jsonl", ".json"):
            return [parse_json(line, f"line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
        csv.field_size_limit(2**31 - 1)  # of characters; without it 131,072
        table = csv.reader(lines, strict=True) if kind == ".csv" else (line.rstrip("\r\n").split("\t") for line in lines)
        header = next(table, [])
        without_repeats([(name, None) for name in header])
        for fields in table:
            if len(fields or [""]) == len(header):
                rows.append(dict(zip(header, fields or [""])))
            elif fields not in ([], [""]):
                raise ValueError(f"row {len(rows) + 1} has {len(fields)} fields, the header has {len(header)}")
    return rows


def load_rows(file: Path, columns: list[str], new: list[str]) -> tuple[Rows, list[list[str]]]:
    """The rows of a file, and one list of sentences per name in `columns`. `new`: column names that must not exist yet.

    UserError for a file that is missing, unreadable or empty, and for a row without text in one of `columns`.
    """
    where = f"--predict {file}"
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{where}: the name must end in one of {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise UserError(f"{where}: no such file; give an existing one")
    try:
        rows = read_rows(file)
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{where} cannot be read as {file.suffix} ({str(error).splitlines()[0]}): fix it") from error
    if not len(rows):
        raise UserError(f"{where} has no rows: it needs one per example and, in csv and tsv, a header line")
    arrow = isinstance(rows, pyarrow.Table)
    found = rows.column_names if arrow else list(dict.fromkeys(name for row in rows for name in row))
    if not set(columns) <= set(found):
        have = textwrap.shorten(", ".join(found), 100, placeholder=" ...")
        raise UserError(f"{where}: the model needs the columns {', '.join(columns)}; the file has {have}: add them")
    if set(new) & set(found):
        raise UserError(f"{where} already has a column {min(set(new) & set(found))}: rename or remove it")
    sentences = [rows[name].to_pylist() if arrow else [row.get(name) for row in rows] for name in columns]
    for name, texts in zip(columns, sentences):
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
                what = "null" if text is None else "broken Unicode" if isinstance(text, str) else f"a {type(text).__name__}"
                raise UserError(f"{where}: {name} of row {number} is {what}; put text there (it may be empty)")
    return rows, sentences


def write_rows(target: Path, kind: str, rows: Rows, new: dict[str, list]) -> None:
    """Writes the rows with new columns added at the end. `kind`: the format's suffix; the target may have another suffix."""
    if isinstance(rows, pyarrow.Table):
        for name, values in new.items():
            rows = rows.append_column(name, [values])
        with open(target, "wb") as out:
            return write_table(rows, out)
    rows = [row | dict(zip(new, values)) for row, values in zip(rows, zip(*new.values()))]
    table = [rows[0].keys(), *(row.values() for row in rows)]
    with open(target, "w", encoding="utf-8", newline="", errors="backslashreplace") as out:  # \ud800, as in JSON
        if kind == ".csv":
            # quotes all text: otherwise Python 3.11 writes a lone carriage return unquoted, which is read as a new row
            csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(table)
        elif kind == ".tsv":
            out.writelines("\t".join(map(str, fields)) + "\n" for fields in table)
        else:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
