"""Lists of counts of any lengths, kept as one column of numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

Column: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
"""Integers of 64 bits, in one dimension unless said otherwise."""


class Rows:
    """Rows of counts (`0 .. 2**63 - 1`), such as shapes; those of one length can be had as one array."""

    __slots__ = ("_flat", "_starts", "lengths", "lists")

    def __init__(self, lists: Sequence[Sequence[int]], flat: Column | None = None) -> None:
        """`flat` = the numbers of all rows, where they are known as a column already."""
        self.lists = lists
        self.lengths: Column = np.fromiter(map(len, lists), np.int64, len(lists))
        self._starts: Column = np.cumsum(self.lengths) - self.lengths
        self._flat: Column = np.fromiter(chain.from_iterable(lists), np.int64) if flat is None else flat

    def __len__(self) -> int:
        return len(self.lists)

    def taken(self, numbers: Column, length: int) -> Column:
        """The rows of these numbers, all of this length, as an array of two dimensions."""
        # Not padded to the longest row: one row of 64 numbers among a million of none would cost half a gigabyte.
        found: Column = self._flat[self._starts[numbers][:, None] + np.arange(length)]
        return found
