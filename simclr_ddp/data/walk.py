"""Image files below a folder, without folders that devices and file managers add, and without masks."""

import os
import re
from collections import Counter
from pathlib import Path

from simclr_ddp.system.console import printable, say

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# Made by storage devices and file managers. Hidden folders are ignored too.
IGNORED = {"@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "~snapshot"}
IGNORED |= {"$recycle.bin", "recycler", "system volume information", "lost+found", "found.000", "temporary items"}
IGNORED |= {"network trash folder", "thumb", "_thumb", "thumbs", "_thumbs", "thumbnails", "__macosx"}
IGNORED |= {"__pycache__", "_gsdata_"}
# x_mask.png, of x.png
MASK = re.compile(r"(.+?)[ _.-](?:mask|segmentation|seg|gt|trimap|label|annotation)s?(?:[ _.-]?\d+)?", re.IGNORECASE)


class Walk:
    """Collects image files below a folder. Linked folders are followed, but no folder is read twice."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.others: Counter[str] = Counter()  # suffixes of other files
        self.inside: dict[str, list[str]] = {}  # label -> folders of images in its folder
        self._ignored: set[str] = set()
        self._masks: list[Path] = []
        self._skipped: list[Path] = []  # links that lead to folders that are read anyway
        self._links: list[tuple[str, Path]] = []  # label, link: followed after all folders that are no links
        self._seen = {os.path.realpath(root)}

    def direct(self) -> list[Path]:
        """Sorted image files of the folder itself."""
        return self._images(entries_of(self.root, self._ignored))

    def by_label(self, names: list[str]) -> dict[str, list[Path]]:
        """Image files below each subfolder: sorted, linked ones last. Links to another subfolder are left out."""
        self._links = [(name, self.root / name) for name in names if (self.root / name).is_symlink()]
        linked = {name for name, _ in self._links}
        found = {name: [] if name in linked else self._below(name, self.root / name) for name in names}
        for name, link in self._links:  # grows
            if leads_back(link, self.root) or os.path.realpath(link) in self._seen:
                self._skipped.append(link)
                if link == self.root / name:
                    del found[name]
            else:
                found[name] += self._below(name, link)
        return found

    def report(self) -> None:
        """Say what is left out."""
        for link in self._skipped:
            say(f"note: {printable(str(link))} is linked to a folder that is read anyway, and is not read again")
        if self._ignored:
            say(f"note: folders of the system are ignored: {printable(', '.join(sorted(self._ignored)))}")
        if self._masks:
            say(f"note: masks of images are left out: {len(self._masks):,}, such as {printable(self._masks[0].name)}")
        if self.others:
            kinds = ", ".join(f"{n:,} {printable(s) or 'without suffix'}" for s, n in self.others.most_common(5))
            say(f"note: files of other kinds are ignored: {kinds}")

    def _images(self, entries: list[tuple[Path, bool]]) -> list[Path]:
        """Images among the entries of a folder, without masks of other images among them."""
        found = []
        for path, is_folder in entries:
            if not is_folder and is_image(path):
                found.append(path)
            elif not is_folder:
                self.others[path.suffix.lower()] += 1
        matches = {path: match[1] for path in found if (match := MASK.fullmatch(path.stem))}
        if not matches:
            return found
        stems = {path.stem for path in found}
        masks = {path for path, stem in matches.items() if stem in stems}
        self._masks += sorted(masks)
        return [path for path in found if path not in masks]

    def _below(self, label: str, folder: Path) -> list[Path]:
        """Image files below a folder that has not been read yet; its links to folders are kept for later."""
        real = os.path.realpath(folder)
        if real in self._seen:
            self._skipped.append(folder)
            return []
        self._seen.add(real)
        entries = entries_of(folder, self._ignored)
        found = self._images(entries)
        for path in (path for path, is_folder in entries if is_folder):
            if path.is_symlink():
                self._links.append((label, path))
                continue
            inside = self._below(label, path)
            if inside and folder == self.root / label:
                self.inside.setdefault(label, []).append(path.name)
            found += inside
        return found


def entries_of(folder: Path, ignored: set[str] | None = None) -> list[tuple[Path, bool]]:
    """Sorted paths in a folder, and whether each is a folder. Names of ignored folders are added to `ignored`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name.lower() not in IGNORED:
                path = folder / entry.name
                if entry.is_symlink() and not path.exists() and not is_image(path):  # perhaps a class
                    raise ValueError(
                        f"{printable(str(path))} is a link to {printable(os.readlink(path))}, which does not exist: "
                        "restore it, or remove the link"
                    )
                found.append((path, entry.is_dir()))
            elif ignored is not None and not entry.name.startswith(".") and entry.is_dir():
                ignored.add(entry.name)
    return sorted(found)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without links back to it."""
    return [path.name for path, is_folder in entries_of(folder) if is_folder and not leads_back(path, folder)]


def leads_back(path: Path, folder: Path) -> bool:
    """Whether a path is a link to the folder, or to one that contains it."""
    return path.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))


def holds_images(folder: Path) -> bool:
    """Whether there is an image in the folder or below it."""
    seen, left = set(), [folder] if folder.is_dir() else []
    while left:
        here = left.pop()
        if (real := os.path.realpath(here)) in seen:
            continue
        seen.add(real)
        entries = entries_of(here)
        if any(not is_folder and is_image(path) for path, is_folder in entries):
            return True
        left += [path for path, is_folder in entries if is_folder]
    return False
