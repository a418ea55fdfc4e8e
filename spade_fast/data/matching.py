# SPDX-License-Identifier: Apache-2.0
"""Which files belong together, which ones a file list names, and hints about files that do not match."""

from __future__ import annotations

import bisect
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from .reading import IMAGE_SUFFIXES, LABEL_SUFFIXES, DataError, list_files

_FEW = 200  # at most this many names are compared to find a common difference


def normal(name: str) -> str:
    """The composed form (NFC) of a name: file systems differ in how they store an accent."""
    return unicodedata.normalize("NFC", name)


def keyed(
    folder: Path, suffixes: frozenset[str], key: Callable[[str], str | None]
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The files of a folder by their keys.

    Args:
        folder: where to look, also in the folders below.
        suffixes: endings of the files to take.
        key: from a relative path without suffix to the key; None for a file to leave out.

    Returns:
        The path of each key; a message for each file whose key another file has already; and the path of each key
        among the files with other endings.
    """
    files: dict[str, str] = {}
    others: dict[str, str] = {}
    faults = []
    for below in list_files(folder, None):
        stem, suffix = os.path.splitext(below)
        name = key(normal(stem))
        path = f"{folder}/{below}"
        if name is None:
            continue
        if suffix.lower() not in suffixes:
            others[name] = path
        elif name in files:
            faults.append(f"{path}: {files[name]} has the same name; expected one of them")
        else:
            files[name] = path
    return files, faults, others


def other_kind(path: str, kind: str) -> str:
    """A hint: why a file of the right name is not taken as a file of its kind."""
    suffix = os.path.splitext(path)[1].lower() or "no ending"
    if kind != "image" and suffix in (".jpg", ".jpeg", ".webp"):
        what = "JPEG" if suffix != ".webp" else "WebP"
        return f"; {path} is a {what}, whose compression changes values: save {kind}s as PNG"
    return f"; {path} has another ending ({suffix}) than {kind}s have ({_endings(kind)})"


def _endings(kind: str) -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES if kind == "image" else LABEL_SUFFIXES))


def none_found(others: dict[str, str], kind: str) -> str:
    """A hint: what a folder without files of a kind holds instead; empty if it holds nothing."""
    if not others:
        return ""
    counts = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in others.values())
    held = ", ".join(f"{count} × {suffix}" for suffix, count in counts.most_common(3))
    lossy = ", whose compression changes values: save them as PNG" if kind != "image" and counts[".jpg"] else ""
    return f" (it holds {held}{lossy}; {kind}s end in {_endings(kind)})"


def difference(names: Iterable[str], others: Iterable[str], kind: str, other: str) -> str:
    """A hint: how the unmatched names of two kinds of files seem to differ; empty if no rule is found.

    The rules are upper and lower case, another end, and another start.

    Args:
        names: unmatched names of the first kind.
        others: unmatched names of the second kind.
        kind: what the first kind is called.
        other: what the second kind is called.
    """
    names, others = sorted(names)[:_FEW], sorted(others)[:_FEW]
    if {name.casefold() for name in names} & {name.casefold() for name in others}:
        return f"; names of {kind}s and {other}s differ in upper and lower case: rename one of them"
    for turn, where in ((lambda text: text), "end"), ((lambda text: text[::-1]), "start"):
        turned = sorted(map(turn, others))
        pairs: Counter[tuple[str, str]] = Counter()
        for name in map(turn, names):
            at = bisect.bisect(turned, name)  # its neighbors have the most in common with it
            best = min(turned[max(0, at - 1) : at + 1], key=lambda o: (-_common(name, o), len(o)), default="")
            if shared := _common(name, best):
                pairs[turn(name[shared:]), turn(best[shared:])] += 1
        if pairs:
            (first, second), count = pairs.most_common(1)[0]
            # The rule must hold for most names. A number is no rule: it tells samples apart.
            alike = 2 * count > len(names) and (count > 1 or not first or not second)
            if alike and not first.isdecimal() and not second.isdecimal():
                have = f"{other}s have {second!r} at the {where} of their names"
                have += f", {kind}s have {first!r}" if first else f", {kind}s do not" if second else ""
                return f"; {have}: rename the files so that only .png, .jpg and the like differ"
    return ""


def _common(a: str, b: str) -> int:
    """How many characters at the start two texts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class FileList:
    """The samples that a text file names, one on each line. A name given twice counts once.

    A name may have a suffix of images or label maps, and folders before it. The file is UTF-8, with or without a
    byte-order mark.

    Args:
        path: the file; ~ is the home directory.

    Raises:
        DataError: the file can't be read, is no UTF-8 text, or names nothing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.path.expanduser(path)
        try:
            data = Path(self.path).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot read the file list: {getattr(error, 'strerror', None) or error}"
            ) from error
        if b"\0" in data:
            raise DataError(f"{path}: cannot read the file list: it is not UTF-8 text (UTF-16, or no text at all)")
        # Python reads names on disk that are not UTF-8 with the same error handler, and they compare equal.
        text = data.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
        self.lines = [(i, normal(line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not self.lines:
            raise DataError(f"{path}: the file list names no sample")

    def choose(self, keys: Iterable[str], shorten: Iterable[Callable[[str], str | None]]) -> tuple[set[str], list[str]]:
        """The samples that the list names.

        Args:
            keys: names of all samples.
            shorten: functions from a file's name without suffix to its key.

        Returns:
            The keys that are named, and a message for each line whose name is no key.
        """
        by_last: dict[str, list[str]] = {}
        for key in keys:
            by_last.setdefault(key.rsplit("/", 1)[-1], []).append(key)
        chosen: set[str] = set()
        faults = []
        for number, line in self.lines:
            found = next(filter(None, (self._find(name, by_last) for name in self._readings(line, shorten))), None)
            if found:
                chosen.update(found)
            else:
                line = line.strip()
                hint = " (expected one name a line)" if len(line.split()) > 1 or "," in line else ""
                faults.append(f"{self.path}, line {number}: there is no sample named {line!r}{hint}")
        return chosen, faults

    @staticmethod
    def _readings(line: str, shorten: Iterable[Callable[[str], str | None]]) -> Iterable[str]:
        """The names that a line may mean, the likeliest first. An unknown ending after a dot is part of the name."""
        bare = line.strip()  # spaces at the ends are rarely part of a name
        for path in dict.fromkeys((line, bare, bare.replace("\\", "/"))):
            stem, suffix = os.path.splitext(path)
            stems = [path, stem] if suffix.lower() in IMAGE_SUFFIXES | LABEL_SUFFIXES else [path]
            for name in stems:
                yield name
                yield from filter(None, (short(name) for short in shorten))

    @staticmethod
    def _find(name: str, by_last: dict[str, list[str]]) -> list[str]:
        """The keys that end in a name; else the longest key that the name ends in."""
        name = name.removeprefix("./")
        candidates = by_last.get(name.rsplit("/", 1)[-1], [])
        below = [key for key in candidates if key == name or key.endswith("/" + name)]
        if below:
            return below
        above = [key for key in candidates if name.endswith("/" + key)]
        longest = max(map(len, above), default=0)
        return [key for key in above if len(key) == longest]
