"""Folders of images: nothing is lost or misread without a word, whatever Pillow can read."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pyrovae.cli.group import main
from pyrovae.data import load_dataset
from pyrovae.data.folders import DataWarning, Folder, Remarks, _suffixes


def picture(file: Path, level: int = 100, mode: str = "L", size: tuple[int, int] = (6, 5)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level).save(file)
    return file


def read(folder: Path, **options) -> tuple[list[int], list[int] | None, str]:
    """The first pixel of each image, the labels, and the remarks."""
    found = Folder.read(folder, **options)
    first = found.images[:, 0, 0].tolist()
    return first, None if found.labels is None else found.labels.tolist(), str(found.remarks)


# Links


def test_a_linked_class_folder_and_linked_files_are_read(tmp_path):
    picture(tmp_path / "store" / "cats" / "deep" / "1.png", 10)
    picture(tmp_path / "store" / "dog.png", 20)
    picture(tmp_path / "images" / "dogs" / "2.png", 30)
    (tmp_path / "images" / "cats").symlink_to(tmp_path / "store" / "cats", target_is_directory=True)
    (tmp_path / "images" / "dogs" / "3.png").symlink_to(tmp_path / "store" / "dog.png")
    assert read(tmp_path / "images") == ([10, 30, 20], [0, 1, 1], "")


def test_links_that_lead_around_end(tmp_path):
    picture(tmp_path / "a" / "1.png", 10)
    picture(tmp_path / "b" / "2.png", 20)
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "over").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "over").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    first, labels, remarks = read(tmp_path)
    assert (first, labels) == ([10, 20], [0, 1])
    assert remarks == "skipped 1 broken link; skipped 3 links to what is read already"


def test_no_image_is_read_twice_and_the_file_comes_before_its_links(tmp_path):
    """Else one image could be both for training and for validation."""
    picture(tmp_path / "z" / "real.png", 10)
    picture(tmp_path / "elsewhere" / "only.png", 20)
    (tmp_path / "images").mkdir()
    (tmp_path / "z").rename(tmp_path / "images" / "z")
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "images" / "z" / "real.png")
    for name in ("b.png", "c.png"):
        (tmp_path / "images" / name).symlink_to(tmp_path / "elsewhere" / "only.png")
    first, labels, remarks = read(tmp_path / "images")
    assert (first, labels) == ([20, 10], [0, 1])
    assert remarks == "skipped 2 links to what is read already"


# What is left out


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    for k in range(4):
        picture(tmp_path / f"{k}.png", 40 * k + 30)
    for name in ("notes.txt", "more.TXT", "labels.csv", "Makefile", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    picture(tmp_path / ".git" / "inside.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    expected = "skipped 4 files of no image format (.csv, .txt, no suffix); skipped 2 hidden names; "
    expected += "skipped 1 broken link"
    assert read(tmp_path)[2] == expected
    with pytest.warns(DataWarning) as said:
        assert len(load_dataset(str(tmp_path)).train) == 2
    assert [str(warning.message) for warning in said] == [f"{tmp_path}: {expected}"]


def test_a_folder_where_all_is_read_says_nothing(tmp_path):
    for k in range(4):
        picture(tmp_path / f"{k}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset(str(tmp_path))


def test_commands_say_it_in_one_line_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(20):
        picture(tmp_path / "images" / f"{k}.png", 10 * k + 40)
    (tmp_path / "images" / "notes.txt").touch()
    tiny = [
        "train",
        "-d",
        "images",
        "-e",
        "1",
        "--hidden",
        "4",
        "--figure-epochs",
        "",
        "--quiet",
        "--out",
        "run",
    ]
    monkeypatch.setattr("pyrovae.runs.training.draw_figures", lambda *args: None)
    line = f"Warning: {tmp_path / 'images'}: skipped 1 file of no image format (.txt)\n"
    done = CliRunner().invoke(main, tiny)
    assert (done.exit_code, done.stderr) == (0, line.replace(f"{tmp_path}/", ""))
    done = CliRunner().invoke(main, ["encode", "run"])
    assert (done.exit_code, done.stderr) == (0, line)


def test_an_empty_folder_says_what_it_has_instead(tmp_path):
    (tmp_path / "movie.mp4").touch()
    with pytest.raises(ValueError, match=r"got none: skipped 1 file of no image format \(\.mp4\)\Z"):
        Folder.read(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match="expected a folder that can be read at"):
        Folder.read(tmp_path)


# Formats


LOSSLESS = {"bmp", "dib", "gif", "ico", "pcx", "pgm", "ppm", "png", "apng", "sgi", "tga", "tif", "webp", "jp2"}


@pytest.mark.parametrize("suffix", sorted(LOSSLESS))
def test_every_format_that_pillow_reads_is_read(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    kind = Image.registered_extensions()[f".{suffix}"]
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / f"1.{suffix}", format=kind, **options)
    Image.fromarray(np.full((16, 16), 78, np.uint8)).save(
        tmp_path / f"2.{suffix.upper()}", format=kind, **options
    )
    images = Folder.read(tmp_path).images
    assert [image.min() for image in images] == [image.max() for image in images] == [77, 78]


def test_formats_that_pillow_only_tells_or_only_writes_are_left_out(tmp_path):
    assert {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".jfif", ".pbm"} <= _suffixes()
    assert not {".pdf", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".mpg", ".txt"} & _suffixes()
    picture(tmp_path / "1.png")
    (tmp_path / "labels.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert read(tmp_path)[2] == "skipped 1 file of no image format (.h5)"


def test_the_first_of_several_pictures_is_taken_and_said(tmp_path):
    frames = [Image.fromarray(np.full((5, 6), level, np.uint8)) for level in (50, 60, 70)]
    for name in ("1.gif", "2.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "3.gif")
    found = Folder.read(tmp_path)
    assert found.images.reshape(3, -1)[:, 0].tolist() == [50, 50, 50]
    assert str(found.remarks) == "took the first picture of 2 files with several"


# Orientation, transparency, grey levels


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: a.T[:, ::-1]), (8, lambda a: a.T[::-1])],
)
def test_a_picture_is_turned_as_its_orientation_says(tmp_path, suffix, orientation, turned):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 240  # bright at the top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(upright).save(tmp_path / f"1.{suffix}", exif=exif)
    (image,) = Folder.read(tmp_path).images
    assert image.shape == turned(upright).shape
    assert ((image > 120) == (turned(upright) > 120)).all()


def two_halves(mode: str, hidden, seen, alpha: tuple[int, int]) -> Image.Image:
    """A picture whose left half has the first alpha, and whose right half the second."""
    image = Image.new(mode, (4, 2), hidden)
    image.paste(seen, (2, 0, 4, 2))
    mask = Image.new("L", (4, 2), alpha[0])
    mask.paste(alpha[1], (2, 0, 4, 2))
    image.putalpha(mask)
    return image


@pytest.mark.parametrize(
    ("image", "left", "right"),
    [
        (two_halves("RGB", (255, 0, 0), (0, 0, 200), (0, 255)), [255, 255, 255], [0, 0, 200]),
        (two_halves("RGB", (255, 0, 0), (0, 0, 0), (255, 0)), [255, 0, 0], [255, 255, 255]),
        (two_halves("L", 7, 90, (0, 255)), 255, 90),
        (two_halves("RGB", (100, 100, 0), (0, 0, 0), (51, 255)), [224, 224, 204], [0, 0, 0]),
    ],
)
def test_transparent_pictures_lie_on_white(tmp_path, image, left, right):
    """What is hidden under full transparency is not seen; 51 of 255 is a fifth."""
    image.save(tmp_path / "1.png")
    found = Folder.read(tmp_path)
    assert (found.images[0, 0, 0].tolist(), found.images[0, 0, -1].tolist()) == (left, right)
    assert str(found.remarks) == "laid 1 transparent image on white"


def test_transparent_colours_of_palettes_lie_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.save(tmp_path / "1.png", transparency=1)
    found = Folder.read(tmp_path)
    assert found.images[0].tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]]
    assert str(found.remarks) == "laid 1 transparent image on white"


def test_an_alpha_that_hides_nothing_changes_nothing(tmp_path):
    two_halves("L", 7, 90, (255, 255)).save(tmp_path / "1.png")
    two_halves("L", 8, 90, (255, 255)).save(tmp_path / "2.png")
    assert read(tmp_path) == ([7, 8], None, "")


def test_pictures_of_one_bit_are_black_and_white(tmp_path):
    for k in range(2):
        Image.fromarray(np.array([[False, True]] * 2)).save(tmp_path / f"{k}.png")
    assert Folder.read(tmp_path).images.tolist() == [[[0, 255], [0, 255]]] * 2
    assert read(tmp_path)[2] == ""


@pytest.mark.parametrize(("largest", "remedy"), [(1, "multiply by 255, or save"), (17, "save images / 17")])
def test_a_folder_of_other_grey_levels_is_refused(tmp_path, largest, remedy):
    for k in range(4):
        picture(tmp_path / f"{k}.png", largest)
    with pytest.raises(
        ValueError, match=rf"got up to {largest}, which is black: if {largest} is white, {remedy}"
    ):
        load_dataset(str(tmp_path))


def test_single_pictures_of_zeros_and_ones_are_counted(tmp_path):
    for k, level in enumerate((1, 200, 0, 1, 2)):
        picture(tmp_path / f"{k}.png", level)
    assert read(tmp_path)[2] == "read 2 images whose only grey levels are 0 and 1 of 255, which is black"


def test_remarks_are_empty_until_something_is_left_out():
    assert str(Remarks()) == ""
