"""Finds the part of a response that is its answer, in time linear in the length of the text."""

import re

from echorl_jax.rewards.notation import brace_pairs

# Marks of reasoning before an answer, as current models write them.
_THINK = r"(?:think|thinking|thought|reasoning)"
THINK_START = re.compile(rf"<{_THINK}>|\[THINK\]|<\|begin_of_thought\|>", re.IGNORECASE)
THINK_END = re.compile(rf"</{_THINK}>|\[/THINK\]|<\|end_of_thought\|>", re.IGNORECASE)
ANSWER_START, ANSWER_END = "<answer>", "</answer>"
# GSM8K's solutions end in "#### 72".
GSM8K_MARK = "####"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What may stand between boxes that are one answer together: "\boxed{1} and y = \boxed{2}".
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&]|\\[\[\](),;:! ]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|and\b|or\b"
    r"|[A-Za-z](?:_\{?[0-9A-Za-z]\}?)?\s*=)*"
)
MOST_BETWEEN_BOXES = 60
NEGATED_BOX = re.compile(r"\b(?:not|isn't|never)[\s$:({\\]*$", re.IGNORECASE)
# What belongs to a box but stands behind it: a percent sign, a word of size, one more option.
AFTER_BOX = re.compile(
    r"[\s$]*(?:\\[)\]])?[\s$]*(\\?%|percent|per cent|pct|(?:hundred|thousand|[mbtr]+illion)\b"
    r"|,?\s*or\b(?=\s*\$?\s*[-+]?[0-9\\])[^.\n]*)",
    re.IGNORECASE,
)
# An answer without any mark is looked for in this much of the end.
TAIL = 1000
ANSWER_PHRASE = re.compile(r"\banswer\b(?:\s*\*\*)?(?:\s+is\b|\s*[:=])?", re.IGNORECASE)
DISPLAY_MATH = re.compile(r"\$\$[^$]*\$\$|\\\[[^\]]*\\\]")
MATH = re.compile(r"\$\$[^$]*\$\$|\$[^$\n]*\$|\\\([^\n)]*\\\)|\\\([^\n]*?\\\)|\\\[[^\n]*?\\\]")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# Verbs that state a value, and those that do so in a finished sentence only.
STATES = re.compile(r"(?:\b(?:is|are|was|were|equals|equal to)\b|[=:≈])", re.IGNORECASE)
MENTIONS = re.compile(
    r"\b(?:be|by|has|have|had|get|gets|gives|needs|there (?:is|are)|of)\b", re.IGNORECASE
)
# An amount with the sign of its currency behind it, and no mathematics.
AMOUNT = re.compile(r"\s*[-+]?[0-9][0-9.,]*\s?\$(?=[^$]*$)")
DENIED = re.compile(r"\b(?:not|no|never|without|less|more|over|under)\b|n't\b", re.IGNORECASE)
UNSURE = re.compile(r"\b(?:could|may|might|maybe|perhaps|possibly|either)\b", re.IGNORECASE)


def after_thinking(response: str) -> str:
    """What follows the reasoning; nothing if the response was cut off inside it.

    >>> after_thinking("<think> hmm </think> 42"), after_thinking("<think> 42")
    (' 42', '')
    """
    ends = [match.end() for match in THINK_END.finditer(response)]
    rest = response[ends[-1] :] if ends else response
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
    """Where the insides of all balanced boxes begin and end, in the order of their beginnings."""
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
    start, end = spans[-1]
    contents = [text[start:end]]
    after = AFTER_BOX.match(text, end + 1, end + 80)
    behind = after[1] if after else ""
    for before_start, before_end in reversed(spans[:-1]):
        between = BOX.sub("", text[before_end + 1 : start])
        if before_end > start or start - before_end > MOST_BETWEEN_BOXES:
            break
        if not BETWEEN_BOXES.fullmatch(between):
            break
        start = before_start
        if text[before_start:before_end] != contents[0]:
            contents.insert(0, text[before_start:before_end])
    opening = text.rfind("\\", 0, start)
    if NEGATED_BOX.search(text[max(0, opening - 20) : opening]):
        return None
    separator = "" if not behind or behind[0] in "\\%" else " "
    return " , ".join(contents) + separator + behind


def _end(text: str) -> str:
    """The end of a text, from outside of its mathematics on."""
    before, tail = text[:-TAIL], text[-TAIL:]
    displays = before.count("$$")
    mark = "$$" if displays % 2 else "$" if before.count("$") % 2 else ""
    return tail.partition(mark)[2] or tail if mark else tail


def _stated(tail: str) -> str | None:
    """The value that is stated without any mark: after "answer", or in the last sentence."""
    tail = tail.partition("<|")[0]
    tail = DISPLAY_MATH.sub(lambda found: found[0].replace("\n", " "), tail)
    phrases = list(ANSWER_PHRASE.finditer(tail))
    if phrases:
        sentences = _sentences(tail[phrases[-1].end() :])
        return _value_of(sentences[0], certain=True) if sentences else None
    valued = [s for s in _sentences(tail) if any(sign.isdigit() for sign in s) or MATH.search(s)]
    return _value_of(valued[-1], certain=False) if valued else None


def _masked(text: str) -> str:
    """The text with its mathematics replaced, so that no word is looked for in there.

    A sentence may end inside of it: ``$x = 5.$`` keeps a stop.
    """

    def mask(found: re.Match[str]) -> str:
        stop = found[0].rstrip("$)]\\ ").endswith(".")
        return "#" * (len(found[0]) - stop) + "." * stop

    return MATH.sub(mask, text)


def _sentences(text: str) -> list[str]:
    """Sentences with their stops; points inside of mathematics end none."""
    found, start, masked = [], 0, _masked(text)
    for end in SENTENCE_END.finditer(masked):
        found.append(text[start : end.end()])
        start = end.end()
    return [sentence for sentence in (*found, text[start:]) if sentence.strip(" *#:\n\t")]


def _value_of(sentence: str, *, certain: bool) -> str | None:
    """What a sentence states: after its last verb, else its only mathematics, else all of it."""
    masked = _masked(sentence)
    if masked.rstrip().endswith("?"):
        return None
    whole = masked.rstrip().endswith((".", "!", "#", "*"))
    for verbs in (STATES, MENTIONS)[: 2 if certain or whole else 1]:
        ends = [match.end() for match in verbs.finditer(masked)]
        if ends and any(sign == "#" or sign.isdigit() for sign in masked[ends[-1] :]):
            if UNSURE.search(masked[max(ends[-1] - 20, 0) :]):
                return None
            amount = AMOUNT.match(sentence, ends[-1])
            return amount[0] if amount else sentence[ends[-1] :]
    numbers = list(re.finditer(r"[-+]?\$?[0-9][0-9,.]*", masked))
    if whole and len(numbers) == 1 and "#" not in masked and not DENIED.search(masked):
        return sentence[numbers[0].start() :]
    found = MATH.findall(sentence)
    if len(found) == 1 and not any(sign.isdigit() for sign in masked):
        return found[0]
    return sentence
