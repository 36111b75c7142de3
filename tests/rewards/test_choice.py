"""Tests verdicts on multiple choice, and the grader that `auto` takes for each row."""

import json
from pathlib import Path

import pytest

from echorl_jax.data import load_rows
from echorl_jax.rewards import grading_failed, load_grader
from echorl_jax.rewards.choice import options_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="no public data files")
BUGS = SHARED.parent / "bugs"
needs_bugs = pytest.mark.skipif(not BUGS.is_dir(), reason="no collected faults")
grade = load_grader("choice")
OPTIONS = ["a planet", "Days get shorter.", "$5$ N", "(a) 1, (b) 2"]


def row(gold="B", options=OPTIONS):
    return {"options": options, "reward_model": {"ground_truth": gold}}


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B)}}",
        r"\boxed{b}",
        r"\boxed{B) Days get shorter.}",
        r"\boxed{\text{Days get shorter}}",
        r"\boxed{A} no, \boxed{Option B}",
        "<think> A </think> The correct answer is (B), since the spin is faster.",
        "Answer: B",
        "The answer is **B**.",
        "The answer is: $B$",
        "<answer> B </answer>",
        "It must be this one:\nB.",
        "(B)",
        "Is the answer A? No, the answer is option B",
        "The answer is (b).",
        "The answer is B, since option (a) fails.",
        "The answer is B. It could not be option (c)",
        "Is the answer A? No, the answer is (b)",
        "The answer is I guess the second\nB",
    ],
)
def test_the_right_option_is_accepted(response):
    assert grade(response, row()).correct


@pytest.mark.parametrize("response", ["The answer is 5.", "I think the answer is 5.\n\nB"])
def test_an_option_that_is_a_digit_is_named_by_its_text(response):
    assert grade(response, row("B", ["4", "5", "6"])).correct


@pytest.mark.parametrize(
    "response",
    ["The answer is 2.5", "The answer is 2/3", "answer: 2,500", r"The answer is 2\sqrt{3}"]
    + ["The answer is 2 + 3 = 5", "The answer is 2*3", "the answer is $2^3$", "option 2 % 5"],
)
def test_the_first_digit_of_a_number_names_no_option(response):
    assert not grade(response, row("B", ["1", "2", "3", "4"])).correct


@pytest.mark.parametrize("response", ["**Answer: 2**", "The answer is 2.", "the answer is $2$, so"])
def test_a_digit_that_is_the_whole_answer_names_an_option(response):
    assert grade(response, row("B", ["1", "2", "3", "4"])).correct


def test_options_may_have_their_labels():
    labelled = row("b", {"a": "three", "b": "four"})
    assert grade("The answer is (b).", labelled).correct
    assert grade(r"\boxed{four}", labelled).correct
    assert not grade(r"\boxed{three}", labelled).correct


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{A}",
        r"\boxed{A, B}",
        r"\boxed{AB}",
        r"\boxed{E}",
        r"\boxed{B or C}",
        "",
        "A planet rotates faster. Because of that",
        "The answer is Bob",
        "Days",
        "B is wrong, so the answer is C",
        r"<think> \boxed{B} </think> \boxed{C}",
        "\x00" * 1000,
        "(" * 1_000_000,
    ],
)
def test_other_responses_are_refused(response):
    assert not grade(response, row()).correct


def test_text_that_contains_labels_is_matched_as_a_whole():
    assert grade(r"\boxed{(a) 1, (b) 2}", row("D")).correct


def test_the_ground_truth_may_be_an_options_text():
    assert grade(r"\boxed{C}", row("5 N")).correct


def test_options_are_read_from_the_prompt():
    text = "Which?\n\nA) one\nB) two\n(C) three\n"
    assert options_of({"prompt": [{"content": text}]}) == {"A": "one", "B": "two", "C": "three"}
    assert options_of({"prompt": [{"content": "Which?\n1) one\n2) two"}]}) == {
        "1": "one",
        "2": "two",
    }
    assert options_of({"prompt": [{"content": "B) alone\nC) or not from the start"}]}) == {}


