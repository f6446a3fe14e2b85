"""Data: the fixed splits of digits, loaders that resume to the bit, image folders, and one-line errors."""

import io
import json
import multiprocessing
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from uvc.training.data import DIGITS_MEAN, DIGITS_STD, ImageLoader, TensorLoader, load_data

BACKGROUND = -DIGITS_MEAN / DIGITS_STD


def digits(**options):
    return load_data("digits", **{"model_input": (1, 8, 8), "batch_size": 64, **options})


def rows(images):
    """Each image as bytes; all 1797 digits differ, so this names an image."""
    return {image.numpy().tobytes() for image in images}


def equal(a, b):
    return all(torch.equal(x, y) and torch.equal(l, m) for (x, l), (y, m) in zip(a, b, strict=True))


@pytest.mark.parametrize(("validation", "train", "val"), [("test", 1297, 500), ("val", 1000, 297)])
def test_digits_split_has_its_fixed_sizes_and_is_disjoint(validation, train, val):
    data = digits(validation=validation)
    assert (len(data.train.labels), len(data.val.labels)) == (train, val)
    assert len(rows(data.train.images) | rows(data.val.images)) == train + val


def test_validation_part_never_meets_the_500_test_digits():
    test, val = digits(), digits(validation="val")
    assert not rows(test.val.images) & (rows(val.train.images) | rows(val.val.images))
    assert rows(val.train.images) | rows(val.val.images) == rows(test.train.images)


@pytest.mark.parametrize("validation", ["test", "val"])
def test_split_is_stratified(validation):
    data = digits(validation=validation)
    counts = [np.bincount(part.labels.numpy(), minlength=10) for part in (data.train, data.val)]
    share = counts[1] / (counts[0] + counts[1])
    assert share.max() - share.min() < 0.012


def test_split_depends_on_no_seed():
    a, b = digits(seed=0), digits(seed=1)
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.val.labels, b.val.labels)


def test_training_digits_have_roughly_zero_mean_and_unit_variance():
    images = digits().train.images
    assert abs(images.mean()) < 0.01 and abs(images.std() - 1) < 0.01


def test_batches_are_float32_images_and_int64_labels():
    data = digits()
    for images, labels in (next(iter(data.train)), next(iter(data.val))):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.shape == (64, 1, 8, 8) and labels.shape == (64,)


def test_training_drops_the_short_batch_and_evaluation_keeps_every_image():
    data = digits()
    assert [len(y) for _, y in data.train] == [64] * 20 and len(data.train) == 20
    assert sum(len(y) for _, y in data.val) == 500 and len(data.val) == 8


