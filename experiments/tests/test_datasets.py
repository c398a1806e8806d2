"""Data sets in memory, read from tiny files in every layout, whole and damaged."""

import gzip
import io
import os
import pickle
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssam_experiments.data import datasets
from ssam_experiments.data.datasets import load
from ssam_experiments.data.images import decode

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (30, 32, 32, 3), np.uint8)
GREYS = RNG.integers(0, 256, (30, 28, 28), np.uint8)
LABELS = np.arange(30) % 10


def name_of(value):
    """Name a parameter in a test's id: bytes are long, and not all are the same in every process."""
    return value if isinstance(value, str) else type(value).__name__


def by_content(part):
    """Return the labels by the bytes of their image, for comparing sets whatever their order."""
    return {image.tobytes(): int(label) for image, label in zip(*part)}


def truth(images, labels):
    return by_content((images, labels))


# Parquet


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, images, image="img", rows_in_group=None, **labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": picture, "path": f"{i}.png"} for i, picture in enumerate(images)]
    pq.write_table(pa.table({image: pictures, **labels}), path, row_group_size=rows_in_group)


def cifar10_in_parquet(folder, **options):
    pngs = list(map(encoded, COLORS))
    write_parquet(folder / "train-00000-of-00002.parquet", pngs[:15], label=LABELS[:15], **options)
    write_parquet(folder / "train-00001-of-00002.parquet", pngs[15:20], label=LABELS[15:20], **options)
    write_parquet(folder / "test-00000-of-00001.parquet", pngs[20:], label=LABELS[20:], **options)


@pytest.mark.parametrize("subfolder", ["", "data", "plain_text"])
def test_cifar10_is_read_from_parquet_files_in_the_order_of_their_names(tmp_path, subfolder):
    cifar10_in_parquet(tmp_path / subfolder, rows_in_group=4)
    data = load("cifar10", str(tmp_path))
    assert by_content(data.train) == truth(COLORS[:20], LABELS[:20])
    np.testing.assert_array_equal(data.test.images, COLORS[20:])
    np.testing.assert_array_equal(data.test.labels, LABELS[20:])
    for images, labels in (data.train, data.test):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
    assert data.valid is None and data.classes == 10 and data.name == "cifar10"


def test_cifar100_in_parquet_has_the_fine_labels(tmp_path):
    fine = np.arange(30) + 70
    for split, part in (("train", slice(20)), ("test", slice(20, 30))):
        write_parquet(
            tmp_path / "cifar100" / f"{split}-00000-of-00001-0a1b2c3d.parquet",
            list(map(encoded, COLORS[part])),
            coarse_label=fine[part] // 5,
            fine_label=fine[part],
        )
    data = load("cifar100", tmp_path)
    assert data.classes == 100
    assert by_content(data.train) == truth(COLORS[:20], fine[:20])
    np.testing.assert_array_equal(data.test.labels, fine[20:])


def test_jpeg_and_gray_images_are_decoded_too(tmp_path):
    flat = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    pictures = [encoded(flat, "JPEG"), encoded(flat[..., 0])]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", pictures, image="image", label=[1, 2])
    images = load("cifar10", tmp_path).test.images.astype(int)
    assert np.abs(images[0] - flat).max() <= 3
    np.testing.assert_array_equal(images[1], 200)


def test_a_missing_shard_is_noticed(tmp_path):
    cifar10_in_parquet(tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has 1 files train-\*.parquet; their names say 2"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"picture": [{"bytes": b""}], "label": [1]},
            "must have a column img or image; it has picture, label",
        ),
        ({"img": [{"bytes": b""}], "coarse_label": [1]}, "must have a column label or labels; it has img"),
        ({"img": [b"png"], "label": [1]}, "Column img of .* must be a struct with bytes; it is binary"),
        ({"img": [{"path": "a.png"}], "label": [1]}, "Column img of .* must be a struct with bytes"),
        ({"img": [{"bytes": b""}], "label": ["cat"]}, "Column label of .* must hold integers; it is string"),
        (
            {"img": [{"bytes": encoded(COLORS[0])}], "label": [10]},
            "from 0 to 9; .* has labels from 10 to 10",
        ),
        (
            {"img": [{"bytes": encoded(COLORS[0])}], "label": [2**32]},
            "from 0 to 9; .* labels from 4294967296",
        ),
        ({"img": [{"bytes": encoded(COLORS[0])}] * 2, "label": [1, None]}, "has labels from -1 to 1"),
        ({"img": [{"bytes": encoded(COLORS[0])}, None], "label": [1, 2]}, "row 1 .*: there is no image"),
        (
            {"img": [{"bytes": b"\x89PNG and so on"}], "label": [1]},
            "row 0 .*: the image is neither PNG nor JPEG",
        ),
        ({"img": [{"bytes": encoded(COLORS[0])[:-900]}], "label": [1]}, "the image cannot be decoded"),
        (
            {"img": [{"bytes": encoded(GREYS[0])}], "label": [1]},
            r"must have 32 x 32 pixels, it has \(28, 28\)",
        ),
    ],
    ids=name_of,
)
def test_a_parquet_file_that_is_not_cifar_is_refused_by_name(tmp_path, columns, message):
    cifar10_in_parquet(tmp_path)
    pq.write_table(pa.table(columns), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=message) as error:
        load("cifar10", tmp_path)
    assert "test-00000-of-00001.parquet" in str(error.value)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_truncated_parquet_file_is_refused_by_name(tmp_path, kept):
    cifar10_in_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet is not a complete Parquet file"):
        load("cifar10", tmp_path)


