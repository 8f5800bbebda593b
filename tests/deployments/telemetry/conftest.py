"""Fronts in this process, as the tests of the HTTP front have them."""

from tests.deployments.http.conftest import front, fronts

__all__ = ["front", "fronts"]
