"""Judges multiple choice: the response is right if it chooses the one right option.

An option is named by its label or by its text. An answer that names several options, or denies the
option that it names, chooses none. Answers are read word by word in windows of bounded length, so
the time is linear in the length of the response.
"""

import bisect
import functools
import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence, Set
from typing import Any

from echorl_jax.rewards import answer_words as words
from echorl_jax.rewards.extraction import after_thinking, boxed_spans, last_answer
from echorl_jax.rewards.loading import Verdict

# Phrases are searched in this much of the end of a response (characters).
TAIL = 10_000
# Limits in words: between a phrase and its option, between two joined options, and for a sentence.
LEAD_WORDS, JOIN_WORDS, SENTENCE_WORDS = 16, 8, 60
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "123456789"
# Stands for the label where an answer names more than one option.
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
# A box or <answer> behind one of these joins is not the whole answer.
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
    options = {label: text.strip() for label, text in lines if text.strip()}
    # A list of options has at least two and leaves none out.
    labels = "".join(options)
    complete = LETTERS.startswith(labels) or DIGITS.startswith(labels)
    return options if complete and len(labels) > 1 else {}


def _prompt_text(row: Mapping[str, Any]) -> str:
    """The last message of the prompt, or the prompt itself where it is plain text."""
    prompt = row.get("prompt") or ""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return content if isinstance(content, str) else ""


