"""Images in Parquet files, in the layout of the Hugging Face hub."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

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
          ValueError: the file is incomplete, or a column is missing or of another type.
        """
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                self._metadata, schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a complete Parquet file: {error}") from error
        groups = range(self._metadata.num_row_groups)
        self.sizes = [self._metadata.row_group(i).num_rows for i in groups]
        self._image, self._label = (
            self._find(names, schema.names) for names in (IMAGE_COLUMNS, label_columns)
        )
        image, label = schema.field(self._image).type, schema.field(self._label).type
        fields = [image.field(i) for i in range(image.num_fields)] if pa.types.is_struct(image) else []
        if not any(field.name == "bytes" and pa.types.is_binary(field.type) for field in fields):
            raise ValueError(f"Column {self._image} of {path} must be a struct with bytes; it is {image}.")
        if not pa.types.is_integer(label):
            raise ValueError(f"Column {self._label} of {path} must hold integers; it is {label}.")

    def _find(self, names: Sequence[str], has: Sequence[str]) -> str:
        for name in names:
            if name in has:
                return name
        raise ValueError(f"{self.path} must have a column {' or '.join(names)}; it has {', '.join(has)}.")

    def read_labels(self) -> np.ndarray:
        """Return the labels of all rows, int64, -1 for a label that is missing.

        Raises:
          ValueError: the file is damaged.
        """
        return self._labels(self._read(range(len(self.sizes)), [self._label]))

    def read_group(self, index: int, rows: np.ndarray | None = None) -> tuple[list[bytes | None], np.ndarray]:
        """Return the encoded images and the labels of a row group, as `read_labels`.

        Args:
          index: of the row group.
          rows: the rows to return, counted within the group, None for all.

        Raises:
          ValueError: the file is damaged.
        """
        table = self._read([index], [f"{self._image}.bytes", self._label])
        table = table if rows is None else table.take(pa.array(rows))
        images = [value and value["bytes"] for value in table.column(self._image).to_pylist()]
        return images, self._labels(table)

    def _read(self, groups: Iterable[int], columns: Sequence[str]) -> pa.Table:
        try:
            with pq.ParquetFile(self.path, metadata=self._metadata, memory_map=True) as file:
                return file.read_row_groups(list(groups), columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def _labels(self, table: pa.Table) -> np.ndarray:
        labels = table.column(self._label).to_pylist()
        return np.array([-1 if label is None else label for label in labels], np.int64)


def decode(data: bytes | None, where: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Return a PNG or JPEG image in RGB; ``size`` is the width and height it must have.

    Raises:
      ValueError: the bytes are no image, or one of another size; the message starts with ``where``.
    """
    if data is None:
        raise ValueError(f"{where}: there is no image.")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if size is None or image.size == size:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{where}: the image is neither PNG nor JPEG.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: the image cannot be decoded: {error}") from error
    raise ValueError(f"{where}: the image must have {size[0]} x {size[1]} pixels, it has {image.size}.")
