"""Orderly ends: a signal asks a loop to stop at a safe place; a second one ends at once."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Context in which the first of the signals only sets ``signal``; the previous handlers then come back.

    An exception raised by a handler can be lost, if it arrives in a callback of the garbage collector or of a weak reference.
    """

    def __init__(self, *numbers: int):
        self._numbers = numbers or (signal.SIGTERM, signal.SIGINT)
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # ty: ignore[invalid-argument-type]
        self._previous.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
