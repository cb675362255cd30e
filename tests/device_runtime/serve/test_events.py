"""Events between threads."""

from __future__ import annotations

import threading

from device_runtime.serve.events import Events


def test_every_subscriber_gets_every_event_in_order():
    events = Events()
    with events.subscribe() as first, events.subscribe() as second:
        threads = [threading.Thread(target=lambda: [events.publish("tray", count=n) for n in range(20)]) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen = [[subscription.get(1).number for _ in range(40)] for subscription in (first, second)]
    assert seen == [list(range(1, 41))] * 2


def test_a_slow_subscriber_loses_the_oldest_and_is_told():
    events, woken = Events(), []
    with events.subscribe(3, lambda: woken.append(1)) as subscription:
        for count in range(5):
            events.publish("tray", count=count)
        lost = subscription.get(0)
        assert (lost.kind, lost.number, lost.fields) == ("lost", 2, {"count": 2})
        assert [subscription.get(0).fields["count"] for _ in range(3)] == [2, 3, 4]
        assert subscription.get(0) is None
    assert len(woken) == 6  # and one for the end


def test_a_left_subscription_gets_nothing_and_the_end_wakes_those_who_wait():
    events = Events()
    with events.subscribe() as subscription:
        pass
    events.publish("tray", count=1)
    assert subscription.get(0) is None
    with events.subscribe() as waiting:
        threading.Timer(0.05, events.close).start()
        assert waiting.get(10) is None
        assert waiting.closed
    assert events.subscribe().closed
