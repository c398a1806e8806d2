"""Files that no data set has, one for each way to exhaust a reader or to run code in it."""

import gzip
import io
import os
import pickle
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PLACES = {
    "image": "train/c/{}.png",
    "stream": "train-00000-of-00001.parquet",
    "cifar": "train-00000-of-00001.parquet",
    "batch": "data_batch_1",
    "idx": "train-images-idx3-ubyte.gz",
}
"""Where a reader looks for its file."""
COMPANIONS = {
    "cifar": ["test-00000-of-00001.parquet"],
    "batch": [*(f"data_batch_{i}" for i in range(2, 6)), "test_batch"],
    "idx": [f"{name}-ubyte" for name in ("train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")],
}
"""What else must be there for the reader to begin."""
CONTENTS = {}
"""What is in these files, if they are not empty."""
CASES = {}
"""By name, the reader that a file is for, and its bytes or a function that writes a path or returns bytes."""


def cases(reader, **contents):
    """Add files for a reader."""
    CASES.update({name: (reader, content) for name, content in contents.items()})


def write_all(folder):
    """Write every file, in a folder of its own; yield its name, reader, folder and path."""
    for name, (reader, content) in CASES.items():
        place = folder / name
        path = place / PLACES[reader].format(name)
        path.parent.mkdir(parents=True)
        for companion in COMPANIONS.get(reader, ()):
            (place / companion).write_bytes(CONTENTS.get(companion, b""))
        content = content(path) if callable(content) else content
        if isinstance(content, bytes):
            path.write_bytes(content)
        yield name, reader, str(place), str(path)


# What is no regular file, for every reader


