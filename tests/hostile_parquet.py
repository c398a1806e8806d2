"""Parquet files that no data set has: written by pyarrow, or by hand where it would not."""

import io
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_files import CONTENTS, cases, png

LARGE = bytes(380_000)


def written(images, labels=None, column="img", **options):
    """Return a file of these encoded images, which may be any array of bytes."""
    column_of = images if isinstance(images, pa.Array) else pa.array(images, pa.binary())
    labels = np.zeros(len(column_of), np.int64) if labels is None else labels
    table = pa.table({column: pa.StructArray.from_arrays([column_of], ["bytes"]), "label": labels})
    return of_table(table, **options)


def of_table(table, **options):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"row_group_size": 2**26, "store_schema": False} | options)
    return buffer.getvalue()


def repeated(image, rows, **options):
    """Return a file with a dictionary of one image, and this many rows."""
    indices = pa.array(np.zeros(rows, np.int32))
    images = pa.DictionaryArray.from_arrays(indices, pa.array([image], pa.binary()))
    return written(images, dictionary_pagesize_limit=2**28, **options)


def empty(rows, **options):
    return written(pa.nulls(rows, pa.binary()), np.zeros(rows, np.int8), **options)


def doubled(name):
    """Return a file with two columns for the images."""
    image = pa.array([{"bytes": png(32, 32)}])
    return of_table(pa.Table.from_arrays([image, image, pa.array([1])], ["img", name, "label"]))


# By hand: thrift's compact protocol, and a file that is one page of each column


def thrift(**fields):
    """Return a struct; fields are named after their type and number, as in ``i3``; lists are of structs."""
    out, last = b"", 0
    for name, value in sorted(fields.items(), key=lambda item: int(item[0][1:])):
        kind, number = {"i": 5, "l": 6, "b": 8, "s": 12}.get(name[0], 9), int(name[1:])
        step = number - last
        out += bytes([step << 4 | kind]) if step < 16 else bytes([kind]) + varint(number << 1)
        out += encoded(name[0], value)
        last = number
    return out + b"\0"


def encoded(kind, value):
    if kind in "il":
        return varint(value << 1 ^ value >> 63)
    if kind == "b":
        return varint(len(value)) + value
    if kind == "s":
        return value
    items = {"L": 12, "I": 5, "B": 8}[kind]
    item = {"L": "s", "I": "i", "B": "b"}[kind]
    return bytes([0xF0 | items]) + varint(len(value)) + b"".join(encoded(item, v) for v in value)


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


SCHEMA = [
    thrift(b4=b"schema", i5=2),
    thrift(i3=0, b4=b"img", i5=1),
    thrift(i1=6, i3=0, b4=b"bytes"),
    thrift(i1=2, i3=0, b4=b"label"),
]


def by_hand(rows=1, page=None, schema=SCHEMA, groups=None, **chunk):
    """Return a file with these rows, or so it says, of which a page of images has this header."""
    image = struct.pack("<I", 4) + b"none"
    label = struct.pack("<q", 1)
    pages, chunks = b"PAR1", []
    for kind, path, data in ((6, [b"img", b"bytes"], image), (2, [b"label"], label)):
        start = len(pages)
        values = thrift(i1=rows, i2=0, i3=3, i4=3)
        header = thrift(i1=0, i2=len(data), i3=len(data), s5=values)
        pages += (page if page and kind == 6 else header) + data
        meta = {"i1": kind, "I2": [0, 3], "B3": path, "i4": 0, "l5": rows, "l6": len(data)}
        meta |= {"l7": len(pages) - start, "l9": start} | (chunk if kind == 6 else {})
        chunks.append(thrift(l2=0, s3=thrift(**meta)))
    group = thrift(L1=chunks, l2=len(image), l3=rows)
    footer = thrift(i1=1, L2=schema, l3=rows, L4=[group] if groups is None else groups)
    return pages + footer + struct.pack("<I", len(footer)) + b"PAR1"


def nested(depth):
    """Return a schema that is this deep."""
    return [*[thrift(i3=0, b4=b"a", i5=1)] * depth, thrift(i1=2, i3=0, b4=b"label")]


