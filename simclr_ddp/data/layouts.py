"""Layouts of image folders: which of their files are samples, and of which class."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from simclr_ddp.data.beton import plain
from simclr_ddp.data.walk import Walk, entries_of, holds_images, is_image, subfolders
from simclr_ddp.system.console import printable, say

# A folder of all images has such a name; the class is then in a folder below, in a list, or nowhere.
COLLECTIONS = {"images", "image", "imgs", "img", "jpegimages", "jpg", "jpeg", "png", "data", "dataset"}
MASKS = {"masks", "trimaps", "annotations", "labels", "segmentationclass", "segmentationobject", "segmentations"}
MASKS |= {"groundtruth", "ground_truth", "gt"}
WORD = r"(train|val|test|dev|eval|holdout|fold|pred|query|gallery|(?:un)?labell?ed)(?:ing|id|idation|uation)?"
SPLIT = re.compile(  # train, seg_train, training_set, train2017, trainA, test-images, ...
    rf"(?:seg[_-])?{WORD}(?:[ _.-]?(?:set|data|split|images?|imgs?|masks?|labels?|hq|full|[ab]|x?\d+))*", re.IGNORECASE
)
PART = re.compile(rf"(?<![^\W_]){WORD}(?![^\W_])", re.IGNORECASE)  # cars_train and cars_test are a pair


class Images(NamedTuple):
    folder: Path  # the folder that holds the images
    files: list[tuple[Path, int]]  # image, class (0 without labels)
    classes: list[str] | None  # None: no labels
    others: Counter[str]  # suffixes of files that are not images
    listed_in: str = ""  # file that assigns images to classes or splits, relative to the folder

    def __str__(self) -> str:
        """What was understood, for example "photos: 3 classes: a, b, c; 20, 20, 3 images"."""
        where = printable(f"{self.folder} ({self.listed_in})" if self.listed_in else str(self.folder))
        if self.classes is None:
            return f"{where}: {len(self.files):,} images without labels"
        found = Counter(label for _, label in self.files)
        counts = [found[label] for label in range(len(self.classes))]
        if len(counts) <= 10:
            names, images = ", ".join(self.classes), ", ".join(f"{count:,}" for count in counts)
        else:
            names = f"{', '.join(self.classes[:3])} ... {self.classes[-1]}"
            images = f"{min(counts):,} to {max(counts):,}"
        return f"{where}: {len(counts):,} classes: {names}; {images} images"


def read_folder(folder: Path, split: str | None) -> Images:
    """Find the images of a folder, or of its subfolder for the split, and their classes; opens no image.

    Raises ValueError, with a way out, where several readings are plausible.
    """
    for reader in (_tiny_imagenet, _food, _birds, _pets):
        if lists := reader(folder):
            return _listed(folder, lists, split)
    below = subfolders(folder)
    holding = [name for name in below if holds_images(folder / name)]
    direct = any(not is_folder and is_image(path) for path, is_folder in entries_of(folder))
    if chosen := _choose_split(folder, holding, split):
        _say_split(folder, holding, chosen)
        if direct:
            say(f"note: images in {printable(str(folder))} itself belong to no split and are left out")
        return read_folder(folder / chosen, None)
    if not direct and (inner := _only_folder(folder, below, holding)):
        return read_folder(folder / inner, split)
    if split is not None:
        raise ValueError(f"split={split}: {folder} is not divided into splits; leave out split")
    return _class_folders(folder, below)


def _say_split(folder: Path, splits: list[str], chosen: str) -> None:
    say(printable(f"{folder} contains {', '.join(splits)}; using {chosen}"))


# --- lists of the authors -----------------------------------------------------------------------------------------


# Split ("" without splits) -> the list, relative to the folder, and its entries (image, class).
Lists = dict[str, tuple[str, list[tuple[str, str]]]]


def _listed(folder: Path, lists: Lists, split: str | None) -> Images:
    """Images of one split, whose classes are numbered over all splits."""
    if split is not None and "" in lists:
        raise ValueError(f"split={split}: {folder} is not divided into splits; leave out split")
    chosen = "" if "" in lists else split or "train"
    if chosen not in lists:
        raise ValueError(f"split={chosen}: {folder} does not list it; choose split={' or split='.join(lists)}")
    if chosen:
        _say_split(folder, list(lists), chosen)
    classes = sorted({name for _, entries in lists.values() for _, name in entries})
    numbers = {name: i for i, name in enumerate(classes)}
    listing, entries = lists[chosen]
    files = [(folder / image, numbers[name]) for image, name in entries]
    return Images(folder, files, [plain(name) for name in classes], Counter(), listing)


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    """Words of the lines of a text file; the last column has the rest of its line."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    for number, line in enumerate(lines, start=1):
        words = line.split(None, columns - 1)
        if len(words) == columns:
            yield words
        elif words:
            raise ValueError(f"{path}: line {number} has fewer than {columns} columns; extract the data set again")