def test_a_parquet_file_with_damaged_pages_is_refused_by_name(tmp_path):
    cifar10_in_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet"):
        load("cifar10", tmp_path)


def test_cifar10_is_not_taken_for_cifar100(tmp_path):
    cifar10_in_parquet(tmp_path)
    with pytest.raises(ValueError, match="all below 20: they are not CIFAR-100"):
        load("cifar100", tmp_path)


# The official Python batches


def planes(images):
    """Return images as the batches have them: one row each, the red plane before the green and the blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python2_pickle(data, label_key, labels):
    """Return what Python 2 wrote for ``{"data": array, label_key: list}``, opcode by opcode."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    raw = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + integer(0)
        + b"\x85"
        + text(b"b")
        + b"\x87R"
        b"(" + integer(1) + integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
        b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    listed = b"](" + b"".join(map(integer, labels.tolist())) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + listed + b"u."


def python3_pickle(data, label_key, labels):
    """Return what this Python and NumPy write, text keys and all, as mirrors of the data do."""
    return pickle.dumps({"data": data, label_key.decode(): labels.tolist()}, protocol=2)


def cifar10_in_batches(folder, write=python2_pickle):
    folder.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, part in zip(names, np.split(np.arange(30), 6)):
        (folder / name).write_bytes(write(planes(COLORS[part]), b"labels", LABELS[part]))


def test_the_bytes_written_by_hand_are_the_pickle_that_is_meant():
    content = pickle.loads(python2_pickle(planes(COLORS[:2]), b"labels", LABELS[:2]), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], planes(COLORS[:2]))
    assert content[b"labels"] == [0, 1]


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_cifar10_is_read_from_the_official_batches(tmp_path, subfolder, write):
    cifar10_in_batches(tmp_path / subfolder, write)
    data = load("cifar10", tmp_path)
    assert by_content(data.train) == truth(COLORS[:25], LABELS[:25])
    np.testing.assert_array_equal(data.test.images, COLORS[25:])
    np.testing.assert_array_equal(data.test.labels, LABELS[25:])
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int32


