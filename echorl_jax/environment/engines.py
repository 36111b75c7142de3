"""Engines: what samples completions. ``rollout.engine`` takes another one by its import path."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from echorl_jax.config import Config, ConfigError
from echorl_jax.custom import load_custom
from echorl_jax.data import Prompt
from echorl_jax.errors import one_line
from echorl_jax.models import Decoder
from echorl_jax.rollout import (
    Finished,
    Progress,
    Resources,
    Sampling,
    make_request,
    sample_request,
)
from echorl_jax.rollout.host import FEWEST_SLOTS, choose_cpu_workers, worker_slots
from echorl_jax.rollout.prompt_images import prompt_images
from echorl_jax.rollout.request import slot_counts
from echorl_jax.types import Array, PyTree, Rollouts

# Rows of a prompt with a number that have different keys: row s of prompt n draws as n * 4096 + s.
MOST_SAMPLES = 4096


class Engine(Protocol):
    """Samples completions of a policy. A subclass inherits everything but ``sample``."""

    # Whether ``token_entropy`` is the entropy of the whole distribution (nats); if not, the trainer
    # computes it in one more forward pass.
    entropies: bool = True

    def sample(
        self,
        params: PyTree,
        prompts: Sequence[Prompt],
        key: Array,
        *,
        sampling: Sampling,
        finished: Finished | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Rollouts:
        """Samples ``sampling.group_size`` completions for each prompt.

        Args:
          params: the policy's parameters, in the trainer's layout.
          prompts: P prompts; a completion begins with its prompt's ``prefix``.
          sampling: lengths, temperature and the tokens that end a completion.
          finished: to be called with the numbers and tokens (EOS included) of rows that have ended,
            once for each: grading starts then. Other rows are graded after the call.
          progress: may be called now and then; an error that it raises has to end the call.

        Returns:
          NumPy arrays, rows in groups, the same on all processes. ``rollout_logprobs`` are those of
          the whole distribution at ``sampling.temperature``.
        """
        ...

    def warm_up(
        self, params: PyTree, prompts: Sequence[Prompt], key: Array, *, sampling: Sampling
    ) -> Rollouts:
        """Compiles or loads what later calls need, with prompts of an ordinary call."""
        return self.sample(params, prompts, key, sampling=sampling)

    def close(self) -> None:
        """Ends processes and connections, once, after the last call."""


@dataclasses.dataclass(frozen=True)
class JaxEngine(Engine):
    """The sampler of :mod:`echorl_jax.rollout`, on the devices that train."""

    model: Decoder
    resources: Resources
    # The longest prompt of any call; all calls are padded to it and share one program.
    prompt_tokens: int
    # Off: calls are padded to powers of two, and each compiles a prefill and a decode program.
    one_length: bool = True
    # Room for the image tokens of each prompt.
    image_tokens: int = 0

    def sample(
        self,
        params: PyTree,
        prompts: Sequence[Prompt],
        key: Array,
        *,
        sampling: Sampling,
        finished: Finished | None = None,
        progress: Callable[[Progress], None] | None = None,
        row_limits: Sequence[int] | None = None,
    ) -> Rollouts:
        """See :meth:`Engine.sample`; ``row_limits`` are N shorter limits of completions."""
        vocab_size, group = self.model.config.vocab_size, sampling.group_size
        sampling = sampling.checked(vocab_size)
        longest = self.prompt_tokens
        if not self.one_length:
            # From the prompts of this call alone, so that a resumed run has the same shapes.
            needed = max(len(prompt.ids) for prompt in prompts)
            longest = min(longest, 1 << (needed - 1).bit_length())
        ids, images = [prompt.ids for prompt in prompts], None
        if self.model.config.vision is not None:
            images = prompt_images(
                self.model,
                params,
                ids,
                [tuple(prompt.images) for prompt in prompts],
                size=len(prompts) * self.image_tokens,
                mesh=self.resources.mesh,
            )
        request = make_request(
            ids,
            sampling,
            vocab_size=vocab_size,
            row_limits=row_limits,
            row_ids=_row_ids(prompts, group),
            prefixes=[prompt.prefix for prompt in prompts for _ in range(group)],
            prompt_tokens=longest,
            images=images,
        )
        rollouts = sample_request(
            self.model,
            params,
            request,
            key,
            sampling=sampling,
            resources=self.resources,
            progress=progress,
            finished=finished,
        )
        return jax.device_get(rollouts)

    def warm_up(
        self, params: PyTree, prompts: Sequence[Prompt], key: Array, *, sampling: Sampling
    ) -> Rollouts:
        """Runs the program of every number of slots, with completions as short as that allows."""
        group, resources = sampling.group_size, self.resources
        slots = resources.slots or len(prompts) * group
        workers = choose_cpu_workers(
            self.model,
            prompts=len(prompts),
            slots=slots,
            max_new_tokens=sampling.max_new_tokens,
            kv_dtype=resources.kv_dtype,
            mesh=resources.mesh,
        )
        limits = np.empty((len(prompts), group), np.int64)
        for worker in range(workers):
            share = limits[worker::workers]  # the rows of this worker
            share[:] = np.reshape(
                slot_limits(
                    share.size,
                    -(-slots // workers),
                    shards=resources.shards,
                    longest=sampling.max_new_tokens,
                ),
                share.shape,
            )
        limits = limits.reshape(-1).tolist()
        return self.sample(params, prompts, key, sampling=sampling, row_limits=limits)


def slot_limits(rows: int, slots: int, *, shards: int, longest: int) -> list[int]:
    """Limits for N rows with which the sampler runs the program of every number of slots.

    Slot i first holds row i. At each level the slots that stay are the first of every shard, so
    their rows are the longest; by then the rows that wait have passed through the others.
    """
    slots = worker_slots(rows, slots, workers=1, shards=shards)
    sizes = slot_counts(slots, smallest=max(FEWEST_SLOTS, shards))
    waiting = 1 + -(-2 * (rows - slots) // slots) if rows > slots else 0
    limits = np.ones(rows, np.int64)
    place = np.arange(slots) % (slots // shards)
    for level, count in enumerate(sizes[1:], 1):
        limits[:slots][place < count // shards] = 1 + waiting + level
    return np.minimum(limits, longest).tolist()


def make_engine(
    config: Config,
    *,
    model: Decoder,
    tokenizer: Any,
    mesh: Mesh,
    slots: int,
    page_tokens: int = 0,
    image_tokens: int = 0,
) -> Engine:
    """The engine of a run: our sampler, or what ``config.rollout.engine`` names.

    A custom engine is made by calling ``package.module:factory`` with the keyword arguments of this
    function but ``slots``, ``page_tokens`` and ``image_tokens``.

    Raises:
      ConfigError: the import path does not work, or the factory fails; the line says how.
    """
    path = config.rollout.engine
    if path:
        return _custom_engine(path, config=config, model=model, tokenizer=tokenizer, mesh=mesh)
    return JaxEngine(
        model,
        Resources(
            slots=slots,
            page_tokens=page_tokens,
            expected_tokens=config.rollout.expected_tokens,
            kv_dtype=config.rollout.kv_dtype,
            mesh=mesh,
        ),
        prompt_tokens=config.data.max_prompt_tokens,
        one_length=config.optim.compile_ahead,
        image_tokens=image_tokens,
    )


def _custom_engine(path: str, **settings: Any) -> Engine:
    factory = load_custom(path, "config.rollout.engine =")
    try:
        engine = factory(**settings)
    # The factory is the user's program: anything can go wrong in it.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"config.rollout.engine = {path!r}: {one_line(error)}") from error
    members = ("sample", "warm_up", "close", "entropies")
    if missing := [name for name in members if not hasattr(engine, name)]:
        raise ConfigError(
            f"config.rollout.engine = {path!r}: the engine has no {', '.join(missing)}; a subclass "
            "of echorl_jax.environment.Engine inherits all but sample"
        )
    return engine


def _row_ids(prompts: Sequence[Prompt], group_size: int) -> Sequence[int] | None:
    """The numbers of rows in their PRNG keys; None takes their places in the call."""
    numbers = [prompt.number for prompt in prompts]
    if None in numbers:
        return None
    return [n * MOST_SAMPLES + s for n in numbers if n is not None for s in range(group_size)]
