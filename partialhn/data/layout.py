"""Labelled image data sets as they lie on disk or in a bucket: Parquet files, image folders.

One listing of the tree says whether it is a data set (`partialhn.data.folder`), a directory of
tasks, or class folders; nothing is decoded.

Shape suffix: N images of a split.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.fs

from partialhn.data.card import README, Card, read_card
from partialhn.data.columns import ANY, Columns
from partialhn.data.files import file_table, images_in, parquet_split, parquet_table
from partialhn.data.folder import Tree, class_folders, read_splits
from partialhn.data.image_set import FoundSplits, ImageSet, assemble, assemble_tasks
from partialhn.data.image_table import ImageTable
from partialhn.data.listing import (
    SUFFIXES,
    NotUsed,
    described,
    image_paths,
    is_image_tree,
    is_junk,
    is_metadata,
    parquet_paths,
    split_of_folder,
    split_top,
    unused,
)
from partialhn.data.table import FORMS
from partialhn.errors import InputError


def locate(data: str, filesystem: Any = None) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path in it.

    Raises: InputError for a scheme that needs a filesystem of its own.
    """
    scheme, colon, rest = data.partition("://")
    if filesystem is None and colon and scheme != "file":
        raise InputError(f"{data!r} has the scheme {scheme!r}; without a filesystem of its own "
                         "allowed: a local path or file://")
    path = unquote(rest) if colon and scheme == "file" else rest if colon else data
    filesystem = filesystem or pyarrow.fs.LocalFileSystem()
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        path = Path(path).expanduser().absolute().as_posix()
    return filesystem, path.rstrip("/") or "/"


def read_sets(data: str, limit: int | None = None, filesystem: Any = None, *,
              columns: Columns = ANY, chosen: str | None = None,
              arrivals_beside: bool = False) -> ImageSet | dict[str, ImageSet]:
    """The data set at a path, or the data sets of a directory of tasks by name.

    Args:
        data: path or URI of a Parquet file, of a data set's folder, or of a directory of tasks.
        limit: use only the classes labelled 0 to limit-1.
        filesystem: where the path is; default: local.
        columns: the columns of images and labels; default: by their names.
        chosen: the configuration of a data set whose README.md has several.
        arrivals_beside: folders beside the splits are other data, as in the inbox; elsewhere
            they are refused, because their images would be left out without a word.

    Raises: InputError for anything that cannot be used, naming it.
    """
    filesystem, root = locate(data, filesystem)
    paths = _list_paths(filesystem, root, data)
    if paths is None:
        split = parquet_split(filesystem, [root], columns)
        return assemble(data, FoundSplits({"train": split}, notes=split.notes), limit)
    tree = Tree(filesystem, root, paths)
    card = read_card(filesystem, root, paths, chosen)
    if not arrivals_beside:
        tree, card = _inner(tree, card)
    splits = read_splits(tree, card, columns, arrivals_beside)
    if splits is not None:
        return assemble(data, splits, limit)
    folders, files = split_top(tree.listing)
    tasks = {name: _task(tree.below(name), columns, arrivals_beside) for name in folders}
    if any(tasks.values()):
        _refuse_images_beside(tree.root, files)
        return assemble_tasks(data, tasks, limit, unused(files, (README,)))
    card.require_choice()
    if image_paths(tree.listing):
        return assemble(data, class_folders(tree, columns), limit)
    raise InputError(f"no images found in {data!r} "
                     f"({described(unused(tree.listing, ())) or 'empty'}); "
                     "allowed: Parquet files with images and labels, "
                     "train/<class>/<image>, or a directory of tasks of either form")


def _task(tree: Tree, columns: Columns, arrivals_beside: bool) -> FoundSplits | None:
    card = read_card(tree.filesystem, tree.root, tree.listing, None)
    if not arrivals_beside:
        tree, card = _inner(tree, card)
    return read_splits(tree, card, columns, arrivals_beside)


def _inner(tree: Tree, card: Card) -> tuple[Tree, Card]:
    """The folder that holds the data set, and what a README.md says of it.

    It is the folder that the README.md names, else the only folder where that is `data/`, as in a
    data set's repository, or where it holds class folders and no splits.
    """
    while card.patterns is None:
        if card.folder:
            name = card.folder
        else:
            folders, files = split_top(tree.listing)
            if len(folders) != 1 or image_paths(files) or parquet_paths(files):
                break
            name = next(iter(folders))
            if split_of_folder(name) or any(map(is_metadata, files)):
                break
            if name != "data" and not _holds_folders_only(folders[name]):
                break
        tree = tree.below(name)
        inner = read_card(tree.filesystem, tree.root, tree.listing, None)
        card = inner if inner.path else Card(names=card.names, rows=card.rows, others=card.others)
    return tree, card


