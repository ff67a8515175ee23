"""All arrays of a message as one, for a network.

Flower sends each array of a message as two objects, each with a request of its own, from the server
to the SuperLink, to the SuperNode, to the client, and back: some thirty requests a step for the
fourteen arrays of a small adapter, hundreds for a language model's. Here they travel as one array
whose bytes are theirs, one after the other, behind a header that says which; nothing is
converted, and what comes out is what went in, to the last byte.

The server marks its messages (``MARK``); a client whose app has the mod
``strategies.client.bundled`` answers in one array and with a mark of its own, and gets its messages
so from then on. Any other client sees one more key in its config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from flwr.app import Array, ArrayRecord, RecordDict

MARK = "arrays-in-one"
"""Key of a config: the sender can read bundles."""

KIND = "fedlora.bundle"
"""What a bundle says it is, where other arrays say how numpy wrote them."""

_LENGTH = 8  # bytes that say how long the header is


def marked(content: RecordDict) -> bool:
    """Return whether the sender of a message can read bundles, and take its mark away."""
    found = [record.pop(MARK, None) for record in content.config_records.values()]
    return any(mark is True for mark in found)


def mark(content: RecordDict) -> None:
    """Say in a message that its sender can read bundles; one without a config stays as it is."""
    for record in content.config_records.values():
        record[MARK] = True
        return


def bundle(content: RecordDict) -> None:
    """Replace the arrays of each record of a message by one."""
    for key, record in list(content.array_records.items()):
        if len(record) > 1:
            content[key] = ArrayRecord({KIND: _one(record)})


def unbundle(content: RecordDict) -> None:
    """Put back what ``bundle`` replaced; records without a bundle stay as they are.

    Raises
    ------
    ValueError
        If a bundle is not what it says.
    """
    for key, record in list(content.array_records.items()):
        bundles = [array for array in record.values() if array.stype == KIND]
        if not bundles:
            continue
        if len(record) > 1:
            raise ValueError(f"expected a bundle of arrays alone, got {len(record)} arrays")
        content[key] = ArrayRecord(dict(_all(bundles[0].data)))


def _one(record: ArrayRecord) -> Array:
    about = [[key, a.dtype, list(a.shape), a.stype, len(a.data)] for key, a in record.items()]
    header = json.dumps(about, separators=(",", ":")).encode()
    parts = (len(header).to_bytes(_LENGTH, "big"), header, *(a.data for a in record.values()))
    data = b"".join(parts)
    return Array(dtype="uint8", shape=(len(data),), stype=KIND, data=data)


def _all(data: bytes) -> Iterator[tuple[str, Array]]:
    """Yield names and arrays of a bundle, checked: it may come from anybody."""
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
    try:
        about = json.loads(data[_LENGTH:start])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the header of a bundle cannot be read ({type(error).__name__})"
        ) from None
    if not (isinstance(about, list) and all(map(_is_entry, about))):
        raise ValueError("the header of a bundle does not say what its arrays are")
    if start + sum(entry[4] for entry in about) != len(data):
        raise ValueError(f"a bundle has {len(data)} bytes, which are not those of its arrays")
    if len({entry[0] for entry in about}) != len(about):
        raise ValueError("a bundle has two arrays of one name")
    for key, dtype, shape, stype, size in about:
        yield key, Array(dtype, tuple(shape), stype, data[start : start + size])
        start += size


def _is_entry(entry: object) -> bool:
    """Return whether this is name, type, shape, kind and number of bytes of an array."""
    if not (isinstance(entry, list) and len(entry) == 5):
        return False
    key, dtype, shape, stype, size = entry
    texts = all(isinstance(text, str) for text in (key, dtype, stype)) and stype != KIND
    return texts and isinstance(shape, list) and all(map(_is_size, [*shape, size]))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
