"""Rows that say the same: exact copies by a hash, near copies by MinHash, banding and a check of each pair.

Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", 3rd edition, sections 3.2 to 3.4."""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

SHINGLE = 5  # characters; section 3.2.2 of the book proposes 5 for short documents
EDGE = "\0" * (SHINGLE - 1)  # put at both ends, so that an edit weighs the same wherever it is
THRESHOLD = 0.8
BANDS, BAND_HASHES = 12, 4  # finds a pair of Jaccard similarity s with probability 1 - (1 - s^4)^12
HASHES = BANDS * BAND_HASHES
LEAST_EQUAL = 32  # of HASHES; a pair at the threshold has fewer in 1 of 100 cases
NEIGHBOURS = 16  # so many rows of its bucket a row is compared with
FAILED_CHECKS = 5  # after so many a row is not checked again: it is one of very many of one template
BLOCK = 1 << 16  # characters hashed together: about what fits in a core's cache
SPOOL = 1 << 24  # bytes of text that are kept in memory before a file is made
PAIRS = 256  # checked together, for the same reason

_draw = np.random.default_rng(0x5EED)
_FACTORS = _draw.integers(0, 2**32, HASHES, dtype=np.uint32) | np.uint32(1)
_OFFSETS = _draw.integers(0, 2**32, HASHES, dtype=np.uint32)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, place, 2**64) for place in range(SHINGLE)], dtype=np.uint64)


class NearDuplicates:
    """Finds rows whose texts are copies of each other, or nearly.

    A text's shingles are its runs of SHINGLE characters, after letter case and the amount of white space
    are evened out and EDGE is put at both ends.  Two texts are near copies when the Jaccard similarity of
    their shingles, shared ones over all, is at least THRESHOLD.  Each link is checked, so no group
    rests on an estimate.  A link at similarity 0.8 is found with a probability of 99 %, at 0.9 of more
    than 99.99 %, but less where very many rows are made from one template: see FAILED_CHECKS.

    Holds about 210 bytes a row in memory; the texts wait for the check in a file once they are many."""

    def __init__(self) -> None:
        self._spool = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115 - closed with the object
        weakref.finalize(self, self._spool.close)
        self._ends = array("Q", [0])  # where each row's text ends in the spool
        self._hashes = array("Q")  # of the whole text; a million rows have a false match once in 10^7 runs
        self._signatures = bytearray()  # HASHES uint32 a row
        self._waiting: list[str] = []
        self._waiting_characters = 0

    def add(self, text: str) -> None:
        """The next row's text; rows are numbered from 0 in this order."""
        text = " ".join(text.replace("\0", " ").casefold().split())
        data = text.encode("utf-8", "surrogatepass")
        self._spool.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._hashes.append(int.from_bytes(blake2b(data, digest_size=8).digest()))
        self._waiting.append(text)
        self._waiting_characters += len(text)
        if self._waiting_characters >= BLOCK:
            self._sign_waiting()

    def groups(self) -> list[list[int]]:
        """The rows of each group of copies and near copies, in order; a row without any is in none.

        A group is what links reach: its first and its last row may be less alike than THRESHOLD."""
        self._sign_waiting()
        hashes = np.array(self._hashes, dtype=np.uint64)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        parent = first[inverse]  # exact copies point to the first of them
        self._link_near(np.sort(first), parent)
        self._spool.seek(0, os.SEEK_END)  # where the next row goes
        _flatten(parent)
        grouped = np.flatnonzero(np.bincount(parent, minlength=1)[parent] > 1)
        order = grouped[np.argsort(parent[grouped], kind="stable")]
        starts = np.flatnonzero(np.diff(parent[order])) + 1
        return [group.tolist() for group in np.split(order, starts) if len(group)]

    def _sign_waiting(self) -> None:
        if self._waiting:
            self._signatures += _signatures(self._waiting).tobytes()
            self._waiting, self._waiting_characters = [], 0

    def _link_near(self, rows: Rows, parent: Rows) -> None:
        """Join the groups of every near pair among ``rows`` in ``parent``."""
        signed = np.frombuffer(self._signatures, dtype=np.uint32).reshape(-1, HASHES)
        failed = np.zeros(len(parent), dtype=np.uint16)
        for band in range(0, HASHES, BAND_HASHES):
            keys = signed[:, band : band + BAND_HASHES][rows].astype(np.uint64) @ _POWERS[1 : BAND_HASHES + 1]
            order = np.argsort(keys, kind="stable")
            for one, other in _neighbours(rows[order], keys[order], parent):
                hopeful = np.maximum(failed[one], failed[other]) < FAILED_CHECKS
                left, right = _likely(signed, one[hopeful], other[hopeful])
                near = self._similarity(left, right) >= THRESHOLD
                np.add.at(failed, np.concatenate([left[~near], right[~near]]), 1)
                for pair in zip(left[near].tolist(), right[near].tolist(), strict=True):
                    roots = [_root(parent, row) for row in pair]
                    parent[max(roots)] = min(roots)

    def _similarity(self, left: Rows, right: Rows) -> NDArray[np.float64]:
        """Jaccard similarity of the shingles of each pair, counted on 55 bits of each shingle's hash."""
        found = np.empty(len(left))
        for at in range(0, len(left), PAIRS):
            pairs = np.concatenate([left[at : at + PAIRS], right[at : at + PAIRS]])
            hashes, counts = _shingle_hashes([self._text(row) for row in pairs.tolist()])
            half = np.uint64(len(pairs) // 2)
            text = np.repeat(np.arange(len(pairs), dtype=np.uint64), counts)
            pair, side = text % half, text // half
            keys = np.sort((pair << np.uint64(56)) | (hashes >> np.uint64(9) << np.uint64(1)) | side)
            keys = keys[np.append(True, keys[1:] != keys[:-1])]  # a shingle counts once a text
            shared = np.append(False, keys[1:] >> np.uint64(1) == keys[:-1] >> np.uint64(1))
            pair = (keys >> np.uint64(56)).astype(np.int64)
            found[at : at + PAIRS] = np.bincount(pair, shared) / np.bincount(pair, ~shared)
        return found

    def _text(self, row: int) -> str:
        self._spool.seek(self._ends[row])
        return self._spool.read(self._ends[row + 1] - self._ends[row]).decode("utf-8", "surrogatepass")


def _shingle_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], Rows]:
    """Of each shingle of each text a hash of 64 bits, all texts in one row, and how many each text has."""
    padded = [f"{EDGE}{text}{EDGE}" for text in texts]
    lengths = np.array([len(text) for text in padded])
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    runs = sum(codes[place : len(codes) - SHINGLE + 1 + place] * _POWERS[place] for place in range(SHINGLE))
    inside = np.ones(len(codes), dtype=bool)
    for back in range(1, SHINGLE):
        inside[np.cumsum(lengths) - back] = False  # a run that starts here reaches into the next text
    mixed = runs[inside[: len(runs)]]
    return (mixed ^ (mixed >> np.uint64(29))) * _POWERS[1], lengths - (SHINGLE - 1)


