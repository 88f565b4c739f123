"""A real Prometheus of a test's own: what it scrapes, how it is asked, and an expression as Grafana sends it."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import LIMIT_S, ROOT, free_port, wait_for

SCRAPE = "1s"
STEP_S = 0.5


@dataclass(frozen=True)
class Seen:
    """A Prometheus after the run: where it answers, and from when to when (Unix time) it scraped."""

    url: str
    start: float = 0.0
    end: float = 0.0

    def ask(self, path: str, **parameters: str | float) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def over_time(self, expr: str) -> list[Any]:
        """The series at every step; the last one is not before the end."""
        end = self.end + STEP_S
        return self.ask("query_range", query=expr, start=self.start, end=end, step=STEP_S)["result"]

    def data(self, target: dict[str, Any], agent: str = "") -> list[Any]:
        """What a panel's query returns to Grafana, over the run or at its end."""
        expr = filled(target["expr"], agent)
        return self.over_time(expr) if target["range"] else self.at_end(expr)

    def at_end(self, expr: str) -> list[Any]:
        return self.ask("query", query=expr, time=self.end)["result"]

    def now(self, expr: str) -> float:
        """The first value of what was scraped last; -1 where there is none."""
        result = self.ask("query", query=expr)["result"]
        return float(result[0]["value"][1]) if result else -1.0


def filled(expr: str, agent: str = "") -> str:
    """The expression as Grafana sends it."""
    for name, value in {"$__rate_interval": "5s", "$interval": "60", "$agent": agent}.items():
        expr = expr.replace(name, value)
    assert "$" not in re.sub(r"\$(?=\")", "", expr)
    return expr


def up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def child(command: list[Any], folder: Path, log: Path, env: Mapping[str, str] | None) -> Iterator[subprocess.Popen]:
    """A process that is asked to end, by its own id, when the block does."""
    with log.open("wb") as out:
        process = subprocess.Popen([str(part) for part in command], cwd=folder, env=env, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(LIMIT_S)


@contextmanager
def prometheus(program: str, folder: Path, targets: Mapping[str, int]) -> Iterator[Seen]:
    """Scrape the port of each job, with the rules; give the Prometheus once it is ready."""
    jobs = ", ".join(
        f"{{job_name: {job}, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}" for job, port in targets.items()
    )
    (folder / "prometheus.yml").write_text(
        f"global: {{scrape_interval: {SCRAPE}, scrape_timeout: {SCRAPE}, evaluation_interval: 1s}}\n"
        f"rule_files: ['{ROOT}/dashboards/prometheus/rules.yml']\n"
        f"scrape_configs: [{jobs}]\n"
    )
    listen = free_port()
    url = f"http://127.0.0.1:{listen}"
    command = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    log = folder / "prometheus.log"
    with child([*command, f"--web.listen-address=127.0.0.1:{listen}"], folder, log, None) as scraper:
        wait_for(lambda: scraper.poll() is not None or up(f"{url}/-/ready"))
        assert scraper.poll() is None, log.read_text()
        yield Seen(url)
