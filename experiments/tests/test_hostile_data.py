"""Data that strangers made: every file of the table is refused, in one line, before it costs anything."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import hostile_files
import hostile_parquet
import numpy as np
import pytest

from ssam_experiments.data import bounds, cifar_batches, images, parquet_bounds, sources
from ssam_experiments.data.bounds import DataError, check_labels, one_line
from ssam_experiments.data.cifar_batches import read_batch
from ssam_experiments.data.images import decode
from ssam_experiments.data.thrift import Reader

MEMORY, SECONDS = 400, 5  # MiB for all files, seconds of CPU time for each
REASONS = {
    "image_pipe": "is not a regular file",
    "tall": "has 1 x 20000 pixels; one side may be 100 times the other",
    "png_of_75_megapixels": "has 8700 x 8700 pixels; at most 67108864",
    "png_of_400_megapixels": "400000000 pixels",
    "jpeg_of_500_scans": "505 scans",
    "label_fraction": "3.7, is of type float",
    "label_text": "'3', is of type str",
    "label_true": "True, is of type bool",
    "label_2_to_the_63": "labels from 9223372036854775808",
    "key_tower": "a tuple is where a short text must be",
    "build_function": "sets the state of something that is no array",
    "two_million_lists": "more than 1048576 operations",
    "bomb": "unzips to more than 102760464 bytes",
    "a_dictionary_of_one": "bytes in a row group, far more than in the file",
    "deltas": "bytes in a row group, far more than in the file",
    "page_of_2_gigabytes": "it has 2147483647 bytes or more; at most 16777680",
    "page_of_2_billion_values": "with 2147483647 values",
    "rows_without_end": "rows in a row group; at most 1048576",
    "cifar_of_200000": "has 200000 examples; at most 131072",
    "cifar_label_is_2_to_the_63": "Integer value 9223372036854775808 not in range",
}
"""Why some of them are refused, by name; the others may run into whatever the decoders find first."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_every_hostile_file_is_refused_in_one_line_that_names_it(tmp_path):
    assert len(hostile_files.CASES) >= 60
    files = list(hostile_files.write_all(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(files))
    command = [
        sys.executable,
        hostile_parquet.__file__.replace("parquet", "reader"),
        tmp_path / "manifest.json",
    ]
    few = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # each thread takes room of its own
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=few)
    lines = done.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert done.returncode == 0 and not done.stderr, (lines[-1:], done.stderr[-2000:])
    assert [result["name"] for result in results] == [name for name, *_ in files]
    faults = [result for result, (*_, path) in zip(results, files) if not is_refusal(result, path)]
    assert faults == []
    messages = {result["name"]: result["message"] for result in results}
    assert [messages[name] for name, reason in REASONS.items() if reason not in messages[name]] == []
    assert sum(result["memory"] for result in results) <= MEMORY
    shutil.rmtree(tmp_path)  # pipes, sparse files and all


def is_refusal(result, path):
    message = result["message"]
    return (
        result["kind"] in ("DataError", "Refused", "OSError", "IsADirectoryError")
        and message.isprintable()
        and len(message) < 600
        and one_line(path) in message
        and result["seconds"] <= SECONDS
    )


@pytest.mark.parametrize("protocol", range(5))
def test_a_batch_is_read_whatever_the_protocol_of_its_pickle(tmp_path, protocol):
    planes, path = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), tmp_path / "batch"
    names = {"batch_label": "1 of 5", "filenames": [b"a.png", b"b\xff.png"], "labels": [3, 9]}
    for data in (planes, np.asfortranarray(planes)):
        path.write_bytes(pickle.dumps({"data": data} | names, protocol))
        pixels, labels = read_batch(path, "labels", 10)
        np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2).reshape(2, 3072), planes)
        assert labels.tolist() == [3, 9] and labels.dtype == np.int32


