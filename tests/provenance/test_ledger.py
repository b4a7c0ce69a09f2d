from pathlib import Path

import pytest

from mole.errors import CorruptFileError
from mole.provenance import Ledger


def test_the_same_fact_is_written_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a" / "ledger.jsonl")
    first = ledger.append([{"type": "zoo", "digest": "x"}, {"type": "generator"}])
    assert Ledger(ledger.path).append([{"digest": "x", "type": "zoo"}]) == first[:1]
    assert [r["type"] for r in Ledger(ledger.path).records] == ["zoo", "generator"]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([{"n": 1}, {"n": 2}])
    text = ledger.path.read_text()
    ledger.path.write_text(text[:-10])
    again = Ledger(ledger.path)
    assert [r["n"] for r in again.records] == [1]
    again.append([{"n": 2}])
    assert ledger.path.read_text() == text


def test_an_altered_line_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([{"n": 1}, {"n": 2}])
    ledger.path.write_text(ledger.path.read_text().replace('"n": 2', '"n": 3'))
    with pytest.raises(CorruptFileError, match=r"ledger\.jsonl:2: altered after it was written"):
        Ledger(ledger.path)
    ledger.path.write_text("[]\n")
    with pytest.raises(CorruptFileError, match=r"ledger\.jsonl:1: not a record"):
        Ledger(ledger.path)
