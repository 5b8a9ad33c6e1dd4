"""Requests made up from our own document find no failure of the server and no answer that it does not describe."""

from __future__ import annotations

from collections import Counter

from conforming import GROUND, conform
from serving import serving


def test_made_up_requests():
    with serving() as server:
        found = conform(server.url, least=90)
        assert not found.failures, "\n".join(found.failures[:5])
        assert found.requests >= 90
        statuses = Counter(status for (_, status), count in found.answers.items() for _ in range(count))
        assert set(statuses) <= {200, 400, 404} and statuses[400] > 20
        assert {route for route, status in found.answers if status == 200} >= set(GROUND)
        assert server.settles()
