"""Events of the service, from any thread to any number of subscribers.

Example:
    >>> events = Events()
    >>> with events.subscribe() as subscription:
    ...     events.publish("tray", count=3)
    ...     print(subscription.get(1.0))
    Event(number=1, kind='tray', fields={'count': 3})
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

MOST_WAITING = 256  # events that wait for one subscriber


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        number: 1, 2, … since the start of the service.
        kind: ``answer``, ``camera``, ``generation``, ``job``, ``capture``, ``tray``, ``drift``, or ``lost`` for events
            that this subscriber was too slow for.
        fields: JSON values.
    """

    number: int
    kind: str
    fields: Mapping[str, Any]


class Subscription:
    """The events of one subscriber; create one with `Events.subscribe`, and use it as a context manager.

    Args:
        events: Where the events come from.
        most: Events that may wait. Then the oldest are dropped, and the next event is ``lost`` with their ``count``.
        wake: Called without arguments, from any thread, when there is something to get.
    """

    def __init__(self, events: Events, most: int, wake: Callable[[], object] | None) -> None:
        self._events, self._wake = events, wake
        self._waiting: collections.deque[Event] = collections.deque(maxlen=most)
        self._changed = threading.Condition()
        self._lost, self._closed = 0, False

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exception: object) -> None:
        self._events.unsubscribe(self)
        self.close()

    @property
    def closed(self) -> bool:
        """True once no event will follow those that wait."""
        return self._closed

    def get(self, timeout: float | None = None) -> Event | None:
        """Return the next event.

        Args:
            timeout: Seconds to wait for one; None to wait until there is one.

        Returns:
            The event, or None if there is none in time or the service has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._lost or self._closed, timeout)
            if self._lost:
                lost, self._lost = self._lost, 0
                return Event(self._waiting[0].number - 1 if self._waiting else 0, "lost", {"count": lost})
            return self._waiting.popleft() if self._waiting else None

    def put(self, event: Event) -> None:
        """Add an event; for `Events`."""
        with self._changed:
            self._lost += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(event)
            self._changed.notify_all()
        if self._wake is not None:
            self._wake()

    def close(self) -> None:
        """End the subscription; whoever waits for an event is woken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._wake is not None:
            self._wake()


class Events:
    """Publisher of events; thread-safe, and publishing never waits for a subscriber."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._subscriptions: list[Subscription] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        """True once the service ends."""
        return self._closed

    def publish(self, kind: str, /, **fields: Any) -> None:
        """Send an event to every subscriber.

        Args:
            kind: See `Event`.
            fields: JSON values.
        """
        with self._lock:  # held while it is passed on, so that every subscriber sees the same order
            self._number += 1
            event = Event(self._number, kind, fields)
            for subscription in self._subscriptions:
                subscription.put(event)

    def subscribe(self, most: int = MOST_WAITING, wake: Callable[[], object] | None = None) -> Subscription:
        """Return a subscription to all later events; see `Subscription`. `wake` must not publish."""
        subscription = Subscription(self, most, wake)
        with self._lock:
            if self._closed:
                subscription.close()
            else:
                self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send no further events to a subscription."""
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)

    def close(self) -> None:
        """End all subscriptions, because the service ends."""
        with self._lock:
            self._closed = True
            for subscription in self._subscriptions:
                subscription.close()
            self._subscriptions.clear()