def _tiny_imagenet(folder: Path) -> Lists | None:
    """The folder val: images/val_0.JPEG, and `val_0.JPEG<tab>n01443537<tab>...` in val_annotations.txt."""
    listing = folder / "val_annotations.txt"
    if not listing.is_file() or not holds_images(folder / "images"):
        return None
    return {"": (listing.name, [(f"images/{image}", rest.split()[0]) for image, rest in _rows(listing, 2)])}


def _food(folder: Path) -> Lists | None:
    """Food-101: images/apple_pie/1005649.jpg, and `apple_pie/1005649` in meta/train.txt or test.txt."""
    lists: Lists = {}
    for split in ("train", "test"):
        listing = folder / "meta" / f"{split}.txt"
        if listing.is_file() and (folder / "images").is_dir():
            images = [image.rstrip() for (image,) in _rows(listing, 1)]
            lists[split] = f"meta/{split}.txt", [(f"images/{image}.jpg", image.split("/")[0]) for image in images]
    return lists or None


def _birds(folder: Path) -> Lists | None:
    """CUB-200: images/001.Black_footed_Albatross/x.jpg, `1 001.Black_.../x.jpg` in images.txt, `1 0` in the split."""
    listing, split = folder / "images.txt", folder / "train_test_split.txt"
    if not listing.is_file() or not split.is_file() or not (folder / "images").is_dir():
        return None
    trained = {number: flag.strip() == "1" for number, flag in _rows(split, 2)}
    lists: Lists = {"train": (split.name, []), "test": (split.name, [])}
    for number, image in _rows(listing, 2):
        image = image.rstrip()
        lists["train" if trained.get(number) else "test"][1].append((f"images/{image}", image.split("/")[0]))
    return lists


def _pets(folder: Path) -> Lists | None:
    """Oxford-IIIT Pet: images/great_pyrenees_7.jpg, and `great_pyrenees_7 ...` in annotations/trainval.txt."""
    annotations, images = folder / "annotations", folder / "images"
    if not images.is_dir() or not ((annotations / "trimaps").is_dir() or (annotations / "list.txt").is_file()):
        return None
    lists: Lists = {}
    for split, name in (("train", "trainval.txt"), ("test", "test.txt")):
        if (annotations / name).is_file():
            stems = [line[0].split()[0] for line in _rows(annotations / name, 1)]
            lists[split] = f"annotations/{name}", [(f"images/{s}.jpg", s.rpartition("_")[0]) for s in stems]
    if not lists:
        found = [path for path, is_folder in entries_of(images) if not is_folder and is_image(path)]
        lists[""] = "classes from names of files", [(f"images/{p.name}", p.stem.rpartition("_")[0]) for p in found]
    names = [image for _, entries in lists.values() for image, _ in entries]
    return lists if names and all(re.search(r"._\d+\.\w+$", name) for name in names) else None


# --- folders ------------------------------------------------------------------------------------------------------


def _choose_split(folder: Path, holding: list[str], split: str | None) -> str | None:
    """Return the subfolder for a split; None if the subfolders are no splits."""
    groups = _splits(holding)
    others = [name for name in holding if name not in groups]
    way_out = f"choose split={printable(' or split='.join(groups))}"
    if split is None and others and groups:
        if len(set(groups.values())) > 1:
            raise ValueError(
                f"{folder} has folders of splits ({', '.join(groups)}) and {', '.join(others[:5])}, which would become "
                f"classes; {way_out}"
            )
        divided = [name for name in groups if any(holds_images(folder / name / n) for n in subfolders(folder / name))]
        if not divided and not COLLECTIONS & {name.lower() for name in others}:
            return None  # a class may be called train
        raise ValueError(
            f"{folder} has {', '.join(groups)}, which looks like a split, and {', '.join(others[:5])}, which don't; "
            f"{way_out}, or rename the folders if they are classes"
        )
    if not groups:
        return None
    wanted = split or "train"
    kind = SPLIT.fullmatch(wanted)
    found = [wanted] if wanted in holding else [n for n, g in groups.items() if kind and g == kind[1].lower()]
    if len(found) != 1:
        raise ValueError(f"split={wanted}: not a folder of {folder} with images; {way_out}")
    return found[0]


