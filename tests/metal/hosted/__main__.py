"""Runs pytest under the double: python -m metal.hosted [pytest's arguments]."""

import sys

import pytest

from . import load

load()
sys.exit(pytest.main(sys.argv[1:]))