def images_page(size=8, compressed=8, rows=1, encoding=0):
    return thrift(i1=0, i2=size, i3=compressed, s5=thrift(i1=rows, i2=encoding, i3=3, i4=3))


CONTENTS["test-00000-of-00001.parquet"] = written([png(32, 32)], [1])
SOUND = by_hand()
cases(
    "stream",
    a_dictionary_of_one=lambda path: repeated(LARGE, 700_000),
    a_dictionary_of_noise=lambda path: repeated(np.random.default_rng(0).bytes(760_000), 400_000),
    endless_zeros=lambda path: written([bytes(2**26)], compression="zstd", write_statistics=False),
    deltas=lambda path: written(
        [LARGE] * 200,
        use_dictionary=False,
        column_encoding={"img.bytes": "DELTA_BYTE_ARRAY", "label": "PLAIN"},
    ),
    two_million_rows=lambda path: empty(2**21),
    rows_without_end=by_hand(rows=2**50),
    rows_below_zero=by_hand(rows=-5),
    rows_that_are_not_there=by_hand(rows=10**6),
    groups_without_end=by_hand(groups=[b"\0"] * 2**20),
    columns_without_end=by_hand(groups=[thrift(L1=[thrift(l2=0)] * 10**5, l2=0, l3=1)]),
    deep_schema=by_hand(schema=nested(20_000)),
    less_deep_schema=by_hand(schema=nested(990)),
    deep_structs=by_hand(groups=[b"\x1c" * 10**5]),
    many_columns=lambda path: of_table(pa.table({f"c{i}": [1] for i in range(1200)})),
    page_of_2_gigabytes=by_hand(page=images_page(size=2**31 - 1)),
    page_below_zero=by_hand(page=images_page(size=-1)),
    page_beyond_the_end=by_hand(page=images_page(compressed=2**30)),
    page_of_2_billion_values=by_hand(page=images_page(rows=2**31 - 1)),
    page_of_unknown_encoding=by_hand(page=images_page(encoding=77)),
    chunk_beyond_the_end=by_hand(l7=2**40),
    chunk_before_the_start=by_hand(l9=-4),
    chunk_of_another_type=by_hand(i1=1),
    damaged_footer=SOUND[:-60] + bytes(52) + SOUND[-8:],
    footer_beyond_the_end=SOUND[:-8] + b"\xff\xff\xff\x0fPAR1",
    encrypted=SOUND[:-4] + b"PARE",
    no_end=SOUND[:-1],
    image_is_strip=lambda path: written([png(1, 20_000)]),
    image_is_no_image=SOUND,
    image_is_missing=lambda path: written([None]),
    label_is_10=lambda path: written([png(8, 8)], [10]),
    label_is_below_zero=lambda path: written([png(8, 8)], [-1]),
)
cases(
    "cifar",
    cifar_of_a_dictionary=lambda path: repeated(
        png(32, 32, extra=b"\0\2\0\0abCd" + bytes(2**17 + 4)), 100_000
    ),
    cifar_of_200000=lambda path: empty(200_000),
    cifar_of_1000_empty_groups=lambda path: empty(1000, row_group_size=1),
    cifar_label_is_fraction=lambda path: written([png(32, 32)], [3.7]),
    cifar_label_is_text=lambda path: written([png(32, 32)], ["3"]),
    cifar_label_is_true=lambda path: written([png(32, 32)], [True]),
    cifar_label_is_missing=lambda path: written([png(32, 32)], pa.array([None], pa.int64())),
    cifar_label_is_2_to_the_63=lambda path: written([png(32, 32)], pa.array([2**63], pa.uint64())),
    cifar_label_is_huge=lambda path: written([png(32, 32)], [2**62]),
    cifar_image_is_large=lambda path: written([png(13_000, 13_000)]),
    cifar_two_columns=lambda path: doubled("img"),
    cifar_column_of_lines=lambda path: of_table(pa.table({"a\nb" * 5000: [1], "label": [1]})),
    cifar_is_doubled_by_a_dot=lambda path: of_table(
        pa.table({"img": [{"bytes": png(32, 32)}], "img.bytes": [png(32, 32)], "label": [1]})
    ),
)
