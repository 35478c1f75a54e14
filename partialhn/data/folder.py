"""The splits of one data set's folder.

What says which files hold which split is, in this order: the README.md of a data set's repository,
sub-folders (`train/`, `test/`, `val/`), the names of Parquet files. Labels are class folders, a
column of Parquet files, or a table beside the images.
"""

import dataclasses
import os.path
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from partialhn.data.card import README, Card, matching, split_named
from partialhn.data.columns import ANY, Columns
from partialhn.data.files import LabelledSplit, folder_split, images_in, parquet_split, table_split
from partialhn.data.image_set import FoundSplits
from partialhn.data.listing import (
    SPLIT_WORDS,
    described,
    image_paths,
    is_image_tree,
    is_metadata,
    missing_pieces,
    parquet_paths,
    split_of_folder,
    split_top,
    splits_of_files,
    unused,
)
from partialhn.data.metadata import Labels, read_labels, table_without_labels
from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tree:
    """A folder and every path below it; those of folders end with a slash."""

    filesystem: Any
    root: str
    listing: Sequence[str]

    def below(self, name: str) -> "Tree":
        """One of its folders."""
        base = f"{name}/"
        return Tree(self.filesystem, f"{self.root}/{name}",
                    [path[len(base):] for path in self.listing
                     if path.startswith(base) and path != base])


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A data set's folder while its splits are read."""

    tree: Tree
    card: Card
    columns: Columns
    labels: Labels | None
    is_images: bool

    def split(self, paths: Sequence[str], base: str) -> LabelledSplit:
        """The split that some files hold; class folders lie below `base`."""
        tree = self.tree
        tables = [] if self.is_images else parquet_paths(paths)
        if tables:
            if image_paths(paths):
                raise InputError(f"{tree.root} has the images {image_paths(paths)[0]} and the "
                                 f"Parquet files {tables[0]} in one split; allowed: one of both")
            return parquet_split(tree.filesystem, [f"{tree.root}/{path}" for path in tables],
                                 self.columns, self.card.names)
        if self.labels and not self.labels.by_path.keys().isdisjoint(paths):
            return self._by_table(paths, base)
        if self.columns != ANY:
            raise InputError(f"image_column or label_column is given, but the folder names of "
                             f"{tree.root}/{base} are the labels; allowed: Parquet files, or a "
                             "table metadata.csv beside the images")
        return self._by_folders(paths, base)

    def _by_folders(self, paths: Iterable[str], base: str) -> LabelledSplit:
        start = f"{base}/" if base else ""
        tree = self.tree
        loose = image_paths([path for path in paths if "/" not in path.removeprefix(start)])
        if loose and self.labels is None and (
                lacks := table_without_labels(tree.filesystem, tree.root, tree.listing)):
            raise InputError(f"image {tree.root}/{loose[0]} lies in no class folder, and {lacks}")
        split = folder_split(tree.filesystem, f"{tree.root}/{base}".rstrip("/"),
                             [path.removeprefix(start) for path in paths if path != start])
        return dataclasses.replace(split, paths=tuple(start + path for path in split.paths))

    def _by_table(self, paths: Sequence[str], base: str) -> LabelledSplit:
        """Where every class folder has the name of its label, the folders say the same."""
        assert self.labels
        by_path, start = self.labels.by_path, f"{base}/" if base else ""
        tops = {path: path.removeprefix(start).split("/")[:-1][:1] for path in paths
                if path in by_path}
        if (all(top == [str(by_path[path])] for path, top in tops.items())
                and not set(image_paths(paths)) - by_path.keys()):
            return self._by_folders(paths, base)
        split = table_split(self.tree.filesystem, self.tree.root, paths, self.labels)
        left = [path for path in images_in(self.tree.filesystem, self.tree.root, paths)
                if path not in by_path]
        notes = [f"{len(left):,} images have no row in {self.labels.tables[0]} and are left out, "
                 f"the first is {left[0]}"] if left else []
        if len({*map(tuple, tops.values())}) > 1:
            notes.append(f"labels are the column {self.labels.column!r} of "
                         f"{self.labels.tables[0]}, not the names of folders")
        return dataclasses.replace(split, notes=tuple(notes), unlabelled=tuple(left))


