"""Progress of an evaluation on a terminal or in a log."""

from echorl_jax.evaluation.bar import Bar
from echorl_jax.rollout import Progress


class EvaluationProgress:
    """Counts attempts and shows the sampler's speed and the share of its slots that are busy."""

    def __init__(self, total: int, *, done: int) -> None:
        self._total, self._done, self._first = total, done, done
        self._bar = Bar("attempts", total, done=done)
        self._sampler = ""
        self._source = ""
        self._finished_tokens, self._finished_seconds = 0, 0.0
        self._last: Progress | None = None

    def __enter__(self) -> "EvaluationProgress":
        if self._done:
            self._bar.say(f"{self._done} of {self._total} attempts are there already")
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()
        self._settle()
        speed = self._finished_tokens / max(self._finished_seconds, 1e-9)
        self._bar.say(
            f"{self._done - self._first} attempts, {self._finished_tokens:,} tokens "
            f"at {speed:,.0f} tokens/s"
        )

    def look(self, now: Progress) -> None:
        """Shows how far the sampler's present call is."""
        self._last = now
        self._sampler = (
            f"{now.rows_done} of {now.rows} rows of this call, "
            f"{now.tokens_per_second:,.0f} tokens/s, slots {now.occupancy:.0%} busy"
        )
        self._show()
        if now.rows_done == now.rows:
            self._settle()

    def attempt(self, source: str) -> None:
        """One more is graded and written."""
        self._done += 1
        self._source = source
        self._show()

    def _settle(self) -> None:
        if self._last is not None:
            self._finished_tokens += self._last.tokens
            self._finished_seconds += self._last.seconds
            self._last = None

    def _show(self) -> None:
        text = f"{self._source}  {self._sampler}".strip()
        line = f"{self._done} of {self._total} attempts  {text}"
        self._bar.show(self._done, line, beside=text)
