"""What a Parquet file asks its reader to allocate, as its headers say, and how much of that is refused.

A dictionary or a compression that repeats one image makes hundreds of gigabytes of a few kilobytes, and so
may a number in a header. Real images are compressed already, hence as large in memory as in the file.
"""

import mmap
from pathlib import Path

import pyarrow.parquet as pq

from ssam_experiments.data.bounds import DataError, check_regular
from ssam_experiments.data.thrift import Reader

FOOTER_BYTES = 2**24
VALUES = 2**20
"""Most values in a footer, and in the headers of a column's pages; CIFAR-10 in 500 row groups has 70,000."""
COLUMNS = 1000
GROUP_ROWS = 2**20
GROUP_BYTES = 2**30
"""Most bytes of a row group's images."""
SLACK, GROWTH = 2**24, 16
"""A column may have this many bytes, and this many times those that it takes in the file."""
DELTA_BYTE_ARRAY = 7


def most_bytes(compressed: int) -> int:
    """Return how many bytes a column may become that takes this many in the file."""
    return min(SLACK + GROWTH * compressed, GROUP_BYTES)


def check_footer(path: Path) -> None:
    """Look through a file's footer before it is read in earnest.

    Raises:
      DataError: the file is no regular one, or the footer is damaged, or has too many values or columns.
    """
    length = check_regular(path)
    with path.open("rb") as file:
        file.seek(max(0, length - 8))
        end = file.read(8)
        size = int.from_bytes(end[:4], "little")
        if length < 12 or end[4:] != b"PAR1" or size > length - 12:
            raise DataError(f"{path} is not a complete Parquet file: it does not end as one.")
        if size > FOOTER_BYTES:
            raise DataError(f"{path} has a footer of {size} bytes; at most {FOOTER_BYTES} are read.")
        file.seek(length - 8 - size)
        data = file.read(size)
    try:
        footer = Reader(data, 0, VALUES).struct()
        columns = max(len(footer[2]), *(len(group[1]) for group in footer[4]), 0)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a complete Parquet file: its footer is damaged: {error}") from None
    if columns > COLUMNS:
        raise DataError(f"{path} has {columns} columns; at most {COLUMNS} are read.")


def check_column(file: mmap.mmap, group: pq.RowGroupMetaData, name: str, where: str) -> tuple[int, int]:
    """Look through the headers of a column's pages in a row group.

    Args:
      file: in which the pages are.
      group: what the footer says of the row group.
      name: of the column, as in ``img.bytes``.
      where: the file and the row group, for the message.

    Returns:
      The most bytes that its values may have in all, and that each of them may have.

    Raises:
      DataError: the column is damaged, or would take too much memory.
    """
    try:
        columns = [group.column(i) for i in range(group.num_columns)]
        (column,) = (column for column in columns if column.path_in_schema == name)
        if column.num_values != group.num_rows:
            raise ValueError(f"it has {column.num_values} values in {group.num_rows} rows")
        return _look_through(file, column)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is damaged: column {name}: {error}") from None


def _look_through(file: mmap.mmap, column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Return the two bounds of `check_column`."""
    rows, most = column.num_values, most_bytes(column.total_compressed_size)
    position = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0)
    end = position + column.total_compressed_size
    if not 0 <= position <= end <= len(file):
        raise ValueError(f"it is from byte {position} to {end} of {len(file)}")
    reader = Reader(file, position, VALUES)
    seen = total = longest = 0
    while seen < rows:
        page = reader.struct()
        header = page.get(5) or page.get(8) or page.get(7)
        size, compressed, count = page[2], page[3], header[1] if header else 0
        if min(size, compressed, count) < 0 or count > rows or reader.position + compressed > end:
            raise ValueError(f"a page has {size} bytes in {compressed}, with {count} values")
        total += size
        if total > most:
            raise ValueError(f"it has {total} bytes or more; at most {most} are read")
        delta = DELTA_BYTE_ARRAY in (header.get(2), header.get(4)) if header else False
        longest = max(longest, total if delta else size)  # a delta may repeat all that came before it
        seen += count if page[1] in (0, 3) else 0
        reader.position += compressed
    return most, longest
