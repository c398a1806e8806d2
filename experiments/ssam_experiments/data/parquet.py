"""Images in Parquet files, in the layout of the Hugging Face hub."""

import contextlib
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssam_experiments.data.bounds import DataError
from ssam_experiments.data.parquet_bounds import (
    GROUP_ROWS,
    SLACK,
    check_column,
    check_footer,
)

IMAGE_COLUMNS = ("img", "image")


def find_shards(folder: Path, split: str, subfolders: Sequence[str]) -> list[Path]:
    """Return the files of a split, such as ``train-00000-of-00002.parquet``, in the order of their names.

    The search goes through the folder itself and then its subfolders. The list may be empty.

    Raises:
      FileNotFoundError: there are fewer files, or more, than their own names say.
    """
    for place in (folder, *(folder / name for name in subfolders)):
        if files := sorted(place.glob(f"{split}-*.parquet")):
            counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))}
            if counts and counts != {len(files)}:
                raise FileNotFoundError(
                    f"{place} has {len(files)} files {split}-*.parquet; their names say {max(counts)}."
                )
            return files
    return []


class ImageFile:
    """A Parquet file with a column of encoded images and one of labels, read by row group, from any thread.

    It is open only during a read, since a process may use more files than it may hold open.

    Attributes:
      path: where it is.
      sizes: number of rows in each row group.
    """

    def __init__(self, path: Path, label_columns: Sequence[str]):
        """Open a file; of the columns that a label may be in, the first that it has is taken.

        Raises:
          ValueError: the file is incomplete or no regular file, would take too much memory, or a column is
            missing or of another type.
        """
        self.path = path
        check_footer(path)
        try:
            with pq.ParquetFile(path) as file:
                self._metadata, schema = file.metadata, file.schema_arrow
            self._choose_columns(schema, label_columns)
        except DataError:
            raise
        except Exception as error:  # damaged bytes lead anywhere
            raise DataError(f"{path} is not a complete Parquet file: {error}") from None
        groups = range(self._metadata.num_row_groups)
        self.sizes = [self._metadata.row_group(i).num_rows for i in groups]
        if not all(0 <= size <= GROUP_ROWS for size in self.sizes):
            low, high = min(self.sizes), max(self.sizes)
            raise DataError(f"{path} has {low} to {high} rows in a row group; at most {GROUP_ROWS} are read.")

    def _choose_columns(self, schema: pa.Schema, label_columns: Sequence[str]) -> None:
        self._image, self._label = (
            self._find(names, schema.names) for names in (IMAGE_COLUMNS, label_columns)
        )
        image, label = schema.field(self._image).type, schema.field(self._label).type
        fields = [image.field(i) for i in range(image.num_fields)] if pa.types.is_struct(image) else []
        if not any(field.name == "bytes" and pa.types.is_binary(field.type) for field in fields):
            raise DataError(
                f"Column {self._image} of {self.path} must be a struct with bytes; it is {image}."
            )
        if not pa.types.is_integer(label):
            raise DataError(f"Column {self._label} of {self.path} must hold integers; it is {label}.")

    def _find(self, names: Sequence[str], has: Sequence[str]) -> str:
        for name in names:
            if has.count(name) == 1:
                return name
        raise DataError(f"{self.path} must have a column {' or '.join(names)}; it has {', '.join(has)}.")

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[mmap.mmap]:
        """Open the file for a look at its headers."""
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be mapped into memory: {error}") from None
        with mapped:
            yield mapped

    def read_labels(self) -> np.ndarray:
        """Return the labels of all rows, int64, -1 for a label that is missing.

        Raises:
          ValueError: the file is damaged, or would take too much memory.
        """
        groups = range(len(self.sizes))
        with self._mapped() as file:
            most = sum(self._check(file, group, self._label)[0] for group in groups)
        return self._labels(self._read(groups, [self._label], GROUP_ROWS, most))

    def read_group(self, index: int, rows: np.ndarray | None = None) -> tuple[list[bytes | None], np.ndarray]:
        """Return the encoded images and the labels of a row group, as `read_labels`.

        Args:
          index: of the row group.
          rows: the rows to return, counted within the group, None for all.

        Raises:
          ValueError: the file is damaged, or would take too much memory.
        """
        image = f"{self._image}.bytes"
        with self._mapped() as file:
            most, longest = self._check(file, index, image)
            more, _ = self._check(file, index, self._label)
        rows_at_once = max(1, min(1024, SLACK // max(1, longest)))
        table = self._read([index], [image, self._label], rows_at_once, most + more)
        table = table if rows is None else table.take(pa.array(rows))
        images = [value and value["bytes"] for value in table.column(self._image).to_pylist()]
        return images, self._labels(table)

    def _check(self, file: mmap.mmap, index: int, column: str) -> tuple[int, int]:
        where = f"{self.path}, row group {index},"
        return check_column(file, self._metadata.row_group(index), column, where)

    def _read(self, groups: Iterable[int], columns: list[str], rows_at_once: int, most: int) -> pa.Table:
        """Read columns bit by bit, and stop as soon as they have more bytes than ``most``."""
        metadata, groups = self._metadata, list(groups)
        try:
            with pq.ParquetFile(self.path, metadata=metadata, memory_map=True, pre_buffer=False) as file:
                batches = list(_until(most, file.iter_batches(rows_at_once, groups, columns)))
                table = pa.Table.from_batches(batches, None if batches else file.schema_arrow)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.path} is damaged: {error}") from None
        if table.nbytes <= most:
            return table
        raise DataError(f"{self.path} has more than {most} bytes in a row group, far more than in the file.")

    def _labels(self, table: pa.Table) -> np.ndarray:
        try:
            labels = table.column(self._label).cast(pa.int64()).to_pylist()
        except pa.ArrowException as error:
            raise DataError(f"A label of {self.path} is out of range: {error}") from None
        return np.array([-1 if label is None else label for label in labels], np.int64)


def _until(most: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield batches until they have more than so many bytes."""
    size = 0
    for batch in batches:
        yield batch
        size += batch.nbytes
        if size > most:
            return
