"""The page's fields for images. An uploaded file is checked before any library decodes it.

gradio's own fields would decode any format that Pillow knows, of any size, and would fetch addresses.
"""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import component_meta
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorData
from gradio.data_classes import FileData, ImageData
from PIL import Image

from ldm.errors import UserError
from ldm.files import read_regular
from train.data.images.decode import FORMATS, DamagedImage, check_format, image_size, load_image
from train.page.errors import plain

LARGEST_UPLOAD = 2**25
"""Largest accepted file, in bytes."""
MOST_PIXELS = 2**25
"""Largest accepted image."""
_MOST_LAYERS, _MOST_DRAWINGS = 16, 16

# gradio writes a file of types beside each module with a class of fields; this one may be in a read-only folder.
setattr(component_meta, "create_or_modify_pyi", lambda *_: None)  # noqa: B010


class Picture(gr.Image):
    """Field for an image; its value is an RGB image.

    Without an `__init__` of its own, because gradio looks at its parameters.
    """

    is_template = True

    @plain
    def preprocess(self, payload: ImageData | None) -> Any:
        """Return the uploaded image. Raises gr.Error if it can't be accepted."""
        return None if payload is None or not payload.path else read_image(payload.path)


class Canvas(gr.ImageEditor):
    """Field to draw on an image; its value has the RGB image and the drawn layers, RGBA."""

    is_template = True

    @plain
    def preprocess(self, payload: EditorData | None) -> Any:
        """Return {"background": image or None, "layers": drawn layers}. Raises gr.Error if one can't be accepted."""
        if payload is None:
            return None
        drawing: Any = payload if payload.id is None else self.blob_storage.pop(payload.id, None)
        if drawing is None or drawing.background is None:
            return None
        layers = [layer for layer in drawing.layers if layer is not None][:_MOST_LAYERS]
        return {"background": read_image(_content(drawing.background)), "layers": [_read_layer(x) for x in layers]}

    @server
    def accept_blobs(self, data: AcceptBlobs) -> None:
        """Keep what was drawn until it is used, within limits."""
        index = data.data.get("index")
        if index not in (None, "null", "") and not (str(index).isdigit() and int(str(index)) < _MOST_LAYERS):
            raise gr.Error("a drawing has too many layers", print_exception=False)
        if len(data.files[0][1]) > LARGEST_UPLOAD:
            raise gr.Error(_too_large(), print_exception=False)
        while len(self.blob_storage) >= _MOST_DRAWINGS:
            with suppress(KeyError):
                self.blob_storage.pop(next(iter(self.blob_storage)))
        super().accept_blobs(data)


def _content(file: FileData | bytes) -> str | bytes:
    return file.path if isinstance(file, FileData) else file


def read_upload(path: str) -> bytes:
    """Return the content of an uploaded file. Raises UserError if it is too large."""
    try:
        return read_regular(path, LARGEST_UPLOAD)
    except OSError as error:
        raise UserError(f"upload: can't be read: {error.strerror}") from None


def read_image(file: str | bytes) -> Image.Image:
    """Return an uploaded image, mode RGB. Raises UserError if it can't be accepted."""
    content = read_upload(file) if isinstance(file, str) else file
    try:
        check_format(content, "upload")
        return load_image(content, name="upload", max_pixels=MOST_PIXELS)
    except DamagedImage as error:
        raise UserError(f"upload: {error.reason}") from None


def _read_layer(file: FileData | bytes) -> Image.Image:
    """Return a drawn layer, mode RGBA."""
    given = _content(file)
    content = read_upload(given) if isinstance(given, str) else given
    try:
        image_size(content, name="drawing", max_pixels=MOST_PIXELS)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.convert("RGBA")
    except DamagedImage as error:
        raise UserError(f"drawing: {error.reason}") from None
    except Exception as error:  # Pillow raises nearly every kind of exception
        raise UserError(f"drawing: can't be read ({type(error).__name__})") from None


def _too_large() -> str:
    return f"a file can have up to {LARGEST_UPLOAD // 2**20} MB"


def as_path(file: object) -> Path:
    """Return the path of a file field's value. Raises UserError without one."""
    if not isinstance(file, str) or not file:
        raise UserError("no file was given")
    return Path(file)
