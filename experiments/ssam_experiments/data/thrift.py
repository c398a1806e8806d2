"""Thrift's compact protocol, read without its schema: as much as Parquet's own headers use.

To bound what a reader of Parquet allocates, one has to see these headers before it does.
"""

import mmap
from typing import Any

DEPTH = 12
"""Most structs within each other; Parquet has seven."""


class Reader:
    """Reads structs from bytes; the values read in all are bounded.

    Attributes:
      position: of the next byte.
      left: number of values that may still be read.
    """

    def __init__(self, data: bytes | mmap.mmap, position: int, values: int):
        self.data, self.position, self.left = data, position, values

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the next struct's values by the numbers of their fields.

        A text is the number of its bytes.

        Raises:
          ValueError: the bytes are no struct, or one with too many values.
          IndexError: they end before the struct does.
        """
        if depth > DEPTH:
            raise ValueError(f"structs are more than {DEPTH} deep")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            step, kind = header >> 4, header & 15
            number = number + step if step else self._integer()
            if number in fields:
                raise ValueError(f"field {number} occurs twice")
            self._count()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("there are too many values")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # in a list, a bool is a byte as well
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):
            size = self._varint() if kind == 8 else 8
            self.position += size
            return size
        if kind == 9:
            header = self._byte()
            size = header >> 4 if header >> 4 != 15 else self._varint()
            return [self._item(header & 15, depth) for _ in range(size)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"type {kind} does not occur in Parquet")

    def _item(self, kind: int, depth: int) -> Any:
        self._count()
        if kind == 9:  # nor are lists of lists counted as deep
            raise ValueError("a list of lists does not occur in Parquet")
        return self._value(kind, depth)

    def _byte(self) -> int:
        byte = self.data[self.position]
        self.position += 1
        return byte

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an integer has more than 64 bits")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
