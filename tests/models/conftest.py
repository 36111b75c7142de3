"""``make_golden.py`` needs torch and is no test."""

collect_ignore = ["make_golden.py"]
