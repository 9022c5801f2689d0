"""Atomic files, and helpers that every package uses."""
