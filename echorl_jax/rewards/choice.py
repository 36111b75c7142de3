"""Judges multiple choice: a response is right if it settles on the one option that is right.

An option is named by its label or by its text. An answer that names several options, or denies the
one that it names, chooses none. Answers are read word by word in windows of bounded length, so the
time is linear in the length of the response.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from echorl_jax.rewards import answer_words as words
from echorl_jax.rewards.extraction import after_thinking, last_answer, last_boxed_span
from echorl_jax.rewards.verdict import Verdict

# Answers end responses: phrases are looked for in this much of the end (characters).
TAIL = 10_000
# Limits in words: what may stand between a phrase and its option, between two joined options, and
# how far a sentence is followed.
LEAD_WORDS, JOIN_WORDS, SENTENCE_WORDS = 16, 8, 60
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "123456789"
# What an answer with more than one option reads as.
SEVERAL = "several options"
# "B) text", "(B) text", "B. text" at the start of a line of the prompt.
OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z]|[1-9])[).:](.*)$", re.MULTILINE)
WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mbox|boxed|fbox|bf|rm)\b[ \t]*"
    r"|\\(?:quad\b|[()\[\],;:! ])"
    r"|\*\*|__|(?<!\w)\*(?=\w+\*(?!\w))|(?<=\w)\*(?!\w)|[$`{}#\u200b\ufeff]"
    r"|</?(?:b|i|u|p|em|strong|span)>"
)
# A word, a number, a word of Chinese, a line end, a sign.
WORD = re.compile(
    r"[A-Za-zÀ-ɏ][A-Za-zÀ-ɏ0-9]*(?:['’-][A-Za-zÀ-ɏ]+)*|\d+(?:[.,]\d+)*(?:[A-Za-z]\w*)?"
    r"|答案|选[择项]?|選[擇項]?|正确|正確|错误|錯誤|应该|應該|不是|或者|而是|\n|\S"
)

# One marked answer that is joined to the one before it is not the whole answer.
JOINED_MARK = re.compile(
    r"(?:\}|</answer>)\W*(?:\b(?:or|and|oder|und|o|y|ou|et)\b|[,/|&、或和])\W*$", re.I
)
MARK = re.compile(r"(?:\\(?:boxed|fbox)\s*\{|<answer>)$")


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text, from the column ``options`` or from the lines of the prompt that list them."""
    listed = row.get("options")
    if isinstance(listed, Mapping):
        kept = {label: text for label, text in listed.items() if text is not None}
        return {str(label).strip().upper(): str(text) for label, text in kept.items()}
    if listed:
        return dict(zip(LETTERS, map(str, listed), strict=False))
    lines = OPTION_LINE.findall(unicodedata.normalize("NFKC", _prompt_text(row)))
    found = {label: text.strip() for label, text in lines if text.strip()}
    # A list of options has two or more and leaves none out.
    labels = "".join(found)
    return (
        found if len(found) > 1 and labels in LETTERS + "|" + DIGITS and labels[0] in "A1" else {}
    )


def _prompt_text(row: Mapping[str, Any]) -> str:
    """The last message of the prompt, or the prompt itself where it is plain text."""
    prompt = row.get("prompt") or ""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else ""


def is_choice(row: Mapping[str, Any]) -> bool:
    """Whether the ground truth names an option, by label or text.

    A number does not where numbered lines of the prompt are all that could be options: they may be
    statements or data.
    """
    truth, options = row["reward_model"]["ground_truth"], options_of(row)
    if not isinstance(truth, str):
        return False
    if "1" in options and not row.get("options") and re.fullmatch(r"\W*\d+([.,]\d+)*\W*", truth):
        return False
    return letter_of(truth, options) is not None


