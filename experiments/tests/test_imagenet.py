"""Streams of images: the same whoever makes them and wherever they start, cropped as torchvision crops."""

import io
import itertools
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssam_experiments.data import imagenet
from ssam_experiments.data.imagenet import eval_batches, image_folder, parquet, random_box, train_batches
from ssam_experiments.data.parquet import ImageFile

TRAIN, VALID, CLASSES = 22, 7, ("ape", "bee", "cat")


def color(index):
    """Return a color that tells an image from the others, whatever its crop."""
    return (8 * index + 4, 255 - 8 * index, 128)


def encoded(index, size=(40, 30), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color(index)).save(buffer, kind)
    return buffer.getvalue()


def label_of(index):
    return index * len(CLASSES) // TRAIN


def indices(images):
    """Return which images these are."""
    return ((images[:, 0, 0, 0].astype(int) - 4) // 8).tolist()


def write_folder(root):
    for split, count in (("train", TRAIN), ("val", VALID)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        for i in range(count):
            (root / split / CLASSES[label_of(i)] / f"{i:02}.JPEG").write_bytes(encoded(i))
    (root / "train" / "ape" / "notes.txt").write_text("no image")
    (root / "train" / "ape" / "._00.JPEG").write_text("no image")
    (root / "train" / ".cache").mkdir()


def write_parquet(path, rows, rows_in_group=3, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [{"bytes": encoded(i), "path": None} for i in rows], "label": list(map(label_of, rows))}
    pq.write_table(pa.table(table | columns), path, row_group_size=rows_in_group)


def write_shards(root):
    write_parquet(root / "train-00000-of-00002.parquet", range(13))
    write_parquet(root / "train-00001-of-00002.parquet", range(13, TRAIN))
    write_parquet(root / "validation-00000-of-00001.parquet", range(VALID))


@pytest.fixture(params=["folder", "parquet"])
def sources(request, tmp_path):
    if request.param == "folder":
        write_folder(tmp_path)
        return image_folder(tmp_path, "train"), image_folder(tmp_path, "validation")
    write_shards(tmp_path / "data")
    return [parquet(tmp_path, split, classes=3, window=6) for split in ("train", "validation")]


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, two in zip(first, second):
        assert set(one) == set(two)
        for name in one:
            assert type(one[name]) is type(two[name]) is np.ndarray and one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name])


def trained(source, **options):
    return train_batches(source, **{"batch": 5, "steps": 12, "image_size": 16, "seed": 1} | options)


def test_a_source_has_all_images_with_the_labels_of_their_classes_in_the_order_of_names(sources):
    for source, count in zip(sources, (TRAIN, VALID)):
        assert len(source) == count and source.classes == 3
        for again in (source, pickle.loads(pickle.dumps(source))):
            rows = [again[i] for i in range(count)]
            assert rows == [(encoded(i), label_of(i)) for i in range(count)]


