"""Multipart forms (RFC 7578) in memory: no part is ever written to a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from device_runtime.serve.answers import media_type, parts_of
from device_runtime.serve.errors import TooLargeError, UnsupportedError
from ssd_edge.errors import InputError

MOST_BODY = 96 * 2**20  # bytes of a whole form; an image may have 64 MiB
MOST_PARTS = 500
MOST_TEXT = 2**20  # bytes of a part that is no file


@dataclasses.dataclass
class Part:
    """A part of a form.

    Attributes:
        name: Name of the field.
        filename: Name of the file as the sender gave it, only ever shown; empty for a text.
        data: The bytes.
    """

    name: str = ""
    filename: str = ""
    data: bytearray = dataclasses.field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """The bytes as text.

        Raises:
            InputError: They are not UTF-8, or too many for a text.
        """
        if len(self.data) > MOST_TEXT:
            raise TooLargeError(f"the field '{self.name}' may have at most {MOST_TEXT:,} bytes; send less")
        try:
            return self.data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the field '{self.name}' is not UTF-8; send it as UTF-8") from error


class _Reader:
    """Callbacks of a parser that collect the parts."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._key, self._value = bytearray(), bytearray()
        self._kind = ""

    def on_part_begin(self) -> None:
        if len(self.parts) >= MOST_PARTS:
            raise TooLargeError(f"a form may have at most {MOST_PARTS} parts; send the others in another request")
        self.parts.append(Part())
        self._kind = ""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._key.lower() == b"content-disposition":
            kind, options = parse_options_header(bytes(self._value))
            self._kind = kind.decode("latin-1")
            self.parts[-1].name = options.get(b"name", b"").decode("utf-8", "replace")
            self.parts[-1].filename = options.get(b"filename", b"").decode("utf-8", "replace")
        self._key, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        if self._kind != "form-data" or not self.parts[-1].name:
            raise InputError("a part of the form has no name; send each as: Content-Disposition: form-data; name=…")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, most: int = MOST_BODY) -> list[Part]:
    """Return the parts of a multipart form, in order.

    Raises:
        UnsupportedError: The body is no such form.
        TooLargeError: It is too long or has too many parts.
        InputError: It is not valid.
    """
    if media_type(request) != "multipart/form-data":
        raise UnsupportedError("this needs a form with files; send it with Content-Type: multipart/form-data")
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise InputError("the type multipart/form-data has no boundary; send the form with a library that makes one")
    reader = _Reader()
    callbacks = {name: getattr(reader, name) for name in dir(reader) if name.startswith("on_")}
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        async for data in parts_of(request, most):
            parser.write(data)
        parser.finalize()
    except FormParserError as error:
        raise InputError(f"the form is not valid ({' '.join(str(error).split())[:200]})") from error
    if not reader.ended:
        raise InputError("the form is cut short: its last boundary is missing; send it again")
    return reader.parts


def images_of(parts: Sequence[Part], *others: str) -> list[tuple[str, bytes]]:
    """Return name and content of the images of a form.

    Args:
        parts: The parts.
        others: Names of further fields that may be there.

    Raises:
        InputError: A field has another name, or there is no image.
    """
    for part in parts:
        if part.name not in ("image", *others):
            raise InputError(f"the field '{part.name[:40]}' is not known here; known: {', '.join(('image', *others))}")
    found = [part for part in parts if part.name == "image"]
    if not found:
        raise InputError("the form has no field 'image'; send at least one")
    return [(part.filename or f"image {number}", bytes(part.data)) for number, part in enumerate(found)]


def text_of(parts: Sequence[Part], name: str) -> str | None:
    """Return the text of a field, or None if there is none.

    Raises:
        InputError: It is there twice.
    """
    found = [part for part in parts if part.name == name]
    if len(found) > 1:
        raise InputError(f"the field '{name}' is there {len(found)} times, but may be once; send one request for each")
    return found[0].text if found else None