def pipe(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def listener(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def terabyte(path):
    path.touch()
    os.truncate(path, 2**40)


def huge(path):
    """Write a sparse file that ends as a Parquet file does."""
    path.touch()
    os.truncate(path, 2**31)
    with path.open("r+b") as file:
        file.write(b"PAR1")
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<I", 2**30) + b"PAR1")


for reader in PLACES:
    cases(reader, **{f"{reader}_{write.__name__}": write for write in (pipe, zeros, terabyte)})
    cases(reader, **{f"{reader}_empty": b""})
cases(
    "image", image_folder=Path.mkdir, image_listener=listener, image_loop=lambda path: path.symlink_to(path)
)
cases("stream", stream_folder=Path.mkdir, stream_listener=listener, stream_footer=huge)


# Images


def png(width, height, bits=1, color=0, rows=None, extra=b""):
    """Return a black PNG image, with its first rows alone if their number is given."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + bytes((width * bits * (3 if color == 2 else 1) + 7) // 8)
    pixels = zlib.compress(row * (height if rows is None else rows), 1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_chunk(kind, before):
    data = before + zlib.compress(bytes(2**25), 1)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg(width, height, **options):
    buffer = io.BytesIO()
    Image.new("L", (width, height), 100).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def jpeg_of_size(width, height):
    """Return a small JPEG image whose header claims another size."""
    data = jpeg(8, 8)
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_of_scans(path):
    data = jpeg(1600, 1600, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 500 + data[-2:]


def in_format(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


cases(
    "image",
    tall=png(1, 20_000),
    wide=png(20_000, 1),
    png_of_169_megapixels=lambda path: png(13_000, 13_000),
    png_of_75_megapixels=png(8_700, 8_700, rows=1),
    png_of_400_megapixels=png(20_000, 20_000, rows=1),
    png_without_width=png(0, 8),
    png_of_the_largest_width=png(2**31 - 1, 1, rows=0),
    png_with_endless_text=lambda path: png(8, 8, extra=text_chunk(b"zTXt", b"a\0\0")),
    png_with_endless_profile=lambda path: png(8, 8, extra=text_chunk(b"iCCP", b"a\0\0")),
    png_with_endless_chunk=png(8, 8, extra=b"\x7f\xff\xff\xfftEXt"),
    png_of_100000_chunks=png(8, 8, extra=b"\0\0\0\0abCd\0\0\0\0" * 100_000),
    jpeg_of_4_gigapixels=jpeg_of_size(65_500, 65_500),
    jpeg_as_strip=jpeg_of_size(65_500, 8),
    jpeg_of_500_scans=jpeg_of_scans,
    jpeg_cut=jpeg(64, 64)[:300],
    gif=in_format("GIF"),
    tiff=in_format("TIFF"),
    postscript=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n",
    large=lambda path: png(8, 8) + bytes(2**25),
)
cases("image", **{"line\nbreak \x1b[31m": b"no image"})


# Pickles: of a batch, but for what is hostile

ARRAY = pickle.dumps(np.zeros((1, 3072), np.uint8), 2)[2:-1]
WHOLE = b"\x80\x02}(U\x04data" + ARRAY + b"U\x06labels](%se%su."


def batch(labels=b"K\x01", more=b""):
    """Return a pickle with these labels, and more keys and values."""
    return WHOLE.replace(b"%s", labels, 1).replace(b"%s", more, 1)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def tower(floors=60):
    """Return a tuple of twice a tuple of twice a tuple and so on, which is endless when printed or hashed."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(100, 100 + floors))


def array_of(shape, raw=b"U\x01a"):
    """Return an array with a state of one's own."""
    kind = b"cnumpy\ndtype\nU\x02u1\x85R"
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return (
        b"\x80\x02}(U\x04data" + start + b"(K\x01" + shape + kind + b"\x89" + raw + b"tbU\x06labels](K\x01eu."
    )


BIG = text(b"a" * 20_000)
ENCODED = BIG + b"U\x06latin1\x86q\x02R"
cases(
    "batch",
    label_fraction=batch(b"G" + struct.pack(">d", 3.7)),
    label_text=batch(b"U\x013"),
    label_true=batch(b"\x88"),
    label_none=batch(b"N"),
    label_2_to_the_63=batch(b"\x8a\x09" + (2**63).to_bytes(9, "little")),
    label_2_to_the_2000=batch(b"\x8a\xff" + (2**2000).to_bytes(255, "little")),
    label_minus_1=batch(b"J\xff\xff\xff\xff"),
    label_10=batch(b"K\x0a"),
    label_tower=batch(tower()),
    label_list=batch(b"]"),
    labels_missing=batch(b""),
    key_tower=batch(more=tower() + b"N"),
    key_long=batch(more=(BIG + b"q\x01" + b"N" + b"h\x01N" * 40_000)),
    key_list=batch(more=b"]N"),
    keys_odd=batch(more=b"U\x01a"),
    shape_tower=array_of(tower()),
    shape_of_text=array_of(BIG + b"J\x00\x00\x10\x00\x86"),
    shape_of_texts=array_of(b"U\x01a" * 2 + b"\x86"),
    shape_of_large_numbers=array_of(b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 9000 + b"t"),
    shape_huge=array_of(b"J\xff\xff\xff\x7fM\x00\x0c\x86"),
    shape_negative=array_of(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"),
    memo_far=batch(more=b"U\x01aNr\xff\xff\xff\x7fU\x01b"),
    memo_missing=batch(more=b"U\x01aj\xff\xff\xff\x7f"),
    encoded_again=batch(
        more=b"U\x01a](c_codecs\nencode\nq\x01" + ENCODED + b"h\x01h\x02R" * 60_000 + b"eU\x01b"
    ),
    build_function=batch(more=b"U\x01ac_codecs\nencode\n}U\x01xK\x01sb"),
    build_type=batch(more=b"U\x01acnumpy\nndarray\n}U\x01xK\x01sb"),
    build_nothing=b"\x80\x02Nb.",
    call_type=batch(more=b"U\x01acnumpy\nndarray\n)R"),
    call_text=batch(more=b"U\x01aU\x01b)R"),
    call_with_list=batch(more=b"U\x01ac_codecs\nencode\n]R"),
    system=batch(more=b"U\x01acos\nsystem\nU\x04true\x85R"),
    system_by_instance=b"(S'true'\nios\nsystem\n.",
    system_by_stack=b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    evaluated=batch(more=b"U\x01ac__builtin__\neval\nU\x031+1\x85R"),
    new_object=b"\x80\x02cnumpy\nndarray\n)\x81.",
    extension=b"\x80\x02\x82\x01.",
    persistent=b"\x80\x02U\x01aQ.",
    buffer=b"\x80\x05\x97.",
    global_of_lines=b"c" + b"a" * 10**6 + b"\n" + b"b" * 10**6 + b"\n.",
    long_number=b"I" + b"9" * 10**6 + b"\n.",
    long_fraction=b"F" + b"9" * 10**6 + b"\n.",
    long_integer=b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    bytes_beyond_the_end=b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
    text_beyond_the_end=b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"a.",
    frame_beyond_the_end=b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    two_million_lists=lambda path: b"\x80\x02" + b"]" * (2 * 10**6) + b".",
    two_million_sets=lambda path: b"\x80\x04" + b"\x8f" * (2 * 10**6) + b".",
    deep=lambda path: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    marks=lambda path: b"\x80\x02" + b"(" * 100_000 + b"t.",
    list_in_itself=b"\x80\x02]q\x00h\x00a.",
    nothing_on_the_stack=b"\x80\x02\x87.",
    object_array=pickle.dumps({"data": np.zeros(3, object), "labels": [1]}, 2),
    no_pickle=b"no pickle",
)


# Fashion-MNIST

FLUSHED = zlib.compressobj(1, zlib.DEFLATED, -15)
BLOCK = FLUSHED.compress(bytes(2**20)) + FLUSHED.flush(zlib.Z_FULL_FLUSH)
GZIP = b"\x1f\x8b\x08\x00\0\0\0\0\0\xff"


def idx(*shape, data=b""):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


cases(
    "idx",
    bomb=GZIP + BLOCK * 4000,
    bomb_in_parts=gzip.compress(bytes(10**6), 1) * 4000,
    million_parts=gzip.compress(b"") * 10**6,
    long_name=b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 2**25,
    claims_4_billion=gzip.compress(idx(2**32 - 1, 28, 28)),
    claims_a_million=gzip.compress(idx(10**6, 28, 28, data=bytes(784))),
    of_large_images=gzip.compress(idx(1, 2**16, 2**16)),
    of_3_bytes=gzip.compress(b"\0\0\x08"),
    of_floats=gzip.compress(b"\0\0\x0d\x03" + bytes(12)),
    zip_cut=gzip.compress(idx(1, 28, 28, data=bytes(784)))[:-6],
    zip_damaged=GZIP + b"\xff" * 100,
)
