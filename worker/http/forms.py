"""The bodies of requests about files and batches: multipart forms, read piece by piece, and limits of size and time."""

import asyncio
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from worker.errors import BodyTooSlowError, InvalidRequestError, UploadTooLargeError
from worker.request.asgi import ClientDisconnectedError, Receive

FORM_BYTES = 65_536
"""The most bytes of all fields of a form but the file, and of other bodies."""
IDLE_SECONDS = 60.0
BYTES_PER_SECOND = 100_000
"""An upload may take IDLE_SECONDS, and the time for its bytes at this rate."""
_LONGEST_NAME = 255


async def pieces(
    receive: Receive, limit: int, setting: str = "", idle_seconds: float = IDLE_SECONDS
) -> AsyncIterator[bytes]:
    """Yield the parts of a body.

    Raises:
        UploadTooLargeError: it has more than `limit` bytes, which a setting may have set.
        BodyTooSlowError: it takes too long.
        ClientDisconnectedError: the client has gone.
    """
    size, waited, time = 0, 0.0, asyncio.get_running_loop().time
    more = True
    while more:
        most, began = idle_seconds + size / BYTES_PER_SECOND, time()
        try:
            async with asyncio.timeout(most - waited):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlowError(round(most, 1)) from None
        # Not the time between two parts: there the file is written.
        waited += time() - began
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        size += len(piece := message.get("body", b""))
        if size > limit:
            raise UploadTooLargeError(limit, setting)
        more = message.get("more_body", False)
        yield piece


class Form:
    """A multipart form with one file, the field `file`. Does no I/O."""

    def __init__(self, content_type: str) -> None:
        """Take the request's content type.

        Raises:
            InvalidRequestError: it is not that of a form.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequestError("Send the file as multipart/form-data, with the fields 'file' and 'purpose'.")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """The name of the file; None before the file begins."""
        self.is_complete = False
        self._file = bytearray()
        self._field = bytearray()
        self._name = ""
        self._header = (bytearray(), bytearray())
        self._disposition = ""
        self._size = 0
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_content,
                    "on_part_data": self._add,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _damaged() from None

    def feed(self, data: bytes) -> bytes:
        """Parse a part of the body, and return the bytes of the file that it has.

        Raises:
            InvalidRequestError: the form is damaged, or has other fields than expected.
        """
        try:
            self._parser.write(data)
        except FormParserError:
            raise _damaged() from None
        content = bytes(self._file)
        self._file.clear()
        return content

    def check_complete(self) -> None:
        """Check that the form has ended, with a file in it.

        Raises:
            InvalidRequestError: it has not.
        """
        if not self.is_complete:
            raise _damaged()
        if self.filename is None:
            raise InvalidRequestError("The form has no field 'file'.", param="file")

    # The parser calls the following methods.

    def _begin_part(self) -> None:
        self._disposition, self._name = "", ""
        self._field.clear()

    def _end_header(self) -> None:
        field, value = (bytes(each).decode("latin-1") for each in self._header)
        if field.lower() == "content-disposition":
            self._disposition = value
        for each in self._header:
            self._size += len(each)
            each.clear()
        self._check_size()

    def _begin_content(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name != "file":
            return
        if self.filename is not None:
            raise InvalidRequestError("The form has several files. Send one request for each.", param="file")
        self.filename = options.get(b"filename", b"").decode(errors="replace")[:_LONGEST_NAME] or "batch.jsonl"

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._file += data[start:end]
        else:
            self._size += end - start
            self._check_size()
            self._field += data[start:end]

    def _end_part(self) -> None:
        if self._name != "file":
            self.fields[self._name] = self._field.decode(errors="replace")

    def _end(self) -> None:
        self.is_complete = True

    def _check_size(self) -> None:
        if self._size > FORM_BYTES:
            raise InvalidRequestError(f"The fields of the form besides the file have more than {FORM_BYTES} bytes.")


def _damaged() -> InvalidRequestError:
    return InvalidRequestError("The form is damaged or incomplete. Send it as multipart/form-data.")
