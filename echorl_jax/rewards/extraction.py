"""Finds the answer in a response, in time linear in the length of the text."""

import itertools
import re

from echorl_jax.rewards.notation import brace_pairs

# Tags around the reasoning before an answer, as current models write them.
_THINK = r"(?:think|thinking|thought|reasoning)"
THINK_START = re.compile(rf"<{_THINK}>|\[THINK\]|<\|begin_of_thought\|>", re.IGNORECASE)
THINK_END = re.compile(rf"</{_THINK}>|\[/THINK\]|<\|end_of_thought\|>", re.IGNORECASE)
ANSWER_START, ANSWER_END = "<answer>", "</answer>"
# GSM8K's solutions end in "#### 72".
GSM8K_MARK = "####"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Boxes with only this between them are one answer: "\boxed{1} and y = \boxed{2}".
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&]|\\[\[\](),;:! ]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|and\b|or\b"
    r"|[A-Za-z](?:_\{?[0-9A-Za-z]\}?)?\s*=)*"
)
MOST_BETWEEN_BOXES = 60
NEGATED_BOX = re.compile(r"\b(?:not|isn't|never)[\s$:({\\]*$", re.IGNORECASE)
# These belong to the box before them: a percent sign, "million", one more option.
AFTER_BOX = re.compile(
    r"[\s$]*(?:\\[)\]])?[\s$]*(\\?%|percent|per cent|pct|(?:hundred|thousand|[mbtr]+illion)\b"
    r"|,?\s*or\b(?=\s*\$?\s*[-+]?[0-9\\])[^.\n]*)",
    re.IGNORECASE,
)
# An answer without a box, tag or #### is searched in this much of the end (characters).
TAIL = 1000
ANSWER_PHRASE = re.compile(r"\banswer\b(?:\s*\*\*)?(?:\s+is\b|\s*[:=])?", re.IGNORECASE)
DISPLAY_MATH = re.compile(r"\$\$[^$]*\$\$|\\\[[^\]]*\\\]")
MATH = re.compile(r"\$\$[^$]*\$\$|\$[^$\n]*\$|\\\([^\n)]*\\\)|\\\([^\n]*?\\\)|\\\[[^\n]*?\\\]")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# Verbs that state a value, and verbs that state one only in a finished sentence.
STATES = re.compile(r"(?:\b(?:is|are|was|were|equals|equal to)\b|[=:≈])", re.IGNORECASE)
MENTIONS = re.compile(
    r"\b(?:be|by|has|have|had|get|gets|gives|needs|there (?:is|are)|of)\b", re.IGNORECASE
)
# In "5$" the dollar sign is a currency, unless another one follows.
AMOUNT = re.compile(r"\s*[-+]?[0-9][0-9.,]*\s?\$(?=[^$]*$)")
DENIED = re.compile(r"\b(?:not|no|never|without|less|more|over|under)\b|n't\b", re.IGNORECASE)
UNSURE = re.compile(r"\b(?:could|may|might|maybe|perhaps|possibly|either)\b", re.IGNORECASE)


def after_thinking(response: str) -> str:
    """The text after the reasoning; empty if the response was cut off inside the reasoning.

    >>> after_thinking("<think> hmm </think> 42"), after_thinking("<think> 42")
    (' 42', '')
    """
    rest = THINK_END.split(response)[-1]
    return "" if THINK_START.search(rest) else rest


def last_answer(response: str) -> str | None:
    """The inside of the last closed ``<answer> ... </answer>``, or None.

    >>> last_answer("<answer> 1 </answer> no, <answer> 2 </answer>")
    ' 2 '
    """
    before, end, _ = response.rpartition(ANSWER_END)
    if not end:
        return None
    _, start, inside = before.rpartition(ANSWER_START)
    return inside if start else None


def boxed_spans(response: str) -> list[tuple[int, int]]:
    """Begin and end of the inside of each balanced box, in the order of the beginnings."""
    starts = [match.end() for match in BOX.finditer(response)]
    if not starts:
        return []
    pairs = brace_pairs(response, starts[0] - 1)
    return [(start, pairs[start - 1]) for start in starts if start - 1 in pairs]