def test_cifar100_is_read_from_the_official_batches(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    for name, part in (("train", slice(20)), ("test", slice(20, 30))):
        content = python2_pickle(planes(COLORS[part]), b"fine_labels", LABELS[part] + 90)
        (tmp_path / "cifar-100-python" / name).write_bytes(content)
    data = load("cifar100", tmp_path)
    assert by_content(data.train) == truth(COLORS[:20], LABELS[:20] + 90)
    np.testing.assert_array_equal(data.test.images, COLORS[20:])


class Calls:
    """Pickled, it makes whoever loads it call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, protocol):
    cifar10_in_batches(tmp_path)
    mark = tmp_path / "mark"
    content = {"data": Calls(os.system, f"touch {mark}"), "labels": [0]}
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(pickle.UnpicklingError, match=r"data_batch_3: The pickle asks for \w+.system"):
        load("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "value, asks",
    [
        (Calls(eval, "1 + 1"), r"asks for (__builtin__|builtins).eval"),
        (Calls(getattr, "", "join"), "getattr"),
        (np.sum, "asks for numpy"),
        (np.zeros(3, object), "array of type O"),
        (np.zeros(3, np.float32), "array of type f4"),
        (np.dtype([("a", "u1")]), "array of type V1"),
        (np.float64(1), "asks for numpy"),
        (io.BytesIO(b"x"), "asks for _?io.BytesIO"),
    ],
    ids=name_of,
)
def test_a_pickle_with_anything_but_bytes_lists_and_text_is_refused(tmp_path, value, asks):
    cifar10_in_batches(tmp_path)
    content = pickle.dumps({"data": planes(COLORS[:1]), "labels": [0], "more": value}, protocol=2)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match=f"test_batch: The pickle .*{asks}"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "test_batch is not a complete batch of CIFAR"),
        (b"no pickle at all", "test_batch is not a complete batch of CIFAR"),
        (python2_pickle(planes(COLORS[:2]), b"labels", LABELS[:2])[:-5], "is not a complete batch"),
        (python2_pickle(planes(COLORS[:2]), b"fine_labels", LABELS[:2]), "with data and labels"),
        (python2_pickle(planes(COLORS[:2]), b"labels", LABELS[:3]), "is not a complete batch"),
        (python2_pickle(planes(COLORS[:2]), b"labels", LABELS[:2] + 9), "from 0 to 9; .*test_batch has"),
        (pickle.dumps([1, 2]), "is not a complete batch"),
        (pickle.dumps({"data": "text", "labels": [1]}), "is not a complete batch"),
    ],
    ids=name_of,
)
def test_a_damaged_batch_is_refused_by_name(tmp_path, content, message):
    cifar10_in_batches(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path)


def test_an_array_with_fewer_bytes_than_its_shape_says_is_refused(tmp_path):
    cifar10_in_batches(tmp_path)
    content = python2_pickle(planes(COLORS[:2]), b"labels", LABELS[:2])
    shape = b"J" + struct.pack("<i", 2) + b"J" + struct.pack("<i", 3072)
    huge = b"J" + struct.pack("<i", 2**31 - 1) + b"J" + struct.pack("<i", 3072)
    assert shape in content
    (tmp_path / "test_batch").write_bytes(content.replace(shape, huge))
    with pytest.raises(ValueError, match=r"test_batch is not .* has 6144 bytes"):
        load("cifar10", tmp_path)


def test_a_missing_batch_is_named(tmp_path):
    cifar10_in_batches(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4 of CIFAR-10"):
        load("cifar10", tmp_path)


# Fashion-MNIST


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion_mnist(folder, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", slice(20)), ("t10k", slice(20, 30))):
        for name, array in (("images-idx3", GREYS[part]), ("labels-idx1", LABELS[part].astype(np.uint8))):
            content = idx(array)
            (folder / f"{split}-{name}-ubyte{end}").write_bytes(gzip.compress(content) if end else content)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("subfolder", ["", "raw", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, subfolder, end):
    fashion_mnist(tmp_path / subfolder, end)
    data = load("fashion-mnist", tmp_path)
    assert by_content(data.train) == truth(GREYS[:20], LABELS[:20])
    np.testing.assert_array_equal(data.test.images, GREYS[20:, ..., None])
    np.testing.assert_array_equal(data.test.labels, LABELS[20:])
    assert data.test.labels.dtype == np.int32 and data.classes == 10


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "train-images-idx3-ubyte",
            idx(GREYS[:20])[:-1],
            r"has 15679 values, not the 15680 of shape \(20, 28",
        ),
        ("train-images-idx3-ubyte", idx(GREYS[:20])[:10], "does not start as an idx file"),
        ("train-images-idx3-ubyte", idx(GREYS[:20, 0]), "does not start as an idx file of bytes in 3"),
        ("train-images-idx3-ubyte", idx(GREYS[:20, :9]), r"must be 28 x 28; those of .* are \(9, 28\)"),
        ("t10k-labels-idx1-ubyte", idx(LABELS[:9].astype(np.uint8)), "has 10 images, but .* 9 labels"),
        (
            "t10k-labels-idx1-ubyte",
            idx(np.full(10, 10, np.uint8)),
            "from 0 to 9; .* has labels from 10 to 10",
        ),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS))[:-9], "is not a complete gzip file"),
        ("t10k-labels-idx1-ubyte.gz", b"plain", "is not a complete gzip file"),
    ],
    ids=name_of,
)
def test_a_damaged_idx_file_is_refused_by_name(tmp_path, name, content, message):
    fashion_mnist(tmp_path)
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load("fashion-mnist", tmp_path)
    assert name in str(error.value)


# What all have in common


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_what_is_missing_is_said_in_all_its_layouts(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        load(name, tmp_path)
    layouts = {
        "fashion-mnist": ["train-images-idx3-ubyte", ".gz", "FashionMNIST/raw"],
        "cifar10": ["train-*.parquet", "plain_text", "data_batch_1", "test_batch", "cifar-10-batches-py"],
        "cifar100": ["train-*.parquet", "data", "cifar-100-python"],
    }
    for text in (str(tmp_path), *layouts[name]):
        assert text in str(error.value)
    for folder in (tmp_path / "nowhere", None):
        with pytest.raises(FileNotFoundError, match=f"{name} needs the folder"):
            load(name, folder)


def test_digits_are_spread_over_the_range_of_bytes_and_split_by_class():
    data = load("digits")
    assert data.train.images.shape == (1297, 8, 8, 1) and data.test.images.shape == (500, 8, 8, 1)
    levels = np.unique(data.train.images)
    assert len(levels) == 17 and levels[0] == 0 and levels[8] == 128 and levels[-1] == 255
    counts = [np.bincount(part.labels) for part in (data.train, data.test)]
    np.testing.assert_allclose(counts[0] / 1297, counts[1] / 500, atol=0.002)
    assert not set(by_content(data.train)) & set(by_content(data.test))


def test_mean_and_deviation_are_those_of_the_training_images_by_channel(tmp_path):
    cifar10_in_parquet(tmp_path)
    data = load("cifar10", tmp_path, validation=5)
    images = data.train.images / 255
    np.testing.assert_allclose(data.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(data.std, images.std((0, 1, 2)), rtol=1e-6)
    assert all(type(value) is float and value == np.float32(value) for value in data.mean + data.std)


def test_a_channel_that_never_varies_has_deviation_1():
    images = np.zeros((4, 8, 8, 2), np.uint8)
    images[..., 0], images[2, 3, 4, 1] = 255, 255
    mean, std = datasets._statistics(images)
    assert mean[0] == 1 and std[0] == 1 and 0 < std[1] < 0.1


def test_validation_is_set_aside_before_the_limit_and_the_noise():
    whole = load("digits", validation=97)
    part = load("digits", validation=97, limit=300, label_noise=0.4)
    np.testing.assert_array_equal(part.valid.images, whole.valid.images)
    np.testing.assert_array_equal(part.valid.labels, whole.valid.labels)
    np.testing.assert_array_equal(part.train.images, whole.train.images[:300])
    np.testing.assert_array_equal(part.test.labels, whole.test.labels)
    assert len(whole.train.labels) == 1200 and len(whole.valid.labels) == 97
    everything = load("digits")
    assert by_content(everything.train) == by_content(whole.train) | by_content(whole.valid)


@pytest.mark.parametrize("noise, count", [(0.0, 0), (0.4, 519), (0.99, 1284)])
def test_label_noise_replaces_an_exact_count_by_other_classes(noise, count):
    clean, noisy = load("digits"), load("digits", label_noise=noise)
    np.testing.assert_array_equal(noisy.train.images, clean.train.images)
    wrong = noisy.train.labels != clean.train.labels
    assert wrong.sum() == count
    assert noisy.train.labels.dtype == np.int32
    shifts = np.bincount((noisy.train.labels - clean.train.labels)[wrong] % 10, minlength=10)
    assert shifts[0] == 0 and (count == 0 or shifts[1:].min() > count / 9 / 2)


def test_the_seed_fixes_the_split_and_the_noise():
    first, again, other = (load("digits", validation=9, label_noise=0.2, seed=seed) for seed in (1, 1, 2))
    for one, two in zip((*first.train, *first.valid), (*again.train, *again.valid)):
        np.testing.assert_array_equal(one, two)
    assert np.any(first.valid.images != other.valid.images)
    assert np.any(first.train.labels != other.train.labels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation": -1}, "validation must be from 0 to below 1297.*got -1"),
        ({"validation": 1297}, "validation must be from 0 to below 1297.*got 1297"),
        ({"limit": 0}, "limit must be from 1 to 1297.*got 0"),
        ({"limit": 1201, "validation": 97}, "limit must be from 1 to 1200.*got 1201"),
        ({"label_noise": 1.0}, "label_noise must be from 0 to below 1, got 1.0"),
        ({"label_noise": -0.1}, "label_noise must be from 0 to below 1, got -0.1"),
        ({"label_noise": float("nan")}, "label_noise must be from 0 to below 1, got nan"),
        ({"name": "cifar"}, "one of digits, fashion-mnist, cifar10, cifar100, got 'cifar'"),
    ],
)
def test_arguments_out_of_range_are_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "digits", **options})


def test_files_without_examples_are_refused(tmp_path):
    cifar10_in_parquet(tmp_path)
    empty = pa.table({"img": [{"bytes": encoded(COLORS[0])}], "label": [1]}).slice(0, 0)
    pq.write_table(empty, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="has no examples for training, or none for testing"):
        load("cifar10", tmp_path)


def test_no_more_images_are_decoded_than_are_kept(tmp_path, monkeypatch):
    cifar10_in_parquet(tmp_path, rows_in_group=4)
    whole = load("cifar10", tmp_path, validation=3)
    decoded, place = [], "ssam_experiments.data.images.decode"
    monkeypatch.setattr(place, lambda *args: decoded.append(args[1]) or decode(*args))
    part = load("cifar10", tmp_path, validation=3, limit=5)
    assert len(decoded) == len(set(decoded)) == 5 + 3 + 10
    np.testing.assert_array_equal(part.train.images, whole.train.images[:5])
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:5])
    for one, other in ((part.valid, whole.valid), (part.test, whole.test)):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert by_content(whole.train) | by_content(whole.valid) == truth(COLORS[:20], LABELS[:20])