def is_choice(row: Mapping[str, Any]) -> bool:
    """True if the ground truth names an option, by label or text.

    A number does not if the only options are numbered lines of the prompt: they may be statements
    or data.
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
    Verdict(score=1.0, correct=True, reason='chose B', metrics={})
    """
    options = options_of(row)
    gold = letter_of(str(row["reward_model"]["ground_truth"]), options)
    if gold is None:
        raise ValueError("the ground truth is neither a letter nor one of the options")
    chosen = find_choice(response, options)
    if chosen == gold:
        return Verdict(1.0, True, f"chose {gold}", answer=gold)
    if chosen is None:
        return Verdict.wrong("no option found in the response")
    answer = None if chosen == SEVERAL else chosen
    return Verdict(0.0, False, f"chose {chosen}, not {gold}", answer=answer)


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The label that a short text names, by itself or as an option's text.

    >>> letter_of("(b)", {"A": "4", "B": "5"}), letter_of("5", {"A": "4", "B": "5"})
    ('B', 'B')
    """
    named = _named(text, options) or _Answer(text, options).read(0, said=True)
    return None if named == SEVERAL else named


def find_choice(response: str, options: Mapping[str, str]) -> str | None:
    """The label that a response chooses, :data:`SEVERAL`, or None if it names no option."""
    text = after_thinking(response)
    if (span := _marked_span(text)) is None:
        return _Answer(text[-TAIL:], options).chosen()
    start, end = span
    if JOINED_MARK.search(MARK.sub("", text[max(0, start - 60) : start])):
        return SEVERAL
    marked = text[start:end][-TAIL:]
    inside = _Answer(marked, options)
    label = _named(marked, options) or inside.read(0, said=True) or inside.chosen()
    after = re.sub(r"^(?:\}|</answer>)", "", text[end : end + 60]).partition("\n")[0]
    return SEVERAL if label and _Answer(after, options).joined(0, label) else label


def _marked_span(text: str) -> tuple[int, int] | None:
    """Begin and end of the inside of the last box, else of the last ``<answer>``."""
    if spans := boxed_spans(text):
        return spans[-1]
    inside = last_answer(text)
    if inside is None:
        return None
    end = text.rindex("</answer>")
    return end - len(inside), end


def _clean(text: str) -> str:
    """Removes fonts and emphasis, and brings letters and spaces to their usual width."""
    plain = WRAPPERS.sub("", unicodedata.normalize("NFKC", text))
    return re.sub(r"[^\S\n]+", " ", plain).strip()


@functools.lru_cache(maxsize=1024)
def _forms(text: str) -> tuple[str, str, str]:
    """A text with single spaces, that in lower case, and that without spaces."""
    spaced = " ".join(_clean(text).split()).strip(" .\"'“”")
    return spaced, spaced.lower(), re.sub(r"[\s\\]", "", spaced.lower())


def _named(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text is, as a whole: its label alone or its text."""
    forms = _forms(text)
    start = WORD.findall(forms[0][:20])
    bare = "".join(word for word in start if word.lower() not in words.OPTION)
    label = bare.strip("()[]:,.").upper()
    if len(label) == 1 and label in (options or LETTERS + DIGITS):
        return label
    for i, form in enumerate(forms):
        same = [name for name, option in options.items() if _forms(option)[i] == form]
        if len(same) == 1 and form:
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
        texts = {label: _forms(option)[1] for label, option in options.items()}
        # A text that is itself a label, such as "C" for carbon, would hide that label.
        texts = {k: text for k, text in texts.items() if text.upper() not in self._labels}
        self._texts = dict(sorted(texts.items(), key=lambda item: len(item[1]), reverse=True))

    def word(self, i: int) -> str:
        """Word i in lower case, "" outside of the text."""
        return self._words[i] if 0 <= i < len(self._words) else ""

    def chosen(self) -> str | None:
        """The option of the last phrase, else of "B is correct", "option B", a line."""
        for reader in (self._announced, self._confirmed, self._mentioned):
            for i in reversed(range(len(self._words))):
                if label := reader(i):
                    return label
        return self._line()

    def read(self, i: int, *, said: bool) -> str | None:
        """The option at word i or after words that lead up to it.

        ``said``: "is" or a colon comes before, so that an option may be named in any way. Otherwise
        only a label that is set apart names one.
        """
        denied = False
        for at in range(i, i + LEAD_WORDS):
            if option := self._option_at(at, said=said):
                label, end = option
                if denied:
                    return self._corrected(end)
                if not said and words.DENIAL & {
                    *_until(words.CLAUSE_END, self._words[end : end + 5])
                }:
                    return None
                return SEVERAL if self.joined(end, label) else label
            word = self.word(at)
            number = not said and word.isdigit() and at > i and self.word(at - 1).isalpha()
            sign = len(word) == 1 and not word.isalnum() and word not in "\\^%<?"
            if not (word in words.LEAD or number or sign):
                return None
            said |= word in words.COPULA
            denied |= word in words.NEGATION
        return None

    def joined(self, i: int, label: str) -> bool:
        """True if the words from i on add another option to the one with that label."""
        after = i
        while self.word(after) in words.CLOSING | {".", "-"} and not self._text_at(after):
            after += 1
        if text := self._text_at(after):
            if text[0] != label:
                return True
            i = text[1]
        either = link = line = False
        for at in range(i, i + JOIN_WORDS):
            other = self._option_at(at, said=True) if link else None
            if other and other[0] != label:
                if either or self._added(other[1], line=line):
                    return True
                break
            word = self.word(at)
            if not other and word not in words.JOIN:
                break
            either |= word in words.OR
            link |= word in words.OR_AND
            line |= word == "\n"
        return self._listed(i, label)

    def _added(self, i: int, *, line: bool) -> bool:
        """True if the option before word i is chosen too: the sentence is no remark on it."""
        i = self._after(i, words.CLOSING - {":"})
        if self._denied(i):
            return False
        if self.word(i) in words.PLURAL or self.word(i + 1) == "also":
            return True
        ends = {"", "\n"} if line else words.CLAUSE_END - {":"} | words.OR_AND
        return self.word(i) in ends

    def _listed(self, i: int, label: str) -> bool:
        """True if the sentence lists another option with its text, as in "A: four, B: five"."""
        for at, word in enumerate(self._sentence(i), start=i + 1):
            at = self._after(at, words.OPTION | {"(", "["})
            option = self._label_at(at, said=True)
            if option and option[0] != label and self.word(at + 1) in {")", "]", ":"}:
                text = self._text_at(at + 2)
                listed = word in words.LISTING and self.word(at + 2) not in words.COPULA
                if (listed and not self._denied(at + 2)) or (text and text[0] == option[0]):
                    return True
        return False

    def _corrected(self, i: int) -> str | None:
        """The option after "but", where the one before it is denied: "not A but B"."""
        for at, word in enumerate(self._sentence(i), start=i):
            if word in words.BUT:
                return self.read(at + 1, said=True)
        return None

    def _after(self, i: int, skipped: Set[str], step: int = 1) -> int:
        """The first place from word i on whose word is none of those to be skipped."""
        while self.word(i) in skipped:
            i += step
        return i

    def _sentence(self, i: int) -> list[str]:
        return _until(words.SENTENCE_END, self._words[i : i + SENTENCE_WORDS])

    def _denied(self, i: int) -> bool:
        """True if the sentence from word i on calls something wrong."""
        return not words.DENIAL.isdisjoint(self._sentence(i))

    def _option_at(self, i: int, *, said: bool) -> tuple[str, int] | None:
        """The option that begins at word i, and the word after it; a text wins over a label."""
        text = self._text_at(i) if said else None
        return text or self._label_at(i, said=said)

    def _label_at(self, i: int, *, said: bool) -> tuple[str, int] | None:
        label, after = self.word(i).upper(), self.word(i + 1)
        if label not in self._labels or after in words.FORMULA:
            return None
        found = self._found[i]
        before = self._text[max(0, found.start() - 1) : found.start()]
        if label.isdigit() and before in {"-", "−", ".", "/"}:
            return None
        # "a planet" and "I think" name no option; other capital letters do before any word.
        capital = found[0].isupper() and label not in "AI"
        remark = after in words.REMARK or capital or label.isdigit()
        ends = after in words.END | words.BECAUSE | words.OR_AND or _is_chinese(after)
        return (label, i + 1) if ends or (said and remark) else None

    def _text_at(self, i: int) -> tuple[str, int] | None:
        """The longest option whose text begins at word i and ends a clause."""
        if i >= len(self._found):
            return None
        start = self._found[i].start()
        if self.word(i)[0].isdigit() and self._text[max(0, start - 1) : start] in {"-", "−"}:
            return None
        for label, text in self._texts.items():  # the longest first
            if not text or not self._lowered.startswith(text, start):
                continue
            end = start + len(text)
            after = bisect.bisect_left(self._found, end, lo=i, key=re.Match.start)
            whole = self._found[after - 1].end() == end and self.word(after) in words.WHOLE
            # "5-6" and "5/6" are computed from the number 5.
            computed = self.word(after) in {*"-–/"} and self.word(after + 1)[:1].isdigit()
            if whole and not computed:
                return label, after
        return None

    def _announced(self, i: int) -> str | None:
        """The option that follows "answer", "correct option", "richtig ist"."""
        word, before, after = self._words[i], self.word(i - 1), self.word(i + 1)
        if not (
            word in words.NOUNS
            or (word in words.VERBS and before in words.SPEAKERS)
            or (word in words.OPTION and {before, after} & words.CORRECT)
            or (word in words.CORRECT and after in words.COPULA)
        ):
            return None
        clause = self._clause_before(i, 8)
        if {*clause[:2]} & (words.INCORRECT | words.CONDITIONS) or {*clause[:1]} & {*"不非"}:
            return None
        for verb, no in itertools.pairwise(clause):
            if verb in words.DOUBTED and (no in words.NEGATION or no.endswith("n't")):
                return None
        return self.read(i + 1, said=False)

    def _confirmed(self, i: int) -> str | None:
        """The label in "B is correct", "Option B is the answer", "C ist richtig", "C项正确"."""
        label = self._found[i][0]
        if label not in self._labels:
            return None
        at, verb = i + 1, False
        while self.word(at) in words.CONFIRMING and at < i + 7:
            verb |= self.word(at) in (words.COPULA | words.OPTION) - {"\n"}
            at += 1
        # "正确" follows without a verb.
        verb |= _is_chinese(self.word(at))
        before = self.word(self._after(i - 1, words.OPTION | {"(", "[", "statement"}, step=-1))
        confirmed = self.word(at) in words.CORRECT | words.NOUNS
        if not (confirmed and verb) or before in words.CONDITIONS:
            return None
        return SEVERAL if before in words.EITHER else label

    def _mentioned(self, i: int) -> str | None:
        """The label in "this matches option B", unless the sentence sets it aside."""
        if self._words[i] not in words.OPTION:
            return None
        at = i + 1 + (self.word(i + 1) in {"(", "["})
        option = self._label_at(at, said=True)
        if not option or words.SET_ASIDE & {*self._clause_before(i, 6)} or self._denied(at):
            return None
        label, end = option
        return SEVERAL if self.joined(end, label) else label

    def _clause_before(self, i: int, limit: int) -> list[str]:
        """At most ``limit`` words of the clause before word i, backwards."""
        return _until(words.CLAUSE_END, self._words[max(0, i - limit) : i][::-1])

    def _line(self) -> str | None:
        """The option that the last line is, or the first where the last is none."""
        starts = [
            i
            for i, word in enumerate(self._words)
            if word != "\n" and self.word(i - 1) in {"", "\n"}
        ]
        for around in (starts[:-3:-1], starts[:2]):
            label, *beside = [self._line_at(start) for start in around] or [None]
            if label:
                # Options that are listed again, one a line, are no answer.
                return SEVERAL if any(beside) and beside != [label] else label
        return None

    def _line_at(self, start: int) -> str | None:
        text = self._text[self._found[start].start() :].partition("\n")[0]
        return self.read(start, said=False) or _named(text, self._texts)


def _until(ends: Set[str], clause: Sequence[str]) -> list[str]:
    return list(itertools.takewhile(lambda word: word not in ends, clause))


def _is_chinese(word: str) -> bool:
    return word > "\u2e7f"
