"""The names in a data set's folder: which are images, which name a split, which are junk.

Every rule about names stands here, once. What a name does not say clearly is an error: a file
that is silently left out, or put into another split, gives wrong results without a word.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from partialhn.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff",
            ".ppm", ".pgm")
"""Files that are images by their name."""
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test",
               "val": "validation", "valid": "validation", "validation": "validation"}
"""Words that name a split."""
UNCLEAR_WORDS = ("traintest", "testtrain", "dev", "eval", "evaluation", "holdout", "heldout")
"""Words that name two splits, or different ones with different people."""
COMMON_WORDS = ("set", "data", "dataset", "split", "images", "image", "imgs", "img", "files",
                "folder", "part", "parquet")
"""Words that a folder's name may have beside the word for its split, such as `train_set`."""
JUNK = ("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found",
        "System Volume Information", "__MACOSX", "Thumbs.db", "desktop.ini")
"""Files and folders that file systems and network drives leave everywhere."""
CONTROL = ("task.yaml",)
"""Files of the inbox that belong to no data set; its markers begin with an underscore."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""Start of the file that stands for a large file which Git LFS has not fetched."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables about the images beside them."""
_JUNK = frozenset(name.casefold() for name in JUNK)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"P5", b"P6")


@dataclasses.dataclass(frozen=True)
class NotUsed:
    """What a data set holds beside the images that are used, so that it can be said."""

    where: str
    """The data set, as the user named it."""
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Files that are neither images nor labels, counted by suffix."""
    classes: tuple[str, ...] = ()
    """Classes that the data names and of which no split has an image."""
    notes: tuple[str, ...] = ()
    """Whatever else a user should know about what is and is not learned, a sentence each."""

    def __bool__(self) -> bool:
        return bool(self.files or self.classes or self.notes)

    def with_note(self, note: str) -> "NotUsed":
        """The same with one more note."""
        return dataclasses.replace(self, notes=(*self.notes, note))

    def lines(self) -> list[str]:
        """Text for people, a line for each kind of thing."""
        lines = []
        if self.files:
            lines.append(f"not used in {self.where}: {described(self.files)} files; images are "
                         f"read from {' '.join(SUFFIXES)} and .parquet")
        if self.classes:
            shown = ", ".join(self.classes[:5]) + ", ..." * (len(self.classes) > 5)
            lines.append(f"left out of {self.where}: {len(self.classes)} named "
                         f"{'class' if len(self.classes) == 1 else 'classes'} without an image "
                         f"in any split ({shown})")
        return lines + [f"{self.where}: {note}" for note in self.notes]


def is_junk(path: str) -> bool:
    """Whether any step of a path is hidden or is left by a file system."""
    return any(step.startswith(".") or is_left_by_file_system(step)
               for step in path.rstrip("/").split("/"))


def is_left_by_file_system(name: str) -> bool:
    """Whether a file or folder is one of `JUNK`."""
    return name.casefold() in _JUNK


def image_paths(paths: Sequence[str]) -> list[str]:
    """The paths that are images by their name."""
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def parquet_paths(paths: Sequence[str]) -> list[str]:
    """The paths of Parquet files."""
    return [path for path in paths if path.lower().endswith(".parquet")]


def is_metadata(path: str) -> bool:
    """Whether a file is a table about the images beside it, by its name."""
    return path.rpartition("/")[2].lower() in METADATA


def is_image_tree(paths: Sequence[str]) -> bool:
    """Whether the files are images, and Parquet files only tables about them."""
    return bool(image_paths(paths)) and all(map(is_metadata, parquet_paths(paths)))


def kind_of(path: str) -> str:
    """The suffix of a file in lower case, or "no suffix"."""
    name = path.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else "no suffix"


def is_image_content(start: bytes) -> bool:
    """Whether a file that begins so is an image, for files without a suffix."""
    return start.startswith(_MAGIC)


def unused(paths: Iterable[str], used: Iterable[str]) -> dict[str, int]:
    """How many files of each kind are not used; folders, markers and junk do not count."""
    taken = set(used)
    counts = collections.Counter(
        kind_of(path) for path in paths
        if path not in taken and not path.endswith("/") and not is_junk(path)
        and not path.rpartition("/")[2].startswith("_")
        and path.rpartition("/")[2] not in CONTROL)
    return dict(sorted(counts.items()))


def described(counts: Mapping[str, int]) -> str:
    """Counts of files by kind as text: "5 .avif, 1 no suffix"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def missing_pieces(names: Iterable[str]) -> list[str]:
    """A note for each set of files numbered like `train-00000-of-00004` that is not whole."""
    pieces: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := re.search(r"(.*?)-(\d+)-of-(\d+)", name):
            pieces.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return [f"{stem}-*-of-{count:05d} is not whole: {len(numbers)} of its {count} files are here"
            for (stem, count), numbers in sorted(pieces.items()) if len(numbers) < count]


def split_top(listing: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The sub-folders with the paths inside them, and the files of a listing's top level."""
    folders: dict[str, list[str]] = {}
    files = []
    for path in listing:
        top, slash, inside = path.partition("/")
        if not slash:
            files.append(top)
        else:
            folders.setdefault(top, [])
            folders[top] += [inside] if inside else []
    return folders, files


def split_of_folder(name: str) -> str | None:
    """The split that a folder holds: `train`, `test_set`, `Validation Images`; None for another.

    Every word counts, so that the classes `test tube` and `steam train` are no splits.
    """
    words = _words(name)
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    others = [word for word in words if word not in SPLIT_WORDS and word not in COMMON_WORDS]
    return splits.pop() if len(splits) == 1 and not others else None


def splits_of_files(root: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Parquet files by split: any word of a name may say it; all are for training where none does.

    Raises: InputError for a name with words of two splits, a word that is not clear, or a name
    without such a word beside names with one.
    """
    grouped: dict[str, list[str]] = {}
    for name in names:
        words = _words(re.sub(r"(?i)\.parquet$", "", name))
        splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        unclear = [word for word in words if word in UNCLEAR_WORDS]
        if len(splits) > 1 or unclear:
            raise InputError(f"{root}/{name} does not say clearly which split it holds "
                             f"({', '.join(sorted(splits) + unclear)}); allowed: names with one "
                             f"of the words {', '.join(SPLIT_WORDS)}")
        grouped.setdefault(next(iter(splits), ""), []).append(name)
    if "" in grouped and len(grouped) > 1:
        raise InputError(f"{root}/{grouped[''][0]} stands beside files named after splits; "
                         f"allowed: names with one of the words {', '.join(SPLIT_WORDS)}")
    return {split or "train": files for split, files in grouped.items()}


def _words(name: str) -> list[str]:
    """The words of a name in lower case: cars-train, carsTrain and CARS_TRAIN have two."""
    pieces = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    joined = [re.fullmatch(r"(train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?)(set|data|images)",
                           piece.lower()) for piece in pieces]
    return [word for piece, match in zip(pieces, joined, strict=True)
            for word in (match.groups() if match else (piece.lower(),))]