def grade(response: str, row: Mapping[str, Any]) -> Verdict:
    r"""Compares the chosen option with the ground truth, which is a label or an option's text.

    The choice is read from ``\boxed{}``, else from ``<answer>``, else from the last phrase like
    "the answer is (C)", else from "C is correct", else from a last line that is an option.

    >>> row = {"reward_model": {"ground_truth": "B"}, "options": ["four", "five"]}
    >>> grade("so \\boxed{\\text{five}}", row)
    Verdict(score=1.0, correct=True, reason='chose B')
    """
    options = options_of(row)
    gold = letter_of(str(row["reward_model"]["ground_truth"]), options)
    if gold is None:
        raise ValueError("the ground truth is neither a letter nor one of the options")
    chosen = find_choice(response, options)
    if chosen == gold:
        return Verdict.right(f"chose {gold}")
    if chosen is None:
        return Verdict.wrong("no option found in the response")
    return Verdict.wrong(f"chose {chosen}, not {gold}")


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The label that a short text names, by itself or as an option's text.

    >>> letter_of("(b)", {"A": "4", "B": "5"}), letter_of("5", {"A": "4", "B": "5"})
    ('B', 'B')
    """
    named = _named(text, options) or _Answer(text, options).read(0, said=True)
    return None if named == SEVERAL else named


def find_choice(response: str, options: Mapping[str, str]) -> str | None:
    """The label that a response settles on, :data:`SEVERAL`, or None if it names none."""
    text = after_thinking(response)
    marked, before, after = _marked(text)
    if marked is None:
        return _Answer(text[-TAIL:], options).settled()
    if JOINED_MARK.search(before):
        return SEVERAL
    marked = marked[-TAIL:]
    inside = _Answer(marked, options)
    chosen = _named(marked, options) or inside.read(0, said=True) or inside.settled()
    if chosen and _Answer(after.partition("\n")[0], options).joined(0, chosen):
        return SEVERAL
    return chosen


def _marked(text: str) -> tuple[str | None, str, str]:
    """The inside of the last box or ``<answer>``, with a little of the text before and after it."""
    if (span := last_boxed_span(text)) is not None:
        start, end = span
    elif (inside := last_answer(text)) is not None:
        end = text.rindex("</answer>")
        start = end - len(inside)
    else:
        return None, "", ""
    before = MARK.sub("", text[max(0, start - 60) : start])
    return text[start:end], before, re.sub(r"^(?:\}|</answer>)", "", text[end : end + 60])


def _clean(text: str) -> str:
    """Text without type commands and emphasis, in the usual width, with single spaces."""
    plain = WRAPPERS.sub("", unicodedata.normalize("NFKC", text))
    return re.sub(r"[^\S\n]+", " ", plain).strip()


@functools.lru_cache(maxsize=1024)
def _spaced(text: str) -> str:
    return " ".join(_clean(text).split()).strip(" .\"'“”")


def _lower(text: str) -> str:
    return _spaced(text).lower()


def _unspaced(text: str) -> str:
    return re.sub(r"[\s\\]", "", _lower(text))


def _named(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text is, as a whole: its label alone or its text."""
    start = WORD.findall(_spaced(text)[:20])
    bare = "".join(word for word in start if word.lower() not in words.OPTION)
    label = bare.strip("()[]:,.").upper()
    if len(label) == 1 and label in (options or LETTERS + DIGITS):
        return label
    for key in (_spaced, _lower, _unspaced):
        wanted = key(text)
        same = [name for name, option in options.items() if key(option) == wanted]
        if len(same) == 1 and wanted:
            return same[0]
    return None


