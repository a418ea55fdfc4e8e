# SPDX-License-Identifier: Apache-2.0
"""From stored label values to classes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .reading import IGNORE, DataError

_INVALID = -2  # in the table, for a stored value without a class


class ClassTable:
    """The class of each stored label value.

    Args:
        name: of the dataset, for messages.
        num_classes: number of classes.
        classes: class of each stored value.
        ignore_value: stored value whose pixels get no class (IGNORE); None for no such value.

    Raises:
        DataError: ignore_value leaves no value with a class.
    """

    def __init__(self, name: str, num_classes: int, classes: dict[int, int], ignore_value: int | None) -> None:
        self.name, self.num_classes, self.ignore_value = name, num_classes, ignore_value
        self.classes = {value: number for value, number in classes.items() if value != ignore_value}
        if not self.classes:
            raise DataError(f"{name}: the ignore value {ignore_value} leaves no label value with a class")
        # Row v + 1 holds the class of value v. All smaller values share the first row, all larger ones the last.
        self._table = np.full(max(self.classes) + 3, _INVALID, dtype=np.int32)
        for value, number in self.classes.items():
            self._table[value + 1] = number

    def classify(self, values: np.ndarray, path: str) -> np.ndarray:
        """Classes of stored label values.

        Args:
            values: integers [H, W].
            path: the file that holds them, for the error.

        Returns:
            int32 [H, W], 0..num_classes-1 or IGNORE.

        Raises:
            DataError: a value has no class; names the file, the values and the number of classes.
        """
        classes: np.ndarray = self._table[np.clip(values, -1, len(self._table) - 2) + 1]
        if self.ignore_value is not None:
            classes[values == self.ignore_value] = IGNORE
        wrong = classes == _INVALID
        if wrong.any():
            raise DataError(self._out_of_range(values, wrong, path))
        return classes

    def _out_of_range(self, values: np.ndarray, wrong: np.ndarray, path: str) -> str:
        bad, counts = np.unique(values[wrong], return_counts=True)
        listed = ", ".join(f"{v} ({n} pixels)" for v, n in zip(bad[:8], counts[:8], strict=True))
        listed += f" and {len(bad) - 8} more values" if len(bad) > 8 else ""
        allowed = set(self.classes)
        if self.ignore_value is not None:
            allowed.add(self.ignore_value)
        return (
            f"{path}: label value {listed} is out of range: {self.name} has {self.num_classes} classes, expected "
            f"values {_ranges(allowed)}{self._remedy(values, bad.tolist())}"
        )

    def _remedy(self, values: np.ndarray, bad: list[int]) -> str:
        """What to do about values that are known mistakes; else empty."""
        if bad == [255]:
            if set(np.unique(values).tolist()) <= {0, 255}:
                return (
                    ". It looks like a 0/255 mask: store 0 and 1 with --num-classes 2, or, if 255 means unlabeled, "
                    "pass --ignore-value 255"
                )
            return ". If 255 marks unlabeled pixels, pass --ignore-value 255"
        if bad == [-1]:
            return ". If -1 marks unlabeled pixels, pass --ignore-value -1"
        if bad == [self.num_classes] and int(values.min()) >= 1:
            return ". The values seem to start at 1: store them from 0, or raise --num-classes by one"
        return ""


def _ranges(values: Iterable[int]) -> str:
    """Numbers as runs.

    Examples:
        >>> _ranges([0, 1, 2, 255])
        '0..2, 255'
    """
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
