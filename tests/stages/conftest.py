"""The workers and models of the chaos tests: stages are started, killed and compared the same way."""

from tests.chaos.conftest import models, stage

__all__ = ["models", "stage"]
