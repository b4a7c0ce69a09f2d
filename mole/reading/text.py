"""Text, JSON and JSON lines from files of any origin."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mole.errors import CorruptFileError
from mole.reading.guard import TEXT_BYTES, check_file, check_promise


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is no regular file, too large, or not UTF-8.
    """
    check_promise(path, 4 * check_file(path, most))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is no regular file, too large, or not JSON.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise CorruptFileError(f"{path}: not valid JSON ({error}); delete it and run again") from None


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has numbers of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from None
    check_depth(value)
    return value


def check_depth(value: Any, most: int = 100) -> None:
    """Refuse values whose nesting would exhaust whatever walks through them.

    Raises:
        ValueError: a list or dictionary lies deeper than `most`.
    """
    level = [value]
    for _ in range(most):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {most} deep")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of every whole line; None for a line that is not JSON.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: it is no regular file, or too large.
    """
    check_promise(path, check_file(path))
    number = 0
    with path.open("rb") as file:
        while line := file.readline(2**27):
            number += 1
            try:
                yield number, parse_json(line)
            except ValueError:
                yield number, None
