"""The page for those without Grafana: what the streams hold, in a browser, live.

It reads the server over a connection of its own and only while somebody looks, so that the loop which
makes signals neither waits for it nor knows of it. `docs/page.md` describes it for users.
"""

from worker.page.site import Page

__all__ = ["Page"]