def test_a_ground_truth_that_is_no_option_is_an_error():
    reason = grade("A", row("seven")).reason
    assert grading_failed(reason) and "neither a letter nor one of the options" in reason


def test_auto_tells_rows_apart():
    auto = load_grader("auto")
    countdown = {"reward_model": {"ground_truth": {"numbers": [2, 3], "target": 6}}}
    mathematics = {"prompt": [{"content": "?"}], "reward_model": {"ground_truth": "1/2"}}
    assert auto("2*3=6", countdown).reason == "reaches 6"
    assert auto("(B)", row()).reason == "chose B"
    assert auto(r"\boxed{0.5}", mathematics).reason == "equals the answer"


@needs_files
@pytest.mark.parametrize("name", ["luffy_eval_arc_c_600.parquet", "mmlu_pro_600.parquet"])
def test_public_files_by_letter_and_by_text(name):
    rows = load_rows(str(SHARED / name))
    for each in rows:
        gold = each["reward_model"]["ground_truth"]
        options = options_of(each)
        other = next(label for label in options if label != gold)
        assert grade(rf"\boxed{{{gold}}}", each).correct
        assert grade(f"So the answer is ({gold}).", each).correct
        assert grade(rf"\boxed{{\text{{{options[gold]}}}}}", each).correct
        assert not grade(rf"\boxed{{{other}}}", each).correct