def _splits(names: list[str]) -> dict[str, str]:
    """Return {name: train, val or the like} for the names that look like splits."""
    found = {name: match[1].lower() for name in names if (match := SPLIT.fullmatch(name))}
    pairs: dict[str, dict[str, str]] = {}  # what is left of the name -> name -> split
    for name in names:
        if match := PART.search(name):
            pairs.setdefault(PART.sub("", name.lower(), count=1), {})[name] = match[1].lower()
    return found | {
        name: split for pair in pairs.values() if len(set(pair.values())) > 1 for name, split in pair.items()
    }


def _only_folder(folder: Path, below: list[str], holding: list[str]) -> str | None:
    """Return the subfolder that holds all samples: `images` beside annotations, or the only one; None for classes.

    Raises ValueError for subfolders that can't all be classes, and for a single class.
    """
    collections = [name for name in holding if name.lower() in COLLECTIONS]
    masks = [name for name in holding if name.lower() in MASKS]
    if len(collections) == 1 and len(holding) == 1 + len(masks):
        if masks:
            say(f"note: {', '.join(masks)} beside {collections[0]} is left out: it holds masks or labels")
        return collections[0]
    if collections or (masks and len(holding) > 1):
        raise ValueError(
            f"{folder} has folders of images called {', '.join(holding[:5])}{' ...' * (len(holding) > 5)}, and "
            f"{(collections or masks)[0]} is probably no class; give the folder of images as SOURCE "
            f"({folder / (collections or holding)[0]}), or rename {(collections or masks)[0]} if it is a class"
        )
    if len(holding) != 1 or not all(entries_of(folder / name) for name in below):
        return None  # an empty folder is a class without images
    (only,) = holding
    inside = entries_of(folder / only)
    if not any(not is_folder and is_image(path) for path, is_folder in inside):
        return only
    raise ValueError(
        f"{folder} has only one class, {only}; give {folder / only} as SOURCE to write its images without labels, or "
        f"add the folders of the other classes (they may be empty)"
    )


def _class_folders(folder: Path, names: list[str]) -> Images:
    """A folder of classes, or of images without labels."""
    walk = Walk(folder)
    direct, nested = walk.direct(), walk.by_label(names)
    names = list(nested)
    holding = [name for name, files in nested.items() if files]
    if direct and holding:
        raise ValueError(
            f"{folder} has images ({direct[0].name}) and folders of images ({holding[0]}), so labels are ambiguous; "
            "move the images into a class folder, or all images into one folder"
        )
    walk.report()
    if not holding:
        return Images(folder, [(path, 0) for path in direct], None, walk.others)
    _check_inside(folder, holding, walk.inside)
    files, classes = [], list(dict.fromkeys(plain(name) for name in names))
    for name in names:
        if not nested[name]:
            say(f"note: class {plain(name)} has no images; it keeps its number")
        label = classes.index(plain(name))
        files += [(path, label) for path in nested[name]]
    if len(classes) < len(names):
        say("note: folders whose names differ only in the form of their Unicode are one class")
    if "BACKGROUND_Google" in classes:
        say("note: class BACKGROUND_Google holds pictures of anything; remove its folder to leave it out")
    return Images(folder, files, classes, walk.others)


def _check_inside(folder: Path, holding: list[str], inside: dict[str, list[str]]) -> None:
    """Say that folders inside class folders belong to the class; raise ValueError where they seem to be classes."""
    for name, below in inside.items():
        splits = _splits(below)
        if len(set(splits.values())) > 1:
            one, other, *_ = splits
            raise ValueError(
                f"{folder / name} is divided into {one} and {other}, which would be one class; arrange them as "
                f"{folder / one / name} and {folder / other / name}, or give another folder"
            )
    first = inside.get(holding[0], [])
    if len(holding) > 1 and len(first) > 1 and all(inside.get(name) == first for name in holding):
        raise ValueError(
            f"{folder} has folders {', '.join(holding[:5])} with the same folders inside ({', '.join(first[:5])}), "
            f"which are probably the classes; give {folder / holding[0]} as SOURCE, or move images out of inner folders"
        )
    for name, below in list(inside.items())[:1]:
        say(f"note: folders inside a class folder belong to the class, such as {printable(f'{name}/{below[0]}')}")
