"""Helpers that several test files share, a module a subject. Shared fixtures are in conftest.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The root of the repository."""
