"""Packed models that are damaged, or that an older version wrote."""

import json

from mmfree_jax.saved.kinds import PACKED_FILE


def damaged(packed, tmp_path, change):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / PACKED_FILE).write_bytes(change((packed[0] / PACKED_FILE).read_bytes()))
    return folder


def flip(at):
    def change(data):
        changed = bytearray(data)
        changed[at] ^= 1
        return bytes(changed)

    return change


def of_older_version(data):
    """Without the header's own checksum, so that a change of the header shows as what it is."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"].pop("sha256")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def older_with(old, new):
    return lambda data: of_older_version(data).replace(old, new)
