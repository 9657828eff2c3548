"""Write a data set as one .beton file: from a folder of images, CIFAR-10, CIFAR-100, or the generated Spirograph set

* Folder of images: if its subfolders contain images, each subfolder is a class (sorted by name; nested folders belong
  to their class; an empty class keeps its number). If the folder contains images directly, they have no labels. Both at
  once is an error, and so are a single class and subfolders that look like splits (train, val, test) beside others.
* Splits: `split` chooses one of the subfolders train, val, test or the like; train is the default. Tiny-ImageNet,
  Oxford-IIIT Pet, CUB-200, Food-101, Caltech-101, ImageNet and doubled folders (x/x) are read as they are extracted.
* `cifar10`, `cifar100`: downloaded to datasets/ if missing. The folder of the extracted files is accepted too.
* `spirograph`: pictures and the numbers that define them, four targets as labels and six nuisance numbers.

Images of a folder are written in a fixed shuffled order, so that neighbours in the file, which are read together, are
of different classes, and the first 1,000 are a fair sample. Links are followed, and no folder is read twice.

Every image is fully decoded before it is stored. JPEG bytes are stored unchanged if they are grey or three-channel and
upright; everything else is re-encoded as RGB JPEG and listed: EXIF orientation is applied, transparent pixels are laid
over white, and an animation is reduced to its first frame. Of pixels with more than 8 bits, 0 becomes black and the
largest value of the format (65,535 for 16 bits) becomes white. If the first images use less than a quarter of that
range, such as 12-bit data in 16-bit files, the range of the bits in use is taken instead, with a warning; white=VALUE
sets it, and an image with larger values then stops the command.

Damaged JPEGs, which decoders accept with a warning and fill with wrong pixels, stop the command, as do images that
can't be decoded: it then examines the remaining images and names all that are bad. on_error=skip leaves them out;
on_error=keep stores damaged JPEGs as they are. OUT.beton.json lists them in both cases. Only regular files are opened.
Images of more than max_pixels pixels are refused.
"""

import sys
from pathlib import Path

from simclr_ddp.config import command
from simclr_ddp.config.schema import WriteDataset


def main(argv: list[str] | None = None) -> int:
    return command.run(write_dataset, WriteDataset, "SOURCE OUT", __doc__ or "", argv)


def write_dataset(settings: WriteDataset) -> None:
    from simclr_ddp.data import write

    write.write_dataset(
        settings.source,
        Path(settings.out),
        split=settings.split or None,
        on_error=settings.on_error,
        quality=settings.quality,
        mode=settings.mode,
        white=settings.white,
        max_pixels=settings.max_pixels,
        images=settings.images,
        overwrite=settings.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