NUMBERS = ["four", "five", "six", "seven"]
# By what they show; all choose B.
RIGHT = {
    "form": ["B", "b", "**B**", "*B*", "__B__", "`B`", "(B", "B)", "B) five", "(B) five", "B: five"]
    + [
        "five",
        "Five.",
        "<b>B</b>",
        "> B",
        "- B",
        "So, B.",
        "Therefore B",
        "Ｂ",
        "（Ｂ）",
        "Option B.",
    ],
    "heading": [
        "### Answer: B",
        "## Final Answer\n\n**B) five**",
        "Final answer: [B]",
        "ANSWER：Ｂ",
    ]
    + ["Answer - B", "ANSWER B", "The answer is => B", "The answer is:\n\nB", "Correct answer: B"],
    "box": [
        r"$\boxed{\textbf{(B)}\ 5}$",
        r"\boxed{\text{B) five}}",
        r"\boxed{b}",
        r"\boxed{B (five)}",
    ]
    + [r"\boxed{five (B)}", r"\boxed{A} is wrong, so \boxed{B}", r"\boxed{B}. Option A is wrong."],
    "tag": ["<answer>b</answer>", "<answer>five</answer>", "<answer>\nB\n</answer>"]
    + ["<answer>The answer is B</answer>", r"<answer>\boxed{B}</answer>"],
    "phrase": [
        "The answer must be (B).",
        "The right choice is B.",
        "I would pick B.",
        "I choose (B)",
    ]
    + ["The answer to question 3 is B.", "The answer is most likely B.", 'The answer is "five".']
    + ["The answer is five, because 2 + 3 = 5.", "B is the answer.", "(B) is the right choice."]
    + ["Option A is incorrect. Option B is correct. Option C is incorrect.", "Wait, B."],
    "remark": ["The answer is B, because C and D are too big.", "The answer is B, and A is wrong."]
    + ["The answer is B.\nA is too small.\nC is too big.", "The answer is B. A: too small."]
    + ["The answer is B.\n\nA) four: too small\nC) six: too big", "The answer is B (A is wrong)."]
    + ["The answer is B; A, C and D are wrong.", "The answer is B rather than A."]
    + ["The correct answer is (B). The others fail: (A) is too small, (C) is too large."]
    + ["The answer is B, as A and C do not fit.", "A does not fit so the answer is B"],
    "denial": [
        "The answer is not A but B.",
        "The answer isn't A, it's B.",
        "The answer is B, not C.",
    ]
    + ["I am not sure, but I think the answer is B.", "Between A and B, the answer is B."],
    "explained": ["B\n\nExplanation: five is 2 + 3.", "B because 2 + 3 is five.", "I'd say B."]
    + ["We get five, which is option B.", "Only option B works.", "The correct statement is B."],
    "German": ["Die Antwort lautet: (B)", "Antwort B ist richtig.", "Richtig ist B.", "Antwort: B"]
    + ["Die Antwort ist nicht A, sondern B.", "Die Antwort ist also B, weil A zu klein ist."],
    "Chinese": [
        "答案是B",
        "答案为（B）。",
        "正确的答案是 B",
        "故选：B",
        "应该选B",
        "B是正确答案",
        "选项B正确",
    ]
    + ["答案是B，因为A太小", "答案是B，不是C", "答案是 Ｂ"],
    "Spanish": ["La respuesta es la opción B.", "La opción B es correcta.", "Respuesta: B"]
    + ["Por lo tanto, la respuesta es (B).", "La respuesta es B porque A es pequeño."],
    "French": ["La bonne réponse est la B.", "Réponse : B", "La réponse est donc l'option B."]
    + ["La réponse est B car A est trop petit.", "L'option B est correcte."],
}
# No option is chosen, whichever is right.
NONE = {
    "several": ["The answer is both A and B.", "The answer is A; B", "The answer is A (or B)."]
    + ["The answer is A or B depending on the reading.", "The answer is A–D.", "Answer:\nA\nB"]
    + ["The answer is A & B, C.", "A and B", "(A) (B)", "Options A and B", "A\nor B", "AB"]
    + ["The answer is B, or alternatively C.", "The answer is A: four, B: five."],
    "several clauses": ["The answer could be A, or it could be B.", "A) four\nB) five\nC) six"]
    + ["The answer is A, but it could also be B.", "A) four B) five C) six", "A or B is correct."],
    "several texts": ["The answer is five or six", "The answer is five or C", r"\boxed{five, six}"]
    + [r"\boxed{B) six}", r"\boxed{five (A)}", "The answer is five / six"],
    "several marks": [r"$\boxed{A}$ or $\boxed{B}$", r"\boxed{A}, \boxed{B}", r"\boxed{A} or B"]
    + ["<answer>A</answer> or <answer>B</answer>", "<answer>A\nB\nC\nD</answer>"]
    + [r"\boxed{B\text{ or }C}", r"\boxed{\{A, B\}}", r"\boxed{A-D}", r"\boxed{B;C}"],
    "denied": ["The answer isn't B.", "The answer cannot be B.", "The answer is neither A nor B."]
    + ["I do not think the answer is B.", "The wrong answer is B", "Option B is not correct."]
    + [
        r"\boxed{\text{not B}}",
        r"\boxed{\neg B}",
        "Neither A nor B is correct.",
        "Is the answer B?",
    ],
    "other words": [
        "A planet moves",
        "B vitamins are good",
        "The answer is fifty-five",
        "fifty-five",
    ]
    + ["The answer is five hundred", "I have five apples", "Because", r"\boxed{}", r"\boxed{?}"]
    + ["The answer depends on B", "The answer is unknown."],
    "German": ["Die Antwort ist nicht B.", "Die Antwort ist A oder B."],
    "Chinese": ["答案不是B", "答案是A或B", "答案：A、B", "不选B", "B不正确", "A和B都正确"],
    "Spanish": ["La respuesta no es B.", "La respuesta es A o B."],
    "French": ["La réponse n'est pas B.", "La réponse est A et B."],
}


def cases(table):
    return [(kind, text) for kind, texts in table.items() for text in texts]


def choices(response, options):
    """The golds for which the response is right."""
    labels = options if isinstance(options, dict) else "ABCDEFGHIJ"[: len(options)]
    return "".join(gold for gold in labels if grade(response, row(gold, options)).correct)


@pytest.mark.parametrize(("kind", "response"), cases(RIGHT))
def test_an_option_is_read_in_many_forms(kind, response):
    assert choices(response, NUMBERS) == "B"


@pytest.mark.parametrize(("kind", "response"), cases(NONE))
def test_an_answer_that_settles_on_no_option_is_wrong_for_every_gold(kind, response):
    assert choices(response, NUMBERS) == ""


