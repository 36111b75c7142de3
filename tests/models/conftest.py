"""Excludes ``make_golden.py`` from collection: it needs torch and is not a test."""

collect_ignore = ["make_golden.py"]
