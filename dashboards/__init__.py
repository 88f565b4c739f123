"""The dashboards and alert rules, as code. `python -m dashboards` writes them; only what it writes is used."""
