"""Traces, as the tests of traces make them."""

from tests.trace.conftest import make_trace

__all__ = ["make_trace"]