def _signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash of each text, (texts, HASHES): the share that two have alike estimates their similarity."""
    hashes, counts = _shingle_hashes(texts)
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    starts = np.cumsum(counts) - counts
    return np.stack(
        [np.minimum.reduceat(short * a + b, starts) for a, b in zip(_FACTORS, _OFFSETS, strict=True)], axis=1
    )


def _likely(signed: NDArray[np.uint32], left: Rows, right: Rows) -> tuple[Rows, Rows]:
    """Those pairs whose signatures are alike enough to be worth the check."""
    equal = np.empty(len(left), dtype=np.int64)
    for at in range(0, len(left), BLOCK):
        part = slice(at, at + BLOCK)
        equal[part] = (signed[left[part]] == signed[right[part]]).sum(axis=1)
    return left[equal >= LEAST_EQUAL], right[equal >= LEAST_EQUAL]


def _neighbours(rows: Rows, keys: NDArray[np.uint64], parent: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of rows of one bucket that are not in one group yet, those beside each other first."""
    for distance in range(1, NEIGHBOURS + 1):
        together = np.flatnonzero(keys[distance:] == keys[:-distance])
        _flatten(parent)
        left, right = rows[together], rows[together + distance]
        apart = parent[left] != parent[right]
        yield left[apart], right[apart]


def _root(parent: Rows, row: int) -> int:
    while parent[row] != row:
        row = int(parent[row])
    return row


def _flatten(parent: Rows) -> None:
    """Let every row point to its group's first row."""
    while not np.array_equal(above := parent[parent], parent):
        parent[:] = above