def _holds_folders_only(listing: Sequence[str]) -> bool:
    """Whether a folder holds images in folders of its own, none of which is a split."""
    folders, files = split_top(listing)
    return (not image_paths(files) and not parquet_paths(files)
            and not any(map(is_metadata, files)) and not any(map(split_of_folder, folders))
            and any(image_paths(inside) or parquet_paths(inside) for inside in folders.values()))


def _refuse_images_beside(root: str, files: Sequence[str]) -> None:
    if image_paths(files):
        raise InputError(f"{root}/{image_paths(files)[0]} lies beside the folders of tasks; "
                         "allowed: images in the splits of a task")


def open_images(data: str, filesystem: Any = None, column: str | None = None) -> ImageTable:
    """All images at a path, without their labels: for prediction. Arguments: as `list_images`."""
    return list_images(data, filesystem, column)[0]


def list_images(data: str, filesystem: Any = None,
                column: str | None = None) -> tuple[ImageTable, NotUsed]:
    """All images at a path, without their labels, and the files that are none.

    Args:
        data: an image file, a Parquet file, or a folder of either (searched deeply).
        filesystem: where the path is; default: local.
        column: the column of images in Parquet files; default: by its name.

    Raises: InputError for a missing path, where there are no images, or images beside Parquet
    files, of which one kind would be left out.
    """
    filesystem, root = locate(data, filesystem)
    listing = _list_paths(filesystem, root, data, (*SUFFIXES, ".parquet"),
                          "an image file, a Parquet file, or a folder of either, local or s3://")
    if listing is None:
        return (parquet_table(filesystem, [root], column) if parquet_paths([root])
                else file_table(filesystem, [root])), NotUsed(data)
    tables = [] if is_image_tree(listing) else parquet_paths(sorted(listing))
    images = images_in(filesystem, root, sorted(listing))
    if tables and images:
        raise InputError(f"{data!r} holds {len(images):,} images and {len(tables):,} Parquet files "
                         f"({tables[0]}); allowed: a folder of one of both")
    if not tables and not images:
        raise InputError(f"no images found in {data!r}; allowed: Parquet files, or images ending "
                         f"in {' '.join(SUFFIXES)}")
    paths = [f"{root}/{path}" for path in tables or images]
    table = parquet_table(filesystem, paths, column) if tables else file_table(filesystem, paths)
    return table, NotUsed(data, unused(listing, tables or images))


def _list_paths(filesystem: Any, root: str, data: str, suffixes: Sequence[str] = (".parquet",),
                allowed: str = "") -> list[str] | None:
    """Paths below a folder, sub-folders with a slash at the end; None for a single file.

    suffixes: ends of the names of files. allowed: the text about what may be given, for messages;
    default: all that the option `data` takes.
    """
    info = filesystem.get_file_info(root)
    if info.type == pyarrow.fs.FileType.NotFound:
        forms, looked = ", ".join(FORMS), f" (looked for {root})" * (root != data)
        raise InputError(f"{data!r} does not exist{looked}; allowed: "
                         + (allowed or "a Parquet file, an image folder or a directory of tasks, "
                            f"or a data form ({forms}) such as torchvision:CIFAR100"))
    if info.type != pyarrow.fs.FileType.Directory:
        if not root.lower().endswith(tuple(suffixes)):
            raise InputError(f"{data!r} is a file; allowed: a folder, or a file ending in "
                             f"{' '.join(suffixes)}")
        return None
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        return sorted(_walk(Path(root), "", []))
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    paths = (entry.path[len(root):].lstrip("/")
             + "/" * (entry.type == pyarrow.fs.FileType.Directory) for entry in found)
    return sorted(path for path in paths if not is_junk(path))


def _walk(folder: Path, base: str, above: list[tuple[int, int]]) -> Iterator[str]:
    """Paths below a local folder; links are followed, and junk is left out.

    Arrow leaves out links to nothing, goes round in circles, and takes a pipe for a file. Raises:
    InputError for these, and for a folder that cannot be read.
    """
    try:
        stat = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror}") from error
    place = (stat.st_dev, stat.st_ino)
    if place in above:
        raise InputError(f"{folder} is a link to a folder that contains it; allowed: links to "
                         "folders elsewhere")
    for entry in entries:
        if is_junk(entry.name):
            continue
        if entry.is_dir():
            yield f"{base}{entry.name}/"
            yield from _walk(folder / entry.name, f"{base}{entry.name}/", [*above, place])
        elif entry.is_file():
            yield base + entry.name
        else:
            kind = "a link to nothing" if entry.is_symlink() else "no regular file"
            raise InputError(f"{folder / entry.name} is {kind}; allowed: files, and links to them")