def test_the_documentation_has_the_bounds():
    page = (
        Path(__file__, "../../../docs/experiments.md")
        .resolve()
        .read_text()
        .split("### What data may hold")[1]
    )
    numbers = [
        *(bounds.EXAMPLES, bounds.STREAM_EXAMPLES, bounds.FILE_BYTES, cifar_batches.OPERATIONS),
        *(bounds.IMAGE_BYTES, bounds.PIXELS, bounds.SIDES, images.SCANS, parquet_bounds.FOOTER_BYTES),
        *(
            parquet_bounds.VALUES,
            parquet_bounds.COLUMNS,
            parquet_bounds.GROUP_ROWS,
            parquet_bounds.GROUP_BYTES,
        ),
    ]
    rows = [line for line in page.split("Labels are")[0].splitlines() if line[:2] == "| "][2:]
    assert [row.split(" | ")[1].removesuffix(" |").split(", and")[0] for row in rows] == [
        f"{n:,}" for n in numbers
    ]
    assert f"{parquet_bounds.GROWTH} times those in the file plus {parquet_bounds.SLACK:,}" in rows[-1]


def test_images_at_the_bounds_are_decoded():
    for size in ((1, 100), (100, 1), (8192, 8192)):
        image = decode(hostile_files.png(*size), "here")
        assert image.size == size and image.mode == "RGB"
    assert decode(hostile_files.jpeg(64, 64, progressive=True), "here").size == (64, 64)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 3.7], "label 1 of here, 3.7, is of type float"),
        (["3"], "label 0 of here, '3', is of type str"),
        ([True], "label 0 of here, True, is of type bool"),
        ([2**63], "from 0 to 9; here has labels from 9223372036854775808 to"),
        (np.array([-1, 3]), "from 0 to 9; here has labels from -1 to 3"),
        (np.array([3, 10], np.uint8), "from 0 to 9; here has labels from 3 to 10"),
    ],
)
def test_labels_are_whole_numbers_below_the_number_of_classes(labels, message):
    with pytest.raises(DataError, match=message):
        check_labels(labels, 10, "here")
    assert check_labels([], 10, "here").dtype == np.int32


def test_a_message_is_one_short_line_that_keeps_its_beginning_and_its_end():
    assert one_line("a\n\x1b[31m\udc80b") == "a\\n\\x1b[31m\\udc80b"
    line = one_line("start " + "x" * 10**6 + " end")
    assert line.startswith("start") and len(line) < 600
    assert one_line("start " + "x" * 1000 + " end").endswith(" end")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr(bounds, "check_regular", lambda *_: 2)
    with pytest.raises(DataError, match="file has 2 bytes, but not while it was read"):
        bounds.read_regular(path)


def test_the_images_kept_of_parquet_files_have_a_bound_in_bytes(tmp_path, monkeypatch):
    pictures = [hostile_files.png(8, 8 + i) for i in range(4)]
    path = Path(tmp_path / "train-00000-of-00001.parquet")
    path.write_bytes(hostile_parquet.written(pictures, row_group_size=1))
    for room, kept in ((1, 1), (len(pictures[2] + pictures[3]), 2), (10**6, 4)):
        monkeypatch.setattr(sources, "CACHE_BYTES", room)
        source = sources.parquet(tmp_path, "train", classes=10)
        for turn in (0, 1, 2, 3, 3):
            assert source[turn] == (pictures[turn], 0)
        assert len(source._cache) == kept


def test_a_struct_of_thrift_is_read_by_the_numbers_of_its_fields():
    inner = hostile_parquet.thrift(i1=-3, b20=b"skipped")
    data = hostile_parquet.thrift(l1=2**40, L2=[inner, inner], I3=[1, -1], s5=inner)
    reader = Reader(data + b"rest", 0, 100)
    small = {1: -3, 20: 7}
    assert reader.struct() == {1: 2**40, 2: [small, small], 3: [1, -1], 5: small}
    assert reader.position == len(data)
    with pytest.raises(ValueError, match="too many values"):
        Reader(data, 0, 5).struct()
    with pytest.raises(IndexError):
        Reader(data[:-1], 0, 100).struct()
