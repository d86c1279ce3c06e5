"""Tiny SWORD modules for the tests."""

import struct
import zlib


def write_blocks(folder, name, blocks):
    """The `.bzs` and `.bzz` of a testament whose blocks are given."""
    folder.mkdir(parents=True, exist_ok=True)
    packed, index = b"", b""
    for block in blocks:
        raw = block.encode()
        compressed = zlib.compress(raw)
        index += struct.pack("<III", len(packed), len(compressed), len(raw))
        packed += compressed
    (folder / f"{name}.bzs").write_bytes(index)
    (folder / f"{name}.bzz").write_bytes(packed)
    return index, packed


def write_module(folder, name, books):
    """A testament of {book: [[verse, verse, ...] of each chapter]}; a block for each book, as the real ones have."""
    blocks, entries = ["<milestone/>"], [(0, 0, 0), (0, 0, 12)]
    for number, (book, chapters) in enumerate(books.items(), 1):
        texts = [f'<div canonical="true" osisID="{book}" sID="b" type="book"/><title type="main">{book}</title>']
        for place, verses in enumerate(chapters, 1):
            texts += [f'<chapter n="{place}" osisID="{book}.{place}" sID="{book}.{place}"/>', *verses]
        texts[-1] += f'<chapter eID="{book}.{place}"/><div canonical="true" eID="b" osisID="{book}" type="book"/>'
        offset = 0
        for text in texts:
            size = len(text.encode())
            entries.append((number if size else 0, offset if size else 0, size))
            offset += size
        blocks.append("".join(texts))
    write_blocks(folder, name, blocks)
    (folder / f"{name}.bzv").write_bytes(b"".join(struct.pack("<IIH", *entry) for entry in entries))