def read_splits(tree: Tree, card: Card, columns: Columns,
                arrivals_beside: bool) -> FoundSplits | None:
    """The splits of the data set in a folder; None where the folder is not a data set.

    arrivals_beside: folders beside the splits are other data and not refused.

    Raises: InputError for files or names that cannot be used or are not clear.
    """
    is_images = is_image_tree(tree.listing)
    labels = read_labels(tree.filesystem, tree.root, tree.listing, columns,
                         card.names) if is_images else None
    folder = _Folder(tree, card, columns, labels, is_images)
    if card.patterns is not None:
        return _finished(folder, *_by_patterns(folder, card.patterns), tree.listing)
    folders, files = split_top(tree.listing)
    named = {name: split for name in folders if (split := split_of_folder(name))}
    tables = [] if is_images else parquet_paths(files)
    if not named and not tables and not labels:
        return None
    card.require_choice()
    if tables and named:
        raise InputError(f"{tree.root} has both {tables[0]} and the folder "
                         f"{next(iter(named))}/; allowed: splits as Parquet files or as folders, "
                         "not both")
    mine = list(tree.listing)
    if arrivals_beside:
        mine = [path for path in mine if "/" not in path or path.partition("/")[0] in named]
    elif named or tables:
        _refuse_beside(tree.root, folders, files if is_images else (), named)
    if tables:
        by_split = splits_of_files(tree.root, tables)
        return _finished(folder, {split: folder.split(names, "")
                                  for split, names in by_split.items()}, [], mine)
    if not named:
        return _finished(folder, {"train": folder.split(mine, "")}, [], mine)
    splits: dict[str, LabelledSplit] = {}
    for name, split in named.items():
        if split in splits:
            raise InputError(f"{tree.root} has more than one {split} folder, one of them "
                             f"{name!r}; allowed: one")
        splits[split] = folder.split([path for path in mine if path.startswith(f"{name}/")], name)
    return _finished(folder, splits, [], mine)


def class_folders(tree: Tree, columns: Columns) -> FoundSplits:
    """A folder of class folders, all of them for training."""
    folder = _Folder(tree, Card(), columns, None, True)
    return _finished(folder, {"train": folder.split(tree.listing, "")}, [], tree.listing)


def _by_patterns(folder: _Folder, patterns: Mapping[str, Sequence[str]],
                 ) -> tuple[dict[str, LabelledSplit], list[str]]:
    """The splits that a README.md names, and notes about those that are not used."""
    splits: dict[str, LabelledSplit] = {}
    notes, card = [], folder.card
    for own, given in patterns.items():
        split = split_named(own)
        if split is None:
            notes.append(f"the split {own!r} that its README.md names is not used, only splits "
                         f"named {', '.join(SPLIT_WORDS)}")
            continue
        paths = matching(folder.tree.listing, given, card.folder)
        if not paths:
            raise InputError(f"{card.path} says that the split {own!r} is in {', '.join(given)}, "
                             "but no such file is there; allowed: all files of the data set")
        if split in splits:
            raise InputError(f"{card.path} has two splits for {split}, one of them {own!r}; "
                             "allowed: one")
        if not image_paths(paths) and not parquet_paths(paths):
            raise InputError(f"{card.path} says that the split {own!r} is in "
                             f"{described(unused(paths, ()))} files; allowed: Parquet files, images"
                             f", or data hf:{folder.tree.root}, which reads other kinds through "
                             "the datasets library")
        base = os.path.commonpath([_fixed(pattern, card.folder) for pattern in given])
        splits[split] = folder.split(paths, base)
    return splits, notes


def _fixed(pattern: str, folder: str) -> str:
    """The folders of a glob pattern before its first special character."""
    steps = (f"{folder}/{pattern}" if folder else pattern).split("/")[:-1]
    fixed = next((place for place, step in enumerate(steps) if set("*?[") & set(step)), len(steps))
    return "/".join(steps[:fixed])


def _finished(folder: _Folder, splits: dict[str, LabelledSplit], notes: list[str],
              listing: Sequence[str]) -> FoundSplits:
    """The splits with everything that a user should know of them."""
    used: list[str] = [*folder.labels.tables] if folder.labels else []
    used += [README] if folder.card.path else []
    for split in splits.values():
        used += split.paths or [path[len(folder.tree.root) + 1:] for path in split.images.files]
        used += split.unlabelled
        notes = [*notes, *split.notes]
    notes += folder.labels.notes if folder.labels else ()
    notes += missing_pieces(sorted(path for path in used if parquet_paths([path])))
    for own, rows in folder.card.rows.items():
        here = splits.get(split_named(own) or "")
        if here is not None and len(here.images) != rows:
            notes.append(f"its README.md says {rows:,} images in the split {own!r}, and "
                         f"{len(here.images):,} are here")
    return FoundSplits(splits, unused(listing, used), tuple(dict.fromkeys(notes)))


def _refuse_beside(root: str, folders: Mapping[str, Sequence[str]], files: Sequence[str],
                   named: Mapping[str, str]) -> None:
    """Raises InputError where images beside the splits belong to none of them."""
    if image_paths(files):
        raise InputError(f"{root}/{image_paths(files)[0]} lies beside the folders of splits; "
                         "allowed: images in a split, or in another place")
    for name, inside in folders.items():
        images = image_paths(inside) + [path for path in parquet_paths(inside)
                                        if not is_metadata(path)]
        if name not in named and images:
            raise InputError(f"{root}/{name} holds {len(images):,} images or Parquet files and "
                             "does not say which split it is; allowed: a name such as train, "
                             "test_set or validation, or another place for it")