def test_the_order_of_a_source_is_a_random_permutation(sources):
    source, _ = sources
    orders = [source.order(np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert all(sorted(order) == list(range(TRAIN)) for order in orders)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != list(range(TRAIN))


def test_an_epoch_has_every_image_at_most_once_with_its_label_in_an_order_of_its_own(sources):
    batches = list(trained(sources[0]))
    for batch in batches:
        assert batch["image"].shape == (5, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (5,) and batch["label"].dtype == np.int32
        assert batch["label"].tolist() == list(map(label_of, indices(batch["image"])))
    per_epoch = TRAIN // 5
    epochs = [
        [index for batch in batches[start : start + per_epoch] for index in indices(batch["image"])]
        for start in range(0, 12, per_epoch)
    ]
    assert all(len(set(epoch)) == 5 * per_epoch for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_stream_may_start_at_any_step_whatever_the_threads(sources):
    whole = list(trained(sources[0]))
    for start, threads in ((0, 1), (1, 3), (5, 2), (11, 1), (12, 4)):
        same(trained(sources[0], start=start, threads=threads), whole[start:])
    same(trained(sources[0], steps=30, start=7), list(trained(sources[0], steps=30))[7:])


def test_the_parts_of_a_batch_put_one_after_another_are_the_batch(sources):
    train, valid = sources
    for make in (
        lambda **part: trained(train, batch=6, start=2, **part),
        lambda **part: eval_batches(valid, batch=6, image_size=16, **part),
    ):
        parts = [list(make(part=(i, 3))) for i in range(3)]
        joined = [
            {name: np.concatenate([x[name] for x in three]) for name in three[0]} for three in zip(*parts)
        ]
        same(joined, make())


def test_a_longer_run_starts_like_a_shorter_one(sources):
    same(itertools.islice(trained(sources[0], steps=40), 12), trained(sources[0]))


def test_runs_of_neighbouring_seeds_have_no_epoch_in_common(sources):
    orders = []
    for seed in range(4):
        found = [i for b in trained(sources[0], seed=seed) for i in indices(b["image"])]
        orders += [tuple(found[:20]), tuple(found[20:40]), tuple(found[40:])]
    assert len(set(orders)) == len(orders)


def test_a_worker_process_makes_the_same_batches_and_ends_with_the_stream(sources):
    train, valid = sources
    if isinstance(train, imagenet.ImageFolder):  # one of each, for a process takes seconds to start
        stream = trained(train, start=3, workers=1)
        same(itertools.islice(stream, 5), itertools.islice(trained(train, start=3), 5))
        stream.close()
    else:
        same(evaluated(valid, workers=1), evaluated(valid))
    assert not multiprocessing.active_children()


def evaluated(source, **options):
    return eval_batches(source, batch=3, image_size=16, resize=20, **options)


def test_evaluation_has_every_image_once_in_order_and_weight_0_for_what_fills_the_last_batch(sources):
    batches = list(evaluated(sources[1]))
    assert [b["weight"].tolist() for b in batches] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    image, label, weight = (
        np.concatenate([b[name] for b in batches]) for name in ("image", "label", "weight")
    )
    assert image.shape == (9, 16, 16, 3) and image.dtype == np.uint8
    assert label.dtype == np.int32 and weight.dtype == np.float32
    assert indices(image[:VALID]) == list(range(VALID))
    assert label[:VALID].tolist() == list(map(label_of, range(VALID)))
    assert not image[VALID:].any()


# Crops


@pytest.mark.parametrize("size", [(400, 350), (64, 64), (30, 40)])
def test_a_box_lies_inside_and_has_an_area_and_a_ratio_in_range(size):
    rng, (width, height) = np.random.default_rng(0), size
    boxes = np.array([random_box(width, height, rng) for _ in range(2000)])
    left, top, w, h = boxes.T
    assert left.min() >= 0 and top.min() >= 0
    assert (left + w).max() <= width and (top + h).max() <= height
    share, log_ratio = w * h / (width * height), np.log(w / h)
    slack = 2 / min(w.min(), h.min())  # of rounding to pixels
    assert 0.08 * (1 - slack) < share.min() < 0.1 and 0.9 < share.max() <= 1
    assert np.abs(log_ratio).max() < np.log(4 / 3) + slack
    assert abs(log_ratio.mean()) < 0.05 and 0.4 < share.mean() < 0.55
    assert abs((left + w / 2).mean() / width - 0.5) < 0.02 and abs((top + h / 2).mean() / height - 0.5) < 0.02


@pytest.mark.parametrize(
    "size, box", [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13)), ((1, 1), (0, 0, 1, 1))]
)
def test_if_no_box_fits_it_is_the_largest_in_the_middle(size, box):
    assert random_box(*size, np.random.default_rng(0)) == box


def gradient(width, height):
    """Return an image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)


def one_image(tmp_path, pixels):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "only" / "image.png")
    return image_folder(tmp_path, "train")


def test_a_crop_is_resized_from_within_a_box_and_flipped_half_of_the_time(tmp_path):
    source = one_image(tmp_path, gradient(120, 90))
    images = np.concatenate([b["image"] for b in train_batches(source, batch=1, steps=300, image_size=10)])
    images = images.astype(int)
    assert np.ptp(images[..., 0], axis=1).max() <= 1 and np.ptp(images[..., 1], axis=2).max() <= 1  # upright
    steps = (images[:, 0, -1, 0] - images[:, 0, 0, 0]) / 9  # columns of the original in one of the crop
    flipped = steps < 0
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(300)
    widths, heights = 10 * np.abs(steps), 10 * (images[:, -1, 0, 1] - images[:, 0, 0, 1]) / 9
    share = widths * heights / (120 * 90)
    assert 0.05 < share.min() < 0.15 and 0.85 < share.max() < 1.1
    assert np.abs(np.log(widths / heights)).max() < np.log(4 / 3) + 0.2


def test_evaluation_resizes_the_shorter_side_and_takes_the_center(tmp_path):
    tall, small = gradient(40, 80), 20
    source = one_image(tmp_path, tall)
    (image,) = next(iter(eval_batches(source, batch=1, image_size=small, resize=40)))["image"]
    np.testing.assert_array_equal(image, tall[30:50, 10:30])
    (image,) = next(iter(eval_batches(source, batch=1, image_size=small, resize=20)))["image"]
    # A pixel is the mean of its neighbourhood with weights of a triangle two pixels to each side.
    np.testing.assert_allclose(image[:, 3, 1], 2 * np.arange(10, 30) + 20.5 - 20, atol=0.51)


def test_resizing_averages_what_is_dropped(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    (image,) = next(iter(eval_batches(one_image(tmp_path, stripes), batch=1, image_size=16, resize=16)))[
        "image"
    ]
    assert np.abs(image[:, 1:-1].astype(int) - 100).max() <= 3


# What can be wrong


def test_validation_labels_are_those_of_train_even_if_a_class_is_missing(tmp_path):
    write_folder(tmp_path)
    for file in (tmp_path / "val" / "ape").iterdir():
        file.rename(tmp_path / "val" / "cat" / file.name)
    (tmp_path / "val" / "ape").rmdir()
    source = image_folder(tmp_path, "validation")
    assert source.classes == 3 and {source[i][1] for i in range(len(source))} == {2}
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"val has classes that .*train has not: dog"):
        image_folder(tmp_path, "validation")


def test_missing_files_are_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder validation or val in"):
        image_folder(tmp_path, "validation")
    (tmp_path / "train" / "ape").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"No images .*jpeg.* in .*train"):
        image_folder(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"no files train-\*\.parquet in .* or in its data"):
        parquet(tmp_path, "train")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(3))
    with pytest.raises(FileNotFoundError, match=r"1 files .* names say 2"):
        parquet(tmp_path, "train")


@pytest.mark.parametrize("make", [image_folder, parquet])
def test_an_unknown_split_is_refused(tmp_path, make):
    with pytest.raises(ValueError, match="split must be train or validation, got 'test'"):
        make(tmp_path, "test")


@pytest.mark.parametrize("label", [-1, 3, None])
def test_a_label_out_of_range_is_refused_with_its_row(tmp_path, label):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(4), label=[0, 1, 2, label])
    source = parquet(tmp_path, "train", classes=3)
    with pytest.raises(ValueError, match=r"train-00000.* row 0 of row group 1 must have .* label below 3"):
        list(evaluated(source))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val" / "ape" / "01.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"ape.01\.JPEG: the image is neither PNG nor JPEG"):
        list(evaluated(image_folder(tmp_path, "validation")))


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_a_strip_is_refused_before_it_is_resized_to_the_length_of_a_crop(tmp_path, size):
    write_folder(tmp_path)
    (tmp_path / "val" / "ape" / "01.JPEG").write_bytes(encoded(1, size))
    with pytest.raises(
        ValueError, match=rf"ape.01\.JPEG: the image has {size[0]} x {size[1]} pixels; one side"
    ):
        list(evaluated(image_folder(tmp_path, "validation")))


def test_a_missing_column_is_named(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": b""}]}), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="must have a column label; it has image"):
        parquet(tmp_path, "train")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": TRAIN + 1}, "A batch of 23 is more than the 22 images"),
        ({"start": 13}, "start must be from 0 to steps, 12; got 13"),
        ({"start": -1}, "start must be from 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"part": (0, 2)}, r"part must be \(i, n\), i below n and n a divisor of the batch, 5; got \(0, 2\)"),
        ({"part": (5, 5)}, r"got \(5, 5\)"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_read(sources, options, message):
    with pytest.raises(ValueError, match=message):
        trained(sources[0], **options)


def test_evaluation_refuses_a_crop_larger_than_what_it_is_taken_from(sources):
    with pytest.raises(ValueError, match="resize must be at least image_size, 16; got 15"):
        eval_batches(sources[1], batch=3, image_size=16, resize=15)


# Row groups


def test_an_epoch_reads_each_row_group_once_and_mixes_those_of_a_window(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(TRAIN), rows_in_group=2)
    source, reads, read = parquet(tmp_path, "train", window=6), [], ImageFile.read_group
    monkeypatch.setattr(ImageFile, "read_group", lambda self, i: reads.append(i) or read(self, i))
    order = source.order(np.random.default_rng(0))
    for index in order:
        source[int(index)]
    assert sorted(reads) == list(range(TRAIN // 2)) != reads
    windows = [order[start : start + 6] for start in range(0, TRAIN, 6)]
    for window in windows:
        assert np.all(np.unique(window // 2, return_counts=True)[1] == 2)
    assert any(list(window // 2) != sorted(window // 2) for window in windows)
    assert any(
        np.any(window[::2] // 2 != window[1::2] // 2) for window in windows
    )  # rows of groups interleave


def test_row_groups_kept_are_those_of_two_windows(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(TRAIN), rows_in_group=2)
    source = parquet(tmp_path, "train", window=4)
    for index in range(TRAIN):
        source[index]
    assert 4 <= len(source._cache) <= 6


def test_row_groups_of_all_sizes_and_none_are_found(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    table = pa.table({"image": [{"bytes": encoded(i)} for i in range(6)], "label": [0] * 6})
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, count in ((0, 2), (2, 0), (2, 1), (3, 3), (6, 0)):
            writer.write_table(table.slice(start, count))
    source = parquet(tmp_path, "train", window=2)
    assert [source[i][0] for i in range(6)] == [encoded(i) for i in range(6)]
    assert sorted(source.order(np.random.default_rng(0))) == list(range(6))
