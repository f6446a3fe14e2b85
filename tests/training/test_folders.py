"""Image folders as people have them: every image counts once, under its class; what is left out is said."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from uvc.config import DataConfig
from uvc.training.data import load_data
from uvc.training.evaluation import count_right


def picture(path, value=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 12), value if mode == "L" else (value,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            for i in range(4):
                picture(tmp_path / split / name / f"{i}.png", 100 * label + 10 * i)
    return tmp_path


def load(folder, **options):
    return load_data(folder, model_input=(3, 12, 12), **{"batch_size": 3, **options})


def count(loader):
    return sum(len(labels) for _, labels in loader)


def said(folder, recwarn, **options):
    """What is said when the data are opened and the validation images read twice."""
    recwarn.clear()
    data = load(folder, **options)
    total = count(data.val)
    assert count(data.val) == total
    # Python 3.12 and later warn of fork in a process with threads, and on one processor two workers are said.
    others = ("use of fork()", "workers: ")
    lines = [str(warning.message) for warning in recwarn]
    return total, [line for line in lines if not any(other in line for other in others)]


def test_a_clean_folder_gives_no_warning(folder, recwarn):
    assert said(folder, recwarn) == (8, [])


@pytest.mark.parametrize("deep", ["x", "x/y/z"])
def test_images_in_nested_folders_belong_to_the_class_above(folder, recwarn, deep):
    picture(folder / "val" / "b" / deep / "9.png", 200)
    total, lines = said(folder, recwarn)
    assert (total, lines) == (9, [])
    assert torch.cat([y for _, y in load(folder).val]).tolist() == [0] * 4 + [1] * 5


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "TIFF", "JPG", "gif", "ppm", "jfif"])
def test_images_of_every_kind_count(folder, recwarn, ending):
    path = folder / "val" / "a" / f"9.{ending}"
    Image.new("RGB", (12, 12)).save(path, Image.registered_extensions()[f".{ending.lower()}"])
    assert said(folder, recwarn) == (9, [])


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("val/a/notes.txt", "1 files ending in '.txt'"),
        ("val/a/deep/array.npy", "1 files ending in '.npy'"),
        ("val/a/IMG_0001", "1 files without an ending"),
        ("val/loose.png", "1 files outside the class folders"),
        ("val/a/._0.png", "1 hidden files or folders"),
        ("val/a/.hidden/0.png", "1 hidden files or folders"),
        ("val/.ipynb_checkpoints/0.png", "1 hidden files or folders"),
        ("val/__MACOSX/a/0.png", "1 hidden files or folders"),
    ],
)
def test_what_is_not_used_is_counted_and_named(folder, recwarn, place, says):
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something")
    total, lines = said(folder, recwarn)
    assert total == 8 and len(lines) == 1
    assert says in lines[0] and str(folder / "val") in lines[0] and "\n" not in lines[0]


def test_links_are_followed_and_circles_of_links_end(folder, recwarn):
    picture(folder / "elsewhere" / "deep" / "9.png")
    os.symlink(folder / "elsewhere", folder / "val" / "a" / "linked")
    os.symlink(folder / "val" / "a", folder / "val" / "a" / "circle")
    assert said(folder, recwarn) == (9, [])


def spoil(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_validation_images_are_left_out_and_named_once(folder, recwarn, workers):
    spoil(folder / "val" / "a" / "2.png")
    (folder / "val" / "b" / "1.png").write_bytes(b"")
    total, lines = said(folder, recwarn, workers=workers)
    assert total == 6 and len(lines) == 1
    assert "val: 2 of 8 images cannot be read and are left out" in lines[0]
    assert str(folder / "val" / "a" / "2.png") in lines[0]


def test_accuracy_is_that_of_the_readable_images(folder):
    class Bright(torch.nn.Module):
        def forward(self, images):
            bright = (images.mean((1, 2, 3)) > 0).float()
            return torch.stack([1 - bright, bright], 1)

    views = DataConfig(mean=(0.27,), std=(1.0,), crop_pct=1.0)
    assert count_right(Bright(), load(folder, views=views).val) == (8, 8)
    spoil(folder / "val" / "b" / "0.png")
    with pytest.warns(UserWarning, match="1 of 8 images cannot be read"):
        assert count_right(Bright(), load(folder, views=views).val) == (7, 7)


def test_a_validation_batch_of_unreadable_images_is_passed_over(folder, recwarn):
    for i in range(3):
        spoil(folder / "val" / "a" / f"{i}.png")
    total, lines = said(folder, recwarn)
    assert total == 5 and "val: 3 of 8 images cannot be read" in lines[0]


def test_in_training_another_image_with_its_own_class_takes_the_place(folder, recwarn):
    spoil(folder / "train" / "a" / "3.png")  # followed by the first image of the next class
    data = load(folder, batch_size=8, views=DataConfig(color_jitter=0, mean=(0.0,), std=(1.0,)))
    ((images, labels),) = data.train
    assert len(images) == 8 and labels.tolist().count(1) == 5
    assert torch.equal(labels, (images.amax((1, 2, 3)) > 0.35).long())
    assert "train: 1 of 8 images cannot be read, others take their place, first" in str(recwarn[0].message)


def test_training_on_unreadable_images_alone_is_an_error(folder):
    for path in (folder / "train").rglob("*.png"):
        spoil(path)
    with pytest.raises(ValueError, match=r"train: no image of a whole batch can be read; .*first '.*0\.png'"):
        list(load(folder).train)


def test_animations_and_16_bits_are_said(folder, recwarn):
    Image.fromarray(np.full((12, 12), 40000, np.uint16)).save(folder / "val" / "a" / "0.png")
    frames = [Image.new("RGB", (12, 12), c) for c in ("red", "blue")]
    frames[0].save(folder / "val" / "b" / "0.png", save_all=True, append_images=frames[1:])
    total, lines = said(folder, recwarn)
    assert total == 8 and len(lines) == 1
    assert "1 of 8 images have 16 bits per value, scaled to 8" in lines[0]
    assert "1 of 8 images have more than one frame, of which the first is used" in lines[0]


def test_splits_that_differ_in_their_classes_name_the_odd_one(folder):
    picture(folder / "val" / "c" / "0.png")
    with pytest.raises(ValueError, match="the splits differ in their classes: 'c' is only in val/"):
        load(folder)


def test_data_of_one_class_are_refused(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "only" / "0.png")
    with pytest.raises(ValueError, match="has one class, 'only'; there is nothing to tell apart"):
        load(tmp_path)


def test_a_class_of_nothing_but_other_files_says_what_they_are(folder):
    for path in (folder / "train" / "b").iterdir():
        path.rename(path.with_suffix(".dat"))
    (folder / "train" / ".hidden").write_bytes(b"of another folder")
    with pytest.raises(ValueError, match=r"b' holds no images; .* \(it holds 4 files ending in '\.dat'"):
        load(folder)


def test_class_names_and_the_view_are_known(folder):
    data = load(folder, views=DataConfig(crop_pct=0.8, mean=(0.1, 0.2, 0.3)))
    assert data.classes == ("a", "b") and data.num_classes == 2
    assert data.view["crop_pct"] == 0.8 and data.view["mean"] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder"])
def test_a_folder_by_its_name_at_timm_is_read_as_a_folder(folder, recwarn, name):
    picture(folder / "val" / "a" / "deep" / "9.webp")
    data = load_data(name, root=folder, model_input=(3, 12, 12), batch_size=3)
    assert count(data.val) == 9
    with pytest.raises(ValueError, match="needs --data-root, the folder it is stored in; no data root"):
        load_data(name, model_input=(3, 12, 12), batch_size=3)


def test_crops_of_the_whole_scale_show_the_whole_image(folder):
    ramp = np.arange(12, dtype=np.uint8).repeat(12 * 3).reshape(12, 12, 3)
    for path in (folder / "train").rglob("*.png"):
        Image.fromarray(ramp * 20).save(path)

    def rows(scale):
        views = DataConfig(color_jitter=0, mean=(0.0,), std=(1.0,), scale=scale)
        ((images, _),) = load(folder, batch_size=8, views=views).train
        return images[:, 0, :, 0]

    whole = torch.from_numpy(ramp[:, 0, 0] * 20 / 255).float()
    assert torch.allclose(rows((1.0, 1.0)), whole.expand(8, 12), atol=1e-6)
    assert not torch.allclose(rows((0.08, 0.5)), whole.expand(8, 12), atol=1e-2)


@pytest.mark.parametrize(
    ("views", "says"),
    [
        (dict(input_size=(2, 12, 12)), r"input_size: \(2, 12, 12\)"),
        (dict(mean=(0.1, 0.2)), r"mean: \(0.1, 0.2\) are 2 numbers; images have 3 channels"),
        (dict(std=(0.1, 0.0, 0.1)), "std: 0.0; it must be a positive number"),
        (dict(crop_pct=-1.0), "crop_pct: -1.0"),
        (dict(interpolation="cubic"), "interpolation: 'cubic'; use one of"),
        (dict(aa="nonsense"), "aa: 'nonsense' is no policy"),
        (dict(reprob=1.5), "reprob: 1.5"),
        (dict(color_jitter=-0.1), "color_jitter: -0.1; it must be 0 or a positive"),
        (dict(scale=(0.5, 0.2)), r"scale: \(0.5, 0.2\); .* the smaller first"),
        (dict(scale=(0.0, 1.0)), r"scale: \(0.0, 1.0\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_view_that_cannot_be_is_one_line_that_names_it(folder, views, says):
    with pytest.raises(ValueError, match=says) as caught:
        load(folder, views=DataConfig(**views))
    assert "\n" not in str(caught.value)


def test_views_are_refused_for_digits_which_come_ready():
    with pytest.raises(ValueError, match=r"crop_pct: 0\.9 is for photographs"):
        load_data("digits", model_input=(1, 8, 8), batch_size=4, views=DataConfig(crop_pct=0.9))


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5", "augmix-m3", "original"])
def test_augmentation_of_timm_depends_on_seed_epoch_and_image_alone(folder, aa):
    def views(workers, seed=1):
        data = load(folder, seed=seed, workers=workers, views=DataConfig(aa=aa, reprob=0.5))
        return torch.cat([images for _ in range(2) for images, _ in data.train])

    state = np.random.get_state()[1].copy()
    alone = views(0)
    assert np.array_equal(state, np.random.get_state()[1])
    assert torch.equal(alone, views(2)) and not torch.equal(alone, views(0, seed=2))