def final_answer(text: str) -> str | None:
    r"""The answer of a response whose reasoning has been cut away, or None.

    The last ``\boxed{}`` with the boxes beside it, else the last ``<answer>``, else what follows
    GSM8K's ``####``, else what the last sentence with a value states.

    >>> final_answer("\\boxed{1} or \\boxed{2}"), final_answer("So the answer is $x = 5$.")
    ('1 , 2', '$x = 5$')
    """
    if spans := boxed_spans(text):
        return _boxes(text, spans)
    inside = last_answer(text)
    if inside is not None:
        return inside
    tail = _end(text)
    if GSM8K_MARK in tail:
        lines = tail.rpartition(GSM8K_MARK)[2].strip().splitlines()
        return lines[0] if lines else None
    return _stated(tail)


def _boxes(text: str, spans: list[tuple[int, int]]) -> str | None:
    """The contents of the last box and of those joined to it, or None if a "not" precedes them."""
    start, end = spans[-1]
    contents = [text[start:end]]
    after = AFTER_BOX.match(text, end + 1, end + 80)
    suffix = after[1] if after else ""
    for before_start, before_end in reversed(spans[:-1]):
        if not 0 <= start - before_end <= MOST_BETWEEN_BOXES:
            break
        if not BETWEEN_BOXES.fullmatch(BOX.sub("", text[before_end + 1 : start])):
            break
        start = before_start
        if text[before_start:before_end] != contents[0]:
            contents.insert(0, text[before_start:before_end])
    command = text.rfind("\\", 0, start)
    if NEGATED_BOX.search(text[max(0, command - 20) : command]):
        return None
    separator = "" if suffix[:1] in ("", "\\", "%") else " "
    return " , ".join(contents) + separator + suffix


def _end(text: str) -> str:
    """The end of a text, from outside of its mathematics on."""
    before, tail = text[:-TAIL], text[-TAIL:]
    displays = before.count("$$")
    mark = "$$" if displays % 2 else "$" if before.count("$") % 2 else ""
    return tail.partition(mark)[2] or tail if mark else tail


def _stated(tail: str) -> str | None:
    """The value stated after the last "answer", else in the last sentence with a value."""
    tail = tail.partition("<|")[0]
    tail = DISPLAY_MATH.sub(lambda found: found[0].replace("\n", " "), tail)
    *before, rest = ANSWER_PHRASE.split(tail)
    sentences = _sentences(rest)
    if before:
        return _value_of(sentences[0], certain=True) if sentences else None
    valued = [s for s in sentences if any(map(str.isdigit, s)) or MATH.search(s)]
    return _value_of(valued[-1], certain=False) if valued else None


def _masked(text: str) -> str:
    """The text with "#" for its mathematics, so that no word and no stop is found in there.

    A stop at the end, as in ``$x = 5.$``, ends the sentence and is kept.
    """

    def mask(found: re.Match[str]) -> str:
        stop = found[0].rstrip("$)]\\ ").endswith(".")
        return "#" * (len(found[0]) - stop) + "." * stop

    return MATH.sub(mask, text)


def _sentences(text: str) -> list[str]:
    ends = [end.end() for end in SENTENCE_END.finditer(_masked(text))]
    sentences = (text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]))
    return [sentence for sentence in sentences if sentence.strip(" *#:\n\t")]


def _value_of(sentence: str, *, certain: bool) -> str | None:
    """The value after the last verb, else the only number or formula, else the whole sentence.

    None for a question and for a guess. ``certain``: the sentence follows "answer", so that it need
    not be finished.
    """
    masked = _masked(sentence)
    end = masked.rstrip()[-1:]
    if end == "?":
        return None
    finished = end in (".", "!", "#", "*")
    for verbs in (STATES, MENTIONS) if certain or finished else (STATES,):
        rest = verbs.split(masked)[-1]
        place = len(masked) - len(rest)
        if place and re.search(r"[#\d]", rest):
            if UNSURE.search(masked, max(place - 20, 0)):
                return None
            amount = AMOUNT.match(sentence, place)
            return amount[0] if amount else sentence[place:]
    numbers = list(re.finditer(r"[-+]?\$?[0-9][0-9,.]*", masked))
    if finished and len(numbers) == 1 and "#" not in masked and not DENIED.search(masked):
        return sentence[numbers[0].start() :]
    formulas = MATH.findall(sentence)
    return formulas[0] if len(formulas) == 1 and not re.search(r"\d", masked) else sentence
