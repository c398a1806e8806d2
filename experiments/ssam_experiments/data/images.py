"""Encoded images, looked at before they are decoded."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from ssam_experiments.data.bounds import IMAGE_BYTES, PIXELS, SIDES, DataError

SCANS = 2**30
"""Most pixels that the scans of a JPEG image go through, which may be any number of times all."""

warnings.simplefilter("error", Image.DecompressionBombWarning)  # as its documentation advises


def decode(data: bytes | None, where: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Return a PNG or JPEG image in RGB; ``size`` is the width and height it must have.

    Raises:
      DataError: the bytes are no image, or one of another size, or too large, or too long for its width; the
        message starts with ``where``.
    """
    if data is None:
        raise DataError(f"{where}: there is no image.")
    if len(data) > IMAGE_BYTES:
        raise DataError(f"{where}: the image has {len(data)} bytes; at most {IMAGE_BYTES} are read.")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if not (problem := _problem(image, data, size)):
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        problem = "the image is neither PNG nor JPEG."
    except Exception as error:  # damaged bytes lead anywhere in a decoder
        problem = f"the image cannot be decoded: {error}"
    raise DataError(f"{where}: {problem}")


def _problem(image: Image.Image, data: bytes, size: tuple[int, int] | None) -> str:
    """Return why an image is not to be decoded, from its header alone; empty if it is."""
    width, height = image.size
    if size is not None and image.size != size:
        return f"the image must have {size[0]} x {size[1]} pixels, it has {image.size}."
    if width * height > PIXELS:
        return f"the image has {width} x {height} pixels; at most {PIXELS} are decoded."
    if max(width, height) > SIDES * min(width, height):
        return f"the image has {width} x {height} pixels; one side may be {SIDES} times the other at most."
    if image.format != "PNG" and (scans := data.count(b"\xff\xda")) * width * height > max(
        SCANS, width * height
    ):
        return (
            f"the image has {scans} scans of {width} x {height} pixels; at most {SCANS} pixels are decoded."
        )
    return ""