FIGURES = ["-5", "5", "0.5", r"$\frac{1}{3}$", "5 m"]
PHRASES = ["x is 3", "None of the above", "Both A and B", "Not enough information"]
CITIES = ["Paris", "New York", "New York City"]


@pytest.mark.parametrize(
    ("options", "response", "chosen"),
    [
        (FIGURES, "The answer is -5", "A"),
        (FIGURES, r"\boxed{A) -5}", "A"),
        (FIGURES, "The answer is 5", "B"),
        (FIGURES, "The answer is 5/6", ""),
        (FIGURES, "The answer is 5 + 2 = 7", ""),
        (FIGURES, "The answer is 5.5", ""),
        (FIGURES, r"The answer is $\frac{1}{3}$.", "D"),
        (FIGURES, r"\boxed{5\text{ m}}", "E"),
        (PHRASES, "The answer is none of the above", "B"),
        (PHRASES, "The answer is C) Both A and B", "C"),
        (PHRASES, "The answer is both A and B.", "C"),
        (PHRASES, "The answer is not enough information.", "D"),
        (PHRASES, "The answer is A or B", ""),
        (CITIES, "The answer is New York City.", "C"),
        (CITIES, "The answer is **New York**, since it is bigger.", "B"),
        (CITIES, "The answer is not Paris but New York.", "B"),
        (CITIES, "The answer is Paris Hilton", ""),
        (["TT", "Tt", "tt"], r"\boxed{Tt}", "B"),
        (["C", "O", "N"], "The answer is (C).", "C"),
        (["Yes", "No"], "Answer: No, because it sinks.", "B"),
        (["Yes", "No"], "The answer is not B", ""),
        ({"1": "red", "2": "green", "3": "2"}, "The answer to question 3 is 2", "2"),
        ({"1": "red", "2": "green", "3": "2"}, "The answer is green.", "2"),
        ({"1": "red", "2": "green", "3": "2"}, "The answer is 2 or 3", ""),
        ({"1": "red", "2": "green", "3": "2"}, "2 + 1 = 3 colours", ""),
        ([f"case {n}" for n in range(9)], "The answer is I guess unclear", ""),
        ([f"case {n}" for n in range(9)], "I think the answer is I.", "I"),
    ],
)
def test_options_that_are_numbers_phrases_or_names(options, response, chosen):
    assert choices(response, options) == chosen


STATEMENTS = "Consider:\n1. Iron floats.\n2. Ice floats.\n3. Lead floats.\nHow many are true?"


@pytest.mark.parametrize("name", ["auto", "math"])
@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("1", r"\boxed{\frac{3}{3}}", True),
        ("1", "The answer is 1.", True),
        ("$2$", r"\boxed{2}", True),
        ("2", r"\boxed{\text{Ice floats.}}", False),
        ("2", r"\boxed{1}", False),
    ],
)
def test_numbered_statements_are_no_options_of_a_number(name, gold, response, right):
    asked = {"prompt": [{"content": STATEMENTS}], "reward_model": {"ground_truth": gold}}
    assert load_grader(name)(response, asked).correct == right


def test_a_prompt_may_be_plain_text():
    asked = {"prompt": "Which?\nA) one\nB) two", "reward_model": {"ground_truth": "B"}}
    assert load_grader("auto")(r"\boxed{two}", asked).reason == "chose B"


@needs_bugs
def test_reported_responses_have_the_right_verdict():
    lines = (BUGS / "choice_answers.jsonl").read_text().splitlines()
    for each in map(json.loads, lines):
        asked = {"options": each["options"], "reward_model": {"ground_truth": each["answer"]}}
        assert grade(each["response"], asked).correct == each["expected"], each
    lines = (BUGS / "grader_traps.jsonl").read_text().splitlines()
    traps = [each for each in map(json.loads, lines) if each["grader"] != "math"]
    assert len(traps) > 50
    for each in traps:
        verdict = load_grader(each["grader"])(each["response"], each["row"])
        assert verdict.correct == each["expected"], each
