"""Pieces of the report: analysis, numbers, words, drawings, page and files."""

from __future__ import annotations
