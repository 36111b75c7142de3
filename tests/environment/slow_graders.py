"""Graders that take their time, fail, or are too strict, for tests."""

import time
import zlib

from echorl_jax.rewards import Verdict


def slow(response, row):
    """Takes up to 0.2 s, which and what follows from the response; hangs where the row says so."""
    if response == row.get("hang_on"):
        time.sleep(1000)
    place = zlib.crc32(f"{row['number']} {response}".encode())
    time.sleep(place % 5 * 0.05)
    return Verdict(place % 97 / 97, place % 2 == 0, f"{row['number']}: {response[:20]}")


def raising(response, row):
    """Fails on everything."""
    raise RuntimeError("no judge today")


def every_other(response, row):
    """Right or not by the first digit; every other puzzle is not judged."""
    if row["reward_model"]["ground_truth"]["target"] % 2:
        return None
    return float(response[:1] in "12345")


def nothing(response, row):
    """Judges nothing."""
    return None


def by_letter(data_source, solution_str, ground_truth, extra_info):
    """Right is the gold answer in a box, as it is spelled."""
    return float(solution_str == f"\\boxed{{{ground_truth}}}")


def measuring(response, row):
    """Calls every response right, with one metric that is a number and one that is not."""
    words = 3 + row["reward_model"]["ground_truth"]["target"] % 2
    return {"score": 1.0, "metrics": {"words": words, "mood": "cheerful"}}
