"""torch.cuda's streams and events without a GPU: what is launched waits, and runs in an order that
the test draws."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Event:
    def __init__(self, cuda: Streams, enable_timing: bool = False) -> None:
        self._cuda = cuda
        self._records = self._done = 0

    def record(self) -> None:
        self._records += 1
        number = self._records
        self._cuda.current.append(lambda: setattr(self, "_done", number))

    def query(self) -> bool:
        return self._done == self._records

    def elapsed_time(self, end: Event) -> float:
        return 1000.0

    def is_done(self) -> Callable[[], bool]:
        number = self._records
        return lambda: self._done >= number


class Stream:
    def __init__(self, cuda: Streams) -> None:
        self._cuda = cuda
        self.work: deque[tuple[Callable[[], bool], Callable]] = deque()  # (may it run, what)
        cuda.streams.append(self)

    def append(self, work: Callable, may_run: Callable[[], bool] = lambda: True) -> None:
        self.work.append((may_run, work))

    def wait_event(self, event: Event) -> None:
        self.append(lambda: None, event.is_done())

    def wait_stream(self, stream: Stream) -> None:
        event = Event(self._cuda)
        with self._cuda.stream(stream):
            event.record()
        self.wait_event(event)


class Streams:
    """In place of the module ``torch.cuda``. ``launch`` is for kernels; ``run`` runs what is
    there."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.current = self.Stream()

    def Stream(self) -> Stream:
        return Stream(self)

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self)

    def is_current_stream_capturing(self) -> bool:
        return False

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def launch(self, work: Callable) -> None:
        self.current.append(work)

    def run(self, choose: Callable[[int], int]) -> None:
        """Run all; ``choose(n)``, in range(n), says which of the n streams that can go on does."""
        while waiting := [stream for stream in self.streams if stream.work]:
            ready = [stream for stream in waiting if stream.work[0][0]()]
            assert ready, "streams wait for each other"
            ready[choose(len(ready))].work.popleft()[1]()
