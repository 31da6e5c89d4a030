"""A spool file, line by line, in bounded memory whatever is in it: plain, gzip or Zstandard."""

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from hogwild import pulse
from hogwild.errors import ExampleError
from hogwild.examples import parse_line
from hogwild.ledger_records import BadLine, GoodLine

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CHUNK_BYTES = 256 * 1024
# Four bytes of Zstandard can stand for 128 KiB, so this many can become 16 MiB.
ZSTD_CHUNK_BYTES = 512
EXCERPT_BYTES = 200
BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r"


class DamagedFileError(Exception):
    """Compressed content that ends too early or is not what its name says. None of it is trained."""


def content_hash(path: Path) -> tuple[str, int]:
    """SHA-256 of the decompressed content, which is the identity of a file whatever it is called, and its length.

    Raises:
        DamagedFileError: it cannot be decompressed to its end.
    """
    digest, length = hashlib.sha256(), 0
    for chunk in read_chunks(path):
        digest.update(chunk)
        length += len(chunk)
    return digest.hexdigest(), length


def raw_hash(path: Path) -> str:
    """SHA-256 of the bytes on disk, for a file that has no readable content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path, max_line_bytes: int) -> Iterator[GoodLine | BadLine]:
    """Every line of a file that is not blank, parsed. Offsets are in the decompressed content.

    Raises:
        DamagedFileError: see `content_hash`.
    """
    yield from parse_lines(read_chunks(path), max_line_bytes)


def parse_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[GoodLine | BadLine]:
    """As `read_lines`, of content that comes in pieces."""
    any_line = False
    for line_no, offset, raw, length in split_lines(chunks, max_line_bytes):
        if not raw.strip(_BLANK):
            continue
        any_line = True
        if length > max_line_bytes:
            reason = f"longer than spool.max_line_bytes ({max_line_bytes})"
            yield BadLine(line_no, offset, None, reason, _excerpt(raw))
            continue
        try:
            yield GoodLine(line_no, offset, raw, parse_line(raw))
        except ExampleError as error:
            yield BadLine(line_no, offset, error.field, error.reason, _excerpt(raw))
    if not any_line:
        yield BadLine(0, 0, None, "the file is empty", "")


def split_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[tuple[int, int, bytes, int]]:
    r"""Splits at \n: (line number from 1, byte offset, the line, its length).

    Of a line longer than `max_line_bytes` only the beginning is kept; the length is the true one. A byte
    order mark at the start of the file is skipped.
    """
    line_no, offset, length = 1, 0, 0
    held: list[bytes] = []
    kept = 0

    def keep(piece: bytes) -> None:
        nonlocal kept, length
        length += len(piece)
        piece = piece[: max(0, max_line_bytes - kept)]
        if piece:
            held.append(piece)
            kept += len(piece)

    def line() -> tuple[int, int, bytes, int]:
        raw = b"".join(held)
        return line_no, offset, raw.removeprefix(BOM) if line_no == 1 else raw, length

    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        keep(first)
        for piece in rest:
            yield line()
            line_no, offset, length, kept = line_no + 1, offset + length + 1, 0, 0
            held.clear()
            keep(piece)
    if length:
        yield line()


def _excerpt(raw: bytes) -> str:
    return raw[:EXCERPT_BYTES].decode("utf-8", "replace")


def read_chunks(path: Path) -> Iterator[bytes]:
    """Decompressed content in pieces of bounded size.

    Raises:
        DamagedFileError: see `content_hash`.
    """
    with path.open("rb") as file:
        for chunk in unpack(file, path.name):
            pulse.beat()
            yield chunk


def unpack(file: BinaryIO, name: str) -> Iterator[bytes]:
    """As `read_chunks`, of an open file; its name says how it is compressed."""
    try:
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as unzipped:
                while chunk := unzipped.read(CHUNK_BYTES):
                    yield chunk
        elif name.endswith(".zst"):
            yield from _unzstd(file)
        else:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise DamagedFileError(f"cannot be decompressed: {error}") from error


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own readers take a file that was cut off for a complete one."""
    frame = None
    while data := file.read(ZSTD_CHUNK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")
