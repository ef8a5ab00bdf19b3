"""What is printed may get lost, and never ends the work: a reader that went away (`| head`), a log on a full disk, a
locale without the signs of a table.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["steady_streams"]


class SteadyStream:
    """A text stream that drops what cannot be written.

    Args:
        stream: the one below, which has all other attributes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # of a locale that has not all signs: a frame of a table, a name
            return self.write(encodable(text, self._stream.encoding))
        except BrokenPipeError:
            self.silence()
        except OSError:  # a full disk, which may have room again for the next line
            pass
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, or drop it."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self.silence()
        except OSError:
            pass

    def finish(self) -> None:
        """Flush for the last time. What cannot be written by now would be tried again, and complained of, as Python
        ends.
        """
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self) -> None:
        """Send this stream, and what waits in its buffer, to nowhere."""
        with contextlib.suppress(OSError, ValueError):  # no file below, or a closed one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def encodable(text: str, encoding: str | None) -> str:
    """A text with a question mark in the place of each sign that an encoding has not."""
    name = encoding or "ascii"
    return text.encode(name, "replace").decode(name)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Within the block, printing to stdout and stderr raises no OSError."""
    former = sys.stdout, sys.stderr
    steady = [stream and SteadyStream(stream) for stream in former]
    sys.stdout, sys.stderr = steady  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former
        for stream in steady:
            if stream:
                stream.finish()
