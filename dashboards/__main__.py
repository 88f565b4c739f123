"""`python -m dashboards`: write the dashboards, the alert rules and the rules' tests."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

from dashboards import agents, feed, kafka, pipeline, runbook_board, signal
from dashboards.alerts import GRAFANA, rules
from dashboards.cases import rule_tests

HERE = Path(__file__).parent
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
HEADER = "# Written by `python -m dashboards`: change the code there, not this file.\n"


def files(interval_s: int = 60, grafana: str = GRAFANA) -> dict[str, str]:
    """Path under the folder to text, the same each time."""
    boards = (signal.board(), agents.board(), pipeline.board(), feed.board(), kafka.board(), runbook_board.board())
    made = {f"grafana/{board.uid.removeprefix('quartet-')}.json": board.to_json() for board in boards}
    made["prometheus/rules.yml"] = _yaml(rules(interval_s, grafana))
    if (interval_s, grafana) == (60, GRAFANA):
        made["prometheus/rules.test.yml"] = _yaml(rule_tests())
    return made


def _yaml(value: Any) -> str:
    writer = YAML()
    writer.width = 1_000_000
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    writer.dump(value, stream)
    return HEADER + stream.getvalue()


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]*[smhd]", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a number with s, m, h or d, such as 1m")
    return int(text[:-1]) * UNITS[text[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--interval", type=_seconds, default=60, help="interval of the bars, for the alerts")
    parser.add_argument("--grafana", default=GRAFANA, help="where the links of alerts lead")
    given = parser.parse_args()
    for name, text in files(given.interval, given.grafana).items():
        path = given.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
