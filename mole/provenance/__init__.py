"""Where every generated network came from: an append-only ledger of JSON lines."""

from mole.provenance.ledger import Ledger

__all__ = ["Ledger"]
