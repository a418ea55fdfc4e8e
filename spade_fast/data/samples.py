# SPDX-License-Identifier: Apache-2.0
"""Which files make a sample, and what to say about files without a partner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .matching import FileList, difference, keyed, other_kind
from .reading import IMAGE_SUFFIXES, LABEL_SUFFIXES, DataError
from .spec import Key, Spec


@dataclass(frozen=True, slots=True)
class Sample:
    """The files of one sample; None for a file that is not needed or, in an incomplete sample alone, missing."""

    label: str | None
    image: str | None
    instance: str | None


@dataclass
class Matched:
    """The samples that the files of a dataset make.

    Attributes:
        samples: complete samples, sorted by name.
        incomplete: samples that lack a file.
        faults: a message for each file without a partner.
        absent: a message for each name of the file list that no sample has.
        others: label files with another suffix, by name.
    """

    samples: list[Sample]
    incomplete: list[Sample]
    faults: list[str]
    absent: list[str]
    others: dict[str, str]


@dataclass(frozen=True)
class _Kind:
    """One kind of file: what it is called, its directory, its suffixes and its key."""

    name: str
    folder: Path
    suffixes: frozenset[str]
    key: Key


_LABEL, _IMAGE, _INSTANCE = "label map", "image", "instance map"


def match(
    spec: Spec,
    need_images: bool,
    need_instances: bool,
    keep: Callable[[str], bool] | None,
    file_list: FileList | None,
) -> Matched:
    """Finds the files of a dataset and matches them by name.

    Args:
        spec: where the files lie.
        need_images: whether a sample has an image.
        need_instances: whether a sample has an instance map.
        keep: whether to use the sample of a name; None uses all.
        file_list: names of the samples to use instead.

    Raises:
        DataError: a directory is missing, cannot be read or is not given.
    """
    kinds = _kinds(spec, need_images, need_instances)
    faults: list[str] = []
    absent: list[str] = []
    found: dict[str, dict[str, str]] = {}
    others: dict[str, dict[str, str]] = {}
    for kind in kinds:
        found[kind.name], doubles, others[kind.name] = keyed(kind.folder, kind.suffixes, kind.key)
        faults += doubles
    if file_list is not None:
        every = {name for files in found.values() for name in files}
        chosen, absent = file_list.choose(every, [kind.key for kind in kinds])
        keep = chosen.__contains__
    if keep is not None:
        found = {kind: {name: path for name, path in files.items() if keep(name)} for kind, files in found.items()}
    samples: list[Sample] = []
    incomplete: list[Sample] = []
    unmatched = _Unmatched(kinds, found, others)
    for name in sorted(set[str]().union(*found.values())):
        complete = all(name in files for files in found.values())
        if not complete:
            faults += unmatched.faults(name)
        label, image, instance = (found.get(kind, {}).get(name) for kind in (_LABEL, _IMAGE, _INSTANCE))
        (samples if complete else incomplete).append(Sample(label, image, instance))
    return Matched(samples, incomplete, faults, absent, others[_LABEL])


def _kinds(spec: Spec, need_images: bool, need_instances: bool) -> list[_Kind]:
    """The kinds of files that a sample needs, the label map first."""
    kinds = [_Kind(_LABEL, spec.label_dir, LABEL_SUFFIXES, spec.label_key)]
    if need_images:
        if spec.image_dir is None:
            raise DataError(f"{spec.name}: no image folder is given (--image-dir or --dataroot)")
        kinds.append(_Kind(_IMAGE, spec.image_dir, IMAGE_SUFFIXES, spec.image_key))
    if need_instances and spec.instance_dir is not None:
        kinds.append(_Kind(_INSTANCE, spec.instance_dir, LABEL_SUFFIXES, spec.instance_key))
    for kind in kinds:
        if not kind.folder.is_dir():
            hint = "; to go without, turn edges off" if kind.name == _INSTANCE else ""
            what = "this is no folder; it" if kind.folder.exists() else "no such folder, which"
            raise DataError(f"{kind.folder}: {what} should hold the {kind.name}s of {spec.name}{hint}")
    return kinds


class _Unmatched:
    """Messages for files without a partner."""

    def __init__(self, kinds: list[_Kind], found: dict[str, dict[str, str]], others: dict[str, dict[str, str]]) -> None:
        self.folders = {kind.name: kind.folder for kind in kinds}
        self.found, self.others = found, others
        labels = found[_LABEL]
        self.hints: dict[str, str] = {}
        for kind, files in found.items():
            if kind != _LABEL:
                alone = files.keys() - labels.keys(), labels.keys() - files.keys()
                self.hints[kind] = difference(*alone, kind, _LABEL)

    def faults(self, name: str) -> Iterator[str]:
        """A label map is told all that it lacks. Another file is told only that it has no label map."""
        if name in self.found[_LABEL]:
            pairs = [(_LABEL, kind, kind) for kind in self.found if name not in self.found[kind]]
        else:
            pairs = [(kind, _LABEL, kind) for kind in self.found if name in self.found[kind]]
        for has, lacks, hinted in pairs:
            hint = self.hints[hinted]
            if name in self.others[lacks]:
                hint = other_kind(self.others[lacks][name], lacks)
            yield f"{self.found[has][name]}: this {has} has no {lacks} named {name} in {self.folders[lacks]}{hint}"