class _Answer:
    """A text as words, and the options that they name."""

    def __init__(self, text: str, options: Mapping[str, str]) -> None:
        self._text = _clean(text)
        self._lowered = self._text.lower()
        self._found = list(WORD.finditer(self._text))
        self._words = [found[0].lower() for found in self._found]
        self._labels = set(options) or {*LETTERS, *DIGITS}
        texts = {label: _lower(option) for label, option in options.items()}
        # A text that is itself a label, such as "C" for carbon, would hide that label.
        self._options = {k: text for k, text in texts.items() if text.upper() not in self._labels}

    def word(self, i: int) -> str:
        """Word i in lower case, "" outside of the text."""
        return self._words[i] if 0 <= i < len(self._words) else ""

    def settled(self) -> str | None:
        """The option of the last phrase, else of "B is correct", "option B", a line."""
        places = range(len(self._words))
        for i in reversed(places):
            if self._announces(i) and (named := self.read(i + 1, said=False)):
                return named
        for i in reversed(places):
            if named := self._confirmed(i):
                return named
        for i in reversed(places):
            if named := self._mentioned(i):
                return named
        return self._line()

    def _line(self) -> str | None:
        """The option that the last line is, or the first where the last is none."""
        places = range(len(self._words))
        starts = [i for i in places if self.word(i - 1) in {"", "\n"} and self.word(i) != "\n"]
        for around in (starts[:-3:-1], starts[:2]):
            chosen, *beside = [self._line_at(start) for start in around] or [None]
            if chosen:
                # Options that are listed again, one a line, are no answer.
                return SEVERAL if any(beside) and beside != [chosen] else chosen
        return None

    def _line_at(self, start: int) -> str | None:
        text = self._text[self._found[start].start() :].partition("\n")[0]
        return self.read(start, said=False) or _named(text, self._options)

    def read(self, i: int, *, said: bool) -> str | None:
        """The option that stands at word i or after words that lead up to it.

        Args:
          said: whether "is" or a colon comes before: then an option may be named in any way, else
            only by a label that is set apart.
        """
        denied = False
        for at in range(i, i + LEAD_WORDS):
            if found := self._option_at(at, said=said):
                named, end = found
                if denied:
                    return self._corrected(end)
                if not said and self._denied_after(end):
                    return None
                return SEVERAL if self.joined(end, named) else named
            word = self.word(at)
            number = not said and word.isdigit() and at > i and self.word(at - 1).isalpha()
            sign = len(word) == 1 and not word.isalnum() and word not in "\\^%<?"
            if not (word in words.LEAD or number or sign):
                return None
            said |= word in words.COPULA
            denied |= word in words.NEGATION
        return None

    def joined(self, i: int, named: str) -> bool:
        """Whether the words from i on add another option to the one that is named."""
        after = i
        while self.word(after) in words.CLOSING | {".", "-"} and not self._text_at(after):
            after += 1
        if own := self._text_at(after):
            if own[0] != named:
                return True
            i = own[1]
        either = link = line = False
        for at in range(i, i + JOIN_WORDS):
            other = self._option_at(at, said=True) if link else None
            if other and other[0] != named:
                if either or self._added(other[1], line=line):
                    return True
                break
            word = self.word(at)
            if not other and word not in words.JOIN:
                break
            either |= word in words.OR
            link |= word in words.OR | words.AND
            line |= word == "\n"
        return self._listed(i, named)

    def _added(self, i: int, *, line: bool) -> bool:
        """Whether the option before word i is meant as well: the sentence is no remark on it."""
        while self.word(i) in words.CLOSING - {":"}:
            i += 1
        if self._refused(i):
            return False
        if self.word(i) in words.PLURAL or self.word(i + 1) == "also":
            return True
        ends = {"", "\n"} if line else words.CLAUSE_END - {":"} | words.AND | words.OR
        return self.word(i) in ends

    def _denied_after(self, i: int) -> bool:
        """Whether the clause that goes on at word i denies the option before it."""
        rest = itertools.takewhile(
            lambda word: word not in words.CLAUSE_END, self._words[i : i + 5]
        )
        return bool(set(rest) & (words.INCORRECT | words.NEGATION))

    def _refused(self, i: int) -> bool:
        """Whether the sentence from word i on calls something wrong."""
        return bool(set(self._sentence(i)) & (words.INCORRECT | words.NEGATION))

    def _sentence(self, i: int) -> list[str]:
        rest = self._words[i : i + SENTENCE_WORDS]
        ends = (place for place, word in enumerate(rest) if word in words.SENTENCE_END)
        return rest[: next(ends, None)]

    def _listed(self, i: int, named: str) -> bool:
        """Whether the sentence lists another option with its text, as in "A: four, B: five"."""
        for at, word in enumerate(self._sentence(i), start=i + 1):
            while self.word(at) in words.OPTION | {"(", "["}:
                at += 1
            found = self._label_at(at, said=True)
            if found and found[0] != named and self.word(at + 1) in {")", "]", ":"}:
                text = self._text_at(at + 2)
                meant = word in words.LISTING and self.word(at + 2) not in words.COPULA
                if (meant and not self._refused(at + 2)) or (text and text[0] == found[0]):
                    return True
        return False

    def _corrected(self, i: int) -> str | None:
        """The option after "but", where the one before it is denied: "not A but B"."""
        for at, word in enumerate(self._sentence(i), start=i):
            if word in words.BUT:
                return self.read(at + 1, said=True)
        return None

    def _option_at(self, i: int, *, said: bool) -> tuple[str, int] | None:
        """The option that begins at word i, and the word after it; a text wins over a label."""
        text = self._text_at(i) if said else None
        return text or self._label_at(i, said=said)

    def _label_at(self, i: int, *, said: bool) -> tuple[str, int] | None:
        label, after = self.word(i).upper(), self.word(i + 1)
        if label not in self._labels or after in words.FORMULA:
            return None
        own = self._found[i]
        before = self._text[max(0, own.start() - 1) : own.start()]
        if label.isdigit() and before in {"-", "−", ".", "/"}:
            return None
        # "a planet" and "I think" name no option; other capital letters do before any word.
        capital = own[0].isupper() and label not in "AI"
        remark = after in words.REMARK or capital or label.isdigit()
        joins = after in words.OR | words.AND or after > "\u2e7f"
        ends = after in words.END | words.BECAUSE or joins or (said and remark)
        return (label, i + 1) if ends else None

    def _text_at(self, i: int) -> tuple[str, int] | None:
        """The longest option whose text begins at word i and ends a clause."""
        if i >= len(self._found):
            return None
        start, best = self._found[i].start(), None
        if self.word(i)[0].isdigit() and self._text[max(0, start - 1) : start] in {"-", "−"}:
            return None
        for label, text in self._options.items():
            if not self._lowered.startswith(text or "\0", start) or (best and len(text) < best[0]):
                continue
            end, after = start + len(text), i
            while after < len(self._found) and self._found[after].start() < end:
                after += 1
            # "5-6" and "5/6" are computed from the number 5.
            computed = self.word(after) in {*"-–/"} and self.word(after + 1)[:1].isdigit()
            whole = self._found[after - 1].end() == end and self.word(after) in words.WHOLE
            if whole and not computed:
                best = len(text), label, after
        return best and best[1:]

    def _announces(self, i: int) -> bool:
        """Whether an answer may follow word i: "answer", "correct option", "richtig ist"."""
        word, before, after = self._words[i], self.word(i - 1), self.word(i + 1)
        if not (
            word in words.NOUNS
            or (word in words.VERBS and before in words.SPEAKERS)
            or (word in words.OPTION and {before, after} & words.CORRECT)
            or (word in words.CORRECT and after in words.COPULA)
        ):
            return False
        clause: list[str] = []  # backwards
        while (
            len(clause) < 8 and (before := self.word(i - 1 - len(clause))) not in words.CLAUSE_END
        ):
            clause.append(before)
        if set(clause[:2]) & (words.INCORRECT | words.CONDITIONS) or set(clause[:1]) & {*"不非"}:
            return False
        return not any(
            verb in words.DOUBTED and (no in words.NEGATION or no.endswith("n't"))
            for verb, no in zip(clause, clause[1:], strict=False)
        )

    def _mentioned(self, i: int) -> str | None:
        """The label in "this matches option B", unless the sentence sets it aside."""
        if self._words[i] not in words.OPTION:
            return None
        at = i + 1 + (self.word(i + 1) in {"(", "["})
        found = self._label_at(at, said=True)
        before = self._words[max(0, i - 6) : i][::-1]
        clause = itertools.takewhile(lambda word: word not in words.CLAUSE_END, before)
        if not found or set(clause) & words.SET_ASIDE or self._refused(at):
            return None
        return SEVERAL if self.joined(found[1], found[0]) else found[0]

    def _confirmed(self, i: int) -> str | None:
        """The label in "B is correct", "Option B is the answer", "C ist richtig", "C项正确"."""
        label = self._found[i][0]
        if label not in self._labels:
            return None
        at, verb = i + 1, False
        while self.word(at) in words.CONFIRMING and at < i + 7:
            verb |= self.word(at) in (words.COPULA | words.OPTION) - {"\n"}
            at += 1
        confirmed = self.word(at) in words.CORRECT | words.NOUNS
        # "正确" follows without a verb.
        if not confirmed or not (verb or self.word(at) > "\u2e7f"):
            return None
        before = i - 1
        while self.word(before) in words.OPTION | {"(", "[", "statement"}:
            before -= 1
        if self.word(before) in words.CONDITIONS:
            return None
        return SEVERAL if self.word(before) in words.EITHER else label
