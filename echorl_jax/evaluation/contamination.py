"""Finds held-out problems that the training set contains too, word for word or nearly."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

# Words and the signs of formulas; spacing, dollars, backslashes and punctuation do not count.
WORDS = re.compile(r"[^\W_]+|[-+*/^<>=!%]")
# Words of an n-gram.
LENGTH = 8
# A held-out problem is nearly there if one training problem has this share of its n-grams.
NEAR = 0.5
# Fewer common n-grams prove nothing.
FEWEST = 4
# An n-gram in more problems than this, and in more than this share of them, is the prompt's frame.
FRAME_ROWS, FRAME_SHARE = 5, 0.02


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A held-out problem that is among the training problems."""

    held_out: int  # place among the held-out problems
    train: int  # place of the training problem that is most like it
    share: float  # of its n-grams; 1 and ``same`` when word for word
    same: bool


def words(text: str) -> tuple[str, ...]:
    r"""The words of a problem that are compared.

    >>> words("Find $x^2$ if  \\(x = 3\\).") == words("find x ^ 2 if x=3")
    True
    """
    return tuple(WORDS.findall(text.casefold()))


def find_overlap(train: Iterable[str], held_out: Sequence[str]) -> list[Overlap]:
    """The held-out problems that occur in training, in their order.

    Memory grows with the held-out set alone; the training problems are read once. Text that many
    problems share (a prompt's frame) is no sign of overlap, and problems of fewer than ``LENGTH``
    words are only compared word for word.

    >>> find_overlap(["What is 2 + 3?"], ["What is 2+4?", "what is $2+3$"])
    [Overlap(held_out=1, train=0, share=1.0, same=True)]
    """
    texts = [words(text) for text in held_out]
    whole: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for place, text in enumerate(texts):
        whole[text].append(place)
    grams = [_grams(text) for text in texts]
    in_held_out = collections.Counter(gram for own in grams for gram in own)
    seen: dict[tuple[str, ...], list[int]] = {gram: [] for gram in in_held_out}
    same: dict[int, int] = {}
    count = 0
    for place, text in enumerate(train):
        count += 1
        own = words(text)
        for held in whole.get(own, ()):
            same.setdefault(held, place)
        for gram in _grams(own):
            if (places := seen.get(gram)) is not None:
                places.append(place)
    rows = (max(FRAME_ROWS, FRAME_SHARE * size) for size in (len(texts), count))
    most_held_out, most_train = rows
    frame = {
        gram
        for gram, places in seen.items()
        if in_held_out[gram] > most_held_out or len(places) > most_train
    }
    found = []
    for held, own in enumerate(grams):
        if held in same:
            found.append(Overlap(held, same[held], 1.0, same=True))
            continue
        telling = own - frame
        hits = collections.Counter(place for gram in telling for place in seen[gram])
        if hits:
            place, number = min(hits.items(), key=lambda item: (-item[1], item[0]))
            if number >= FEWEST and number / len(telling) >= NEAR:
                found.append(Overlap(held, place, number / len(telling), same=False))
    return found


def _grams(text: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + LENGTH]) for i in range(len(text) - LENGTH + 1)}
