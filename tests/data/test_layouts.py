"""Layouts of image folders: what is a sample, of which class, and what is refused. No file is opened."""

import os
from pathlib import Path

import pytest

from simclr_ddp.data.layouts import Images, read_folder


def plant(folder: Path, *paths: str, **texts: str) -> Path:
    """Create empty files, "folder/" for empty folders; {a,b} and {0-9} stand for several."""
    for path in paths:
        if "{" in path:
            head, _, rest = path.partition("{")
            choice, _, tail = rest.partition("}")
            low, _, high = choice.partition("-")
            names = range(int(low), int(high) + 1) if high else choice.split(",")
            plant(folder, *(f"{head}{name}{tail}" for name in names))
        elif path.endswith("/"):
            (folder / path).mkdir(parents=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
    return folder


def samples(found: Images) -> list[str]:
    return sorted(f"{path.relative_to(found.folder)} {label}" for path, label in found.files)


LABELLED = ("cat/{0-4}.jpg", "dog/{0-2}.png")
READ = {  # paths, split, what is understood (without the folder)
    "classes": (LABELLED, None, ": 2 classes: cat, dog; 5, 3 images"),
    "an empty class": ((*LABELLED, "bird/"), None, ": 3 classes: bird, cat, dog; 0, 5, 3 images"),
    "a class called train": (("{bus,car,train}/{0-1}.jpg",), None, ": 3 classes: bus, car, train; 2, 2, 2 images"),
    "places": (("{test_tube,train_station}/0.jpg",), None, ": 2 classes: test_tube, train_station; 1, 1 images"),
    "no labels": (("{0-6}.JPEG", "notes.txt"), None, ": 7 images without labels"),
    "many classes": (("c{10-25}/0.jpg", "c10/1.jpg"), None, ": 16 classes: c10, c11, c12 ... c25; 1 to 2 images"),
    "splits": (("{train,val,test}/{cat,dog}/0.jpg",), "val", "/val: 2 classes: cat, dog; 1, 1 images"),
    "train is the default": (("{train,test}/{cat,dog}/0.jpg",), None, "/train: 2 classes: cat, dog; 1, 1 images"),
    "other names": (("{seg_test,seg_train}/{sea,wood}/0.jpg",), "test", "/seg_test: 2 classes: sea, wood; 1, 1 images"),
    "training_set": (("{test_set,training_set}/{a,b}/0.jpg",), None, "/training_set: 2 classes: a, b; 1, 1 images"),
    "CycleGAN": (("{train,test}{A,B}/0.jpg",), "trainB", "/trainB: 1 images without labels"),
    "splits and lists": (
        ("{train,test}/{a,b}/0.jpg", "meta/x.txt", "annotations/x.xml", "empty/"),
        *("train", "/train: 2 classes: a, b; 1, 1 images"),
    ),
    "splits and a copy": (
        ("{train,test}/{a,b}/0.jpg", "chest/{train,test}/{a,b}/0.jpg"), "test", "/test: 2 classes: a, b; 1, 1 images",
    ),
    "doubled": (("seg_train/seg_train/{sea,wood}/0.jpg",), None, "/seg_train/seg_train: 2 classes: sea, wood; 1,"),
    "doubled with splits": (
        ("x/x/{train,test}/{a,b}/0.jpg", "__MACOSX/x/._0.jpg", "x/readme.md"), "test", "/x/x/test: 2 classes: a, b; ",
    ),
    "ImageNet": (
        ("ILSVRC/Data/CLS-LOC/{train,val}/{n1,n2}/0.JPEG", "ILSVRC/Annotations/0.xml", "ILSVRC/ImageSets/0.txt"),
        *("val", "/ILSVRC/Data/CLS-LOC/val: 2 classes: n1, n2; 1, 1 images"),
    ),
    "Caltech-101": (
        ("101_ObjectCategories/{ant,BACKGROUND_Google}/0.jpg", "Annotations/ant/0.mat"),
        *(None, "/101_ObjectCategories: 2 classes: BACKGROUND_Google, ant; 1, 1 images"),
    ),
    "CUB without lists": (
        ("images/{001.A,002.B}/{0-1}.jpg", "parts/parts.txt", "attributes/"),
        *(None, "/images: 2 classes: 001.A, 002.B; 2, 2 images"),
    ),
    "images and masks": (("images/{0-3}.jpg", "masks/{0-3}.png"), None, "/images: 4 images without labels"),
    "VOC": (
        ("JPEGImages/{0-3}.jpg", "SegmentationClass/0.png", "SegmentationObject/0.png", "Annotations/0.xml"),
        *(None, "/JPEGImages: 4 images without labels"),
    ),
    "masks of pets": (
        ("images/{0-2}.jpg", "annotations/trimaps/{0-2}.png", "annotations/trimaps/._0.png"),
        *(None, "/images: 3 images without labels"),
    ),
    "pets without lists": (
        ("images/{Abyssinian_1,Abyssinian_20,great_pyrenees_3}.jpg", "annotations/trimaps/Abyssinian_1.png"),
        *(None, " (classes from names of files): 2 classes: Abyssinian, great_pyrenees; 2, 1 images"),
    ),
    "prefixes": (("cars_{train,test}/{audi,bmw}/0.jpg",), "test", "/cars_test: 2 classes: audi, bmw; 1, 1 images"),
    "suffixes": (("{train,valid}-birds/{owl,tit}/0.jpg",), None, "/train-birds: 2 classes: owl, tit; 1, 1 images"),
    "COCO": (("{train,val}2017/{0-2}.jpg", "annotations/0.json"), None, "/train2017: 3 images without labels"),
    "flowers": (("jpg/{0-2}.jpg", "setid.mat"), None, "/jpg: 3 images without labels"),
    "masks among images": (
        ("{benign,normal}/{a (1),b_2,seg}.png", "benign/{a (1)_mask,b_2_mask_1,b_2_label}.png", "normal/face_mask.png"),
        *(None, ": 2 classes: benign, normal; 3, 4 images"),
    ),
    "folders in classes": (("{cat,dog}/0.jpg", "cat/old/1.jpg"), None, ": 2 classes: cat, dog; 2, 1 images"),
    "thumbnails": (
        (*LABELLED, "cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_SM.jpg", "dog/.thumbnails/0.png", "cat/.ipynb_checkpoints/1.jpg",
         "__MACOSX/cat/0.jpg", "#recycle/a.jpg", "lost+found/0.jpg", "$RECYCLE.BIN/0.jpg", "Thumbs/0.jpg",
         "cat/_thumb/0.jpg", "_gsdata_/0.jpg"),
        *(None, ": 2 classes: cat, dog; 5, 3 images"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_layouts_that_are_understood(case: str, tmp_path: Path) -> None:
    paths, split, understood = READ[case]
    found = read_folder(plant(tmp_path / "x", *paths), split)
    assert f"{found}".startswith(f"{tmp_path / 'x'}{understood}")
    assert all(path.is_file() for path, _ in found.files)


REFUSED = {  # paths, split, a part of the message that has the way out
    "splits and classes": (
        ("{train,test,val}/{a,b}/0.jpg", "chest_xray/{train,test}/{a,b}/0.jpg"),
        *(
            None,
            "has folders of splits (test, train, val) and chest_xray, which would become classes; choose split=test",
        ),
    ),
    "a split and a class": (
        ("train/{a,b}/0.jpg", "extra/0.jpg"),
        *(None, "has train, which looks like a split, and extra, which don't; choose split=train, or rename"),
    ),
    "images and test": (("images/{a,b}/0.jpg", "test/0.jpg"), None, "has test, which looks like a split, and images"),
    "no such split": (("{train,test}/a/0.jpg",), "val", "split=val: not a folder of"),
    "only val": (("val/{a,b}/0.jpg",), None, "split=train: not a folder of"),
    "two of them": (("{trainA,trainB}/0.jpg",), "train", "choose split=trainA or split=trainB"),
    "not divided": (LABELLED, "test", "is not divided into splits; leave out split"),
    "one class": (("cat/{0-4}.jpg",), None, "has only one class, cat; give {x}/cat as SOURCE to write its images with"),
    "one class, doubled": (("x/cat/{0-4}.jpg",), None, "{x}/x has only one class, cat"),
    "one class and others": (("cat/0.jpg", "docs/readme.txt"), None, "has only one class, cat"),
    "masks": (("photos/0.jpg", "masks/0.png"), None, "masks is probably no class; give the folder of images as SOURCE"),
    "all and some": (("images/0.jpg", "cats/0.jpg"), None, "images is probably no class"),
    "splits in classes": (("{cat,dog}/{train,test}/0.jpg",), None, "arrange them as {x}/test/cat and {x}/train/cat"),
    "parts of unknown names": (
        ("{color,grey}/{a,b}/0.jpg",),
        *(None, "with the same folders inside (a, b), which are probably the classes; give {x}/color as SOURCE"),
    ),
    "images and masks in classes": (("{cat,dog}/{images,masks}/0.jpg",), None, "the same folders inside (images, mas"),
    "folds": (("fold{1-3}/{a,b}/0.jpg",), None, "choose split=fold1 or split=fold2 or split=fold3"),
    "labelled and not": (("{labeled,unlabeled}/0.jpg",), None, "choose split=labeled or split=unlabeled"),
    "ambiguous": (("0.jpg", "cat/0.jpg"), None, "has images (0.jpg) and folders of images (cat)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layouts_that_are_refused(case: str, tmp_path: Path) -> None:
    paths, split, match = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        read_folder(plant(tmp_path / "x", *paths), split)
    assert match.format(x=tmp_path / "x") in str(caught.value) and "\n" not in str(caught.value)


def test_tiny_imagenet(tmp_path: Path) -> None:
    """Its val is one folder of images, whose classes are in a list."""
    plant(tmp_path, "train/{n01,n02,n03}/images/{0-1}.JPEG", "train/n01/n01_boxes.txt", "val/images/val_{0-2}.JPEG")
    plant(tmp_path, "test/images/test_{0-4}.JPEG", "wnids.txt")
    rows = ("val_0.JPEG\tn03\t0\t32\t44\t62", "val_1.JPEG\tn01\t1\t1\t2\t2", "val_2.JPEG\tn03\t0\t0\t63\t63")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    assert str(read_folder(tmp_path, None)) == f"{tmp_path}/train: 3 classes: n01, n02, n03; 2, 2, 2 images"
    for val in (read_folder(tmp_path, "val"), read_folder(tmp_path / "val", None)):
        assert str(val) == f"{tmp_path}/val (val_annotations.txt): 2 classes: n01, n03; 1, 2 images"
        assert samples(val) == ["images/val_0.JPEG 1", "images/val_1.JPEG 0", "images/val_2.JPEG 1"]
    assert str(read_folder(tmp_path, "test")) == f"{tmp_path}/test/images: 5 images without labels"
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: line 1 has fewer than 2 columns; extract"):
        read_folder(tmp_path, "val")


def test_lists_of_food_birds_and_pets(tmp_path: Path) -> None:
    food = plant(tmp_path / "food-101", "images/{apple_pie,waffles}/{0-3}.jpg", "meta/")
    (food / "meta" / "train.txt").write_text("apple_pie/0\napple_pie/2\n")
    (food / "meta" / "test.txt").write_text("apple_pie/1\nwaffles/0\n")
    train, test = read_folder(food, None), read_folder(food, "test")
    assert str(train) == f"{food} (meta/train.txt): 2 classes: apple_pie, waffles; 2, 0 images"
    assert samples(test) == ["images/apple_pie/1.jpg 0", "images/waffles/0.jpg 1"]
    with pytest.raises(ValueError, match=r"split=val: .* does not list it; choose split=train or split=test"):
        read_folder(food, "val")

    birds = plant(tmp_path / "CUB_200_2011", "images/{001.A,002.B}/{x,y}.jpg", "parts/parts.txt")
    lines = [f"{i} {name}" for i, name in enumerate(("001.A/x.jpg", "001.A/y.jpg", "002.B/x.jpg", "002.B/y.jpg"))]
    (birds / "images.txt").write_text("\n".join(lines))
    (birds / "train_test_split.txt").write_text("0 1\n1 0\n2 1\n3 1\n")
    assert samples(read_folder(birds, None)) == ["images/001.A/x.jpg 0", "images/002.B/x.jpg 1", "images/002.B/y.jpg 1"]
    assert samples(read_folder(birds, "test")) == ["images/001.A/y.jpg 0"]

    pets = plant(tmp_path / "pets", "images/{pug_1,pug_2,wheaten_terrier_1}.jpg", "images/pug_1.mat")
    plant(pets, "annotations/trimaps/{pug_1,pug_2,wheaten_terrier_1}.png")
    (pets / "annotations" / "trainval.txt").write_text("pug_1 1 1 1\nwheaten_terrier_1 2 2 1\n")
    (pets / "annotations" / "test.txt").write_text("pug_2 1 1 1\n")
    train, test = read_folder(pets, "train"), read_folder(pets, "test")
    assert str(train) == f"{pets} (annotations/trainval.txt): 2 classes: pug, wheaten_terrier; 1, 1 images"
    assert samples(test) == ["images/pug_2.jpg 0"] and test.classes == ["pug", "wheaten_terrier"]


def test_linked_folders_are_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = plant(tmp_path / "all", "{n1,n2,n3}/{0-1}.jpg")
    x = plant(tmp_path / "x", "n2/{0-1}.jpg", "n3/deep/0.jpg")
    (x / "n1").symlink_to(everything / "n1")
    (x / "n3" / "more").symlink_to(everything / "n3")
    (x / "n3" / "deep" / "around").symlink_to(x / "n3")  # a loop
    (x / "n2" / "up").symlink_to(tmp_path)  # a loop through a folder that contains all
    (x / "n3" / "most").symlink_to(everything)  # n1 and n3 of it have been read
    (x / "an alias").symlink_to(x / "n2")
    (x / "self").symlink_to(x)
    (x / "n2" / "linked.jpg").symlink_to(everything / "n2" / "0.jpg")
    found = read_folder(x, None)
    assert str(found) == f"{x}: 3 classes: n1, n2, n3; 2, 3, 5 images"
    assert {"n3/more/0.jpg 2", "n3/most/n2/0.jpg 2"} <= set(samples(found))
    printed = capsys.readouterr().out
    for link in ("an alias", "n3/deep/around", "n2/up", "n3/most/n1", "n3/most/n3"):
        assert f"note: {x}/{link} is linked to a folder that is read anyway" in printed
    only_links = tmp_path / "links"
    only_links.mkdir()
    for name in ("n1", "n3"):
        (only_links / name).symlink_to(everything / name)
    assert str(read_folder(only_links, None)) == f"{only_links}: 2 classes: n1, n3; 2, 2 images"


def test_a_class_behind_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """It would vanish, and shift the numbers of the classes after it."""
    x = plant(tmp_path / "x", "a/0.jpg", "c/1.jpg")
    (x / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"x/b is a link to .*/gone, which does not exist: restore it, or"):
        read_folder(x, None)


def test_names_in_two_forms_and_in_other_encodings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = plant(tmp_path / "x", "cafe\u0301/0.jpg", "caf\u00e9/1.jpg", "dog/0.jpg")
    latin = os.fsdecode(os.fsencode(x) + b"/ch\xe2teau")
    os.mkdir(latin)
    Path(latin, os.fsdecode(b"\xe9t\xe9.jpg")).touch()
    found = read_folder(x, None)
    assert str(found) == rf"{x}: 3 classes: café, ch\xe2teau, dog; 2, 1, 1 images"
    assert found.classes is not None and found.classes[0] == "caf\u00e9"
    assert "differ only in the form of their Unicode are one class" in capsys.readouterr().out
