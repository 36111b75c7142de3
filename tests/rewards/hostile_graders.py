"""Graders that misbehave on command, and graders with the signatures of other libraries."""

import asyncio
import os
import signal
import sys
import time

from echorl_jax.rewards import Verdict


def huge(response, row):
    """Scores some responses beyond what float32 can square."""
    return Verdict(1e30 if len(response) % 2 else 0.0, False, "scored")


def obey(response, row):
    """Does what the response says; anything else is right."""
    match response:
        case "hang":
            while True:
                pass
        case "hang in C":
            return len(str(7 ** (7**9)))
        case "sleep":
            time.sleep(1000)
        case "die":
            os._exit(3)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "allocate":
            return len(bytearray(10**12))
        case "leak":
            hoard = []
            while True:
                hoard.append(bytearray(10**8))
        case "recurse":
            return obey("recurse", row)
        case "exit":
            sys.exit(0)
        case "raise":
            raise ValueError("no\nsuch " + "luck" * 1000)
        case "leave a child":
            if os.fork() == 0:
                time.sleep(1000)
            time.sleep(1000)
        case "none":
            return None
        case "nan":
            return float("nan")
        case "metrics":
            names = [f"{i:02}".ljust(40, "x") for i in range(20)]
            return Verdict(1.0, True, "measured", {name: -(0.1**300) / 3 for name in names})
        case "text":
            return "1.0"
        case "pid":
            return Verdict(1.0, True, str(os.getpid()))
        case "slow pid":
            time.sleep(0.3)
            return Verdict(1.0, True, str(os.getpid()))
        case "modules":
            return Verdict(1.0, True, str("jax" in sys.modules))
    return Verdict(0.5, True, f"{response} {row.get('number')}")


def nearly(response, row):
    """A plain score below 1."""
    return 0.9


def slow(response, row):
    """Right, after a while."""
    time.sleep(0.3)
    return Verdict(1.0, True, response)


def verl_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl's way: keyword arguments in, a mapping out."""
    right = solution_str == ground_truth
    return {"score": 2.0 if right else -1.0, "acc": right, "seen": (data_source, extra_info)}


def trl_reward(prompts, completions, level, **columns):
    """TRL's way: lists in, a list out."""
    (completion,), (prompt,) = completions, prompts
    text = completion if isinstance(completion, str) else completion[0]["content"]
    assert isinstance(prompt, str) == isinstance(completion, str)
    return [float(level[0] == "easy" and text == columns["ground_truth"][0])]


def trl_none(completions, **_):
    """TRL's way of saying that a reward does not apply."""
    return [None for _ in completions]


def trl_even(completions, **_):
    """Judges texts of an even length alone: those that hold an 8 are right."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float("8" in text) if len(text) % 2 == 0 else None for text in texts]


async def trl_async(completions, **_):
    """Waits as for a server; one of the group fails."""
    await asyncio.sleep(0.01)
    return [float("nan") if c[0]["content"] == "nan" else 1.0 for c in completions]


def trl_shortest(prompts, completions, completion_ids, number, **_):
    """Right is the response of the group with the fewest tokens."""
    assert len(prompts) == len(completions) == len(number) and len(set(number)) == 1
    lengths = [len(ids) for ids in completion_ids]
    return [float(place == lengths.index(min(lengths))) for place in range(len(lengths))]


def wrong_signature(response):
    """Takes too little."""
    return 1.0


NOT_A_FUNCTION = 3
