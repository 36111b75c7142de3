"""Excludes programs from collection that need torch and are no tests."""

collect_ignore = ["make_golden.py", "make_vision_golden.py", "peft_reference.py"]