def test_an_epoch_is_a_permutation_and_the_next_one_is_another():
    loader = TensorLoader(torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12), 4, training=True, seed=3)
    epochs = [torch.cat([y for _, y in loader]) for _ in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(12)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_same_seed_gives_the_same_batches_and_another_seed_others():
    assert equal(list(digits(seed=5).train), list(digits(seed=5).train))
    assert not equal(list(digits(seed=5).train), list(digits(seed=6).train))


@pytest.mark.parametrize("seen", [0, 1, 7, 20, 23])
def test_resumed_loader_gives_the_batches_that_were_to_come(seen):
    def endless(loader):
        while True:
            yield from loader

    first = digits(seed=2).train
    batches = endless(first)
    list(islice(batches, seen))
    state = first.state_dict()
    second = digits(seed=2).train
    second.load_state_dict(state)
    assert equal(list(islice(batches, 45)), list(islice(endless(second), 45)))


def test_an_epoch_that_was_left_early_is_not_taken_up_again():
    loader, fresh = digits().train, digits().train
    next(iter(loader))
    next(iter(fresh))
    assert len(list(loader)) == 20
    assert equal(list(loader), list(islice((b for _ in range(2) for b in list(fresh)), 20, 40)))


def test_warp_moves_images_a_little_and_fills_with_the_background():
    blob = torch.full((300, 1, 8, 8), 5.0)
    blob[:, :, 3:5, 3:5] = 9.0
    loader = TensorLoader(blob, torch.zeros(300, dtype=torch.int64), 300, training=True, warp=1.0, fill=5.0)
    ((images, _),) = loader
    # Background in, background out; the blob keeps its mass within its scale and its centre within a pixel.
    assert torch.allclose(images[:, 0, 0, 0], torch.tensor(5.0))
    mass = (images - 5.0).sum((1, 2, 3))
    assert mass.min() > 16 * 0.7 and mass.max() < 16 * 1.4
    places = torch.arange(8.0)
    centre = ((images - 5.0).sum((1, 2)) * places).sum(1) / mass
    assert (centre - 3.5).abs().max() < 1.0 and centre.std() > 0.1


def test_noise_adds_what_was_asked():
    images = torch.zeros(500, 1, 8, 8)
    loader = TensorLoader(images, torch.zeros(500, dtype=torch.int64), 500, training=True, noise=0.25)
    assert abs(next(iter(loader))[0].std() - 0.25) < 0.01


def test_digits_are_upsampled_for_a_larger_model():
    data, small = digits(model_input=(3, 224, 224), batch_size=4), digits(batch_size=4)
    images, wanted = next(iter(data.val))[0], next(iter(small.val))[0]
    assert images.shape == (4, 3, 224, 224) and data.input_size == (3, 224, 224)
    wanted = F.interpolate(wanted.double(), (224, 224), mode="bilinear").expand(-1, 3, -1, -1)
    assert (images - wanted).abs().max() < 1e-5


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(100 * label, 100 * label + 100, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_yields_normalised_views_with_their_class(folder, channels):
    data = load_data(folder, model_input=(channels, 32, 32), batch_size=4)
    images, labels = (torch.cat(part) for part in zip(*data.val, strict=True))
    assert images.shape == (6, channels, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == torch.int64 and data.num_classes == 2
    assert images[:3].mean() < images[3:].mean()
    assert [len(y) for _, y in data.train] == [4, 4]


def test_views_do_not_depend_on_workers_nor_touch_the_random_state(folder):
    def one(workers):
        return load_data(folder, model_input=(3, 32, 32), batch_size=4, workers=workers, seed=1).train

    before = torch.get_rng_state()
    alone = list(one(0))
    assert torch.equal(before, torch.get_rng_state())
    assert equal(alone, list(one(2)))


def test_image_loader_resumes_in_the_middle_of_an_epoch(folder):
    def one():
        return load_data(folder, model_input=(3, 32, 32), batch_size=4, seed=1).train

    first = one()
    list(first)
    batches = iter(first)
    next(batches)
    second = one()
    second.load_state_dict(first.state_dict())
    assert isinstance(second, ImageLoader) and first.state_dict() == {"epoch": 1, "batch": 1}
    assert equal(list(batches), list(second))


def test_workers_stay_from_epoch_to_epoch(folder):
    data = load_data(folder, model_input=(3, 32, 32), batch_size=2, workers=2)
    children = []
    for _ in range(2):
        batches = iter(data.train)
        next(batches)
        children.append({process.pid for process in multiprocessing.active_children()})
        assert len(list(batches)) == 4
    assert children[0] == children[1] and len(children[0]) == 2


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize("seen", [1, 4, 5, 7])
def test_an_epoch_may_be_resumed_with_another_number_of_workers(folder, workers, seen):
    def one(count):
        return load_data(folder, model_input=(3, 32, 32), batch_size=2, seed=1, workers=count).train

    def endless(loader):
        while True:
            yield from loader

    first, second = map(one, workers)
    batches = endless(first)
    list(islice(batches, seen))
    second.load_state_dict(first.state_dict())
    assert equal(list(islice(batches, 8)), list(islice(endless(second), 8)))


@pytest.fixture
def shards(tmp_path, folder):
    """The images of `folder` in tar files, two of training, as WebDataset writes them."""
    pytest.importorskip("webdataset")
    info = {}
    for split, parts in (("train", 2), ("validation", 1)):
        files = sorted((folder / ("val" if split == "validation" else split)).rglob("*.png"))
        names = [f"{split}-{part}.tar" for part in range(parts)]
        for part, name in enumerate(names):
            with tarfile.open(folder / name, "w") as tar:
                for number, file in enumerate(files[part::parts]):
                    label = str(int(file.parent.name == "dog")).encode()
                    for ending, data in (("cls", label), ("png", file.read_bytes())):
                        member = tarfile.TarInfo(f"{number:04}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        lengths = [len(files[part::parts]) for part in range(parts)]
        info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=len(files))
    (folder / "_info.json").write_text(json.dumps({"splits": info}))
    return folder


def test_shards_are_read_each_image_once_and_resume_as_folders_do(shards):
    def one(seed=1):
        return load_data("wds/", root=shards, model_input=(3, 32, 32), batch_size=4, seed=seed)

    data, files = one(), load_data(shards, model_input=(3, 32, 32), batch_size=4)
    labels = torch.cat([labels for _, labels in data.val])
    assert data.num_classes == 2 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert equal(list(data.val), list(files.val))
    batches = iter(data.train)
    next(batches)
    second = one().train
    second.load_state_dict(data.train.state_dict())
    assert equal(list(batches), list(second))


def test_a_shard_that_is_cut_short_and_one_without_classes_are_one_line(shards):
    path = shards / "validation-0.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data: .*validation-0\.tar") as caught:
        load_data("wds/", root=shards, model_input=(3, 32, 32), batch_size=4)
    assert "\n" not in str(caught.value)
    with tarfile.open(path, "w") as tar:
        tar.add(shards / "val" / "cat" / "0.png", "0.png")
    with pytest.raises(ValueError, match=r"0\.png has no 0\.cls, the number of its class"):
        load_data("wds/", root=shards, model_input=(3, 32, 32), batch_size=4)


def test_a_hugging_face_data_set_on_disk_is_read_by_its_path(folder, tmp_path_factory, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(folder / "val" / "cat" / "0.png")
    broken = folder / "val" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    options = dict(model_input=(1, 32, 32), batch_size=4)
    data = load_data(f"hfds/{folder}", root=tmp_path_factory.mktemp("cache"), **options)
    with pytest.warns(UserWarning, match="val: 1 of 6 images have 16 bits .*; 1 of 6 images cannot be read"):
        found = list(data.val)
    assert data.classes == ("cat", "dog") and equal(found, list(load_data(folder, **options).val))
    assert sum(len(labels) for _, labels in data.train) == 8


def test_more_workers_than_processors_are_said_once(folder, monkeypatch, recwarn):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    data = load_data(folder, model_input=(1, 32, 32), batch_size=4, workers=2)
    assert sum(len(labels) for _, labels in data.val) == 6
    said = [str(w.message) for w in recwarn if "processors" in str(w.message) or "worker" in str(w.message)]
    assert len(said) == 1 and "--workers 1" in said[0]


def break_folder(folder, how):
    if how == "no validation folder":
        (folder / "val").rename(folder / "other")
    elif how == "empty class folder":
        for image in (folder / "train" / "dog").iterdir():
            image.unlink()
    elif how == "no class folders":
        (folder / "train").rename(folder / "kept")
        (folder / "train").mkdir()
    elif how == "classes differ":
        (folder / "val" / "dog").rename(folder / "val" / "cow")
    return folder


FAULTS = ["no validation folder", "empty class folder", "no class folders", "classes differ"]


@pytest.mark.parametrize("how", FAULTS)
def test_incomplete_image_folder_is_one_line(folder, how):
    with pytest.raises(ValueError, match=r"^data: ") as caught:
        load_data(break_folder(folder, how), model_input=(3, 32, 32), batch_size=4)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("nothing", {}, "nothing"),
        ("torch/nothing", {}, "torch/nothing"),
        ("/no/such/folder", {}, "/no/such/folder"),
        ("digits", {"validation": "train"}, "validation"),
        ("digits", {"batch_size": 0}, "batch_size"),
        ("digits", {"workers": -1}, "workers"),
        (".", {"validation": "val"}, "validation"),
    ],
)
def test_unknown_data_or_option_is_one_line_that_names_it(name, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        load_data(name, **{"model_input": (1, 8, 8), "batch_size": 4, **options})
    assert "\n" not in str(caught.value)
