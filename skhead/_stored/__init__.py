"""Estimators as documents without code."""
