"""The table of objectives: advantages, token loss, aggregation and the settings of each."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from echorl_jax.choices import Aggregation, Baseline, KLEstimator
from echorl_jax.core import advantages as adv
from echorl_jax.core import losses, selection
from echorl_jax.errors import nearest
from echorl_jax.types import Array, TrainBatch


def from_rewards(estimator: Callable[..., Array], **settings: Any) -> Callable[..., Array]:
    """An objective's advantages from an estimator of rewards and groups alone."""

    def advantages(
        rewards: Array, group: Array, *, num_groups: int, lengths: Array, on_policy: Array
    ) -> Array:
        del lengths, on_policy
        return estimator(rewards, group, num_groups=num_groups, **settings)

    return advantages


def from_lengths(estimator: Callable[..., Array], **settings: Any) -> Callable[..., Array]:
    """An objective's advantages from an estimator that weighs rollouts by their length."""

    def advantages(
        rewards: Array, group: Array, *, num_groups: int, lengths: Array, on_policy: Array
    ) -> Array:
        del on_policy
        return estimator(rewards, group, lengths, num_groups=num_groups, **settings)

    return advantages


def alike(rewards: Array, group: Array, *, num_groups: int) -> Array:
    """Ones: every row counts alike, whatever its reward."""
    del group, num_groups
    return jnp.ones_like(rewards)


def from_groups(*, divide_by_std: bool) -> Callable[..., Array]:
    """:func:`group_advantages` over the rows ``[N]`` that make the baseline, all unless given."""

    def advantages(
        rewards: Array,
        group: Array,
        *,
        num_groups: int,
        lengths: Array,
        on_policy: Array,
        baseline: Array | None = None,
    ) -> Array:
        del lengths, on_policy
        return adv.group_advantages(
            rewards, group, num_groups=num_groups, on_policy=baseline, divide_by_std=divide_by_std
        )

    return advantages


normalised = from_groups(divide_by_std=True)
centred = from_groups(divide_by_std=False)


def token_ratio(logprobs: Array, batch: TrainBatch) -> Array:
    """:func:`token_log_ratio` of a batch."""
    return losses.token_log_ratio(logprobs, batch.old_logprobs)


def sequence_ratio(logprobs: Array, batch: TrainBatch) -> Array:
    """:func:`sequence_log_ratio` of a batch."""
    return losses.sequence_log_ratio(logprobs, batch.old_logprobs, batch.loss_mask)


def clipped_loss(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss` with the objective's ratio and bounds."""
    return losses.policy_loss(
        objective.log_ratio(logprobs, batch),
        batch.advantages,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        dual_clip=objective.dual_clip,
    )


def cispo(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`cispo_loss` with the objective's bounds."""
    return losses.cispo_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
    )


def luffy(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss` on rows the policy wrote, :func:`shaped_policy_loss` on the expert's."""
    own = clipped_loss(logprobs, batch, objective)
    expert = losses.shaped_policy_loss(logprobs, batch.advantages, shaping=objective.shaping)
    return jnp.where(batch.on_policy[:, None], own, expert)


def kl_cov(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`kl_cov_loss` on ``batch.selected``."""
    return losses.kl_cov_loss(
        objective.log_ratio(logprobs, batch),
        batch.advantages,
        _selected(batch),
        kl_cov_coef=objective.kl_cov_coef,
    )


def clip_cov(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """:func:`policy_loss`, without the tokens in ``batch.selected``."""
    # A product, not a choice: a NaN on a selected token still shows.
    kept = jnp.where(_selected(batch), 0.0, 1.0)
    return kept * clipped_loss(logprobs, batch, objective)


def nll(logprobs: Array, batch: TrainBatch, objective: "Objective") -> Array:
    """Negative log-likelihood."""
    del batch, objective
    return -logprobs


def select_kl_cov(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    loss_mask: Array,
    key: Array,
    objective: "Objective",
) -> Array:
    """:func:`kl_cov_selection` in the form that an objective calls."""
    del old_logprobs, key
    return selection.kl_cov_selection(
        logprobs, advantages, loss_mask, fraction=objective.selected_fraction
    )


def select_clip_cov(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    loss_mask: Array,
    key: Array,
    objective: "Objective",
) -> Array:
    """:func:`clip_cov_selection` in the form that an objective calls."""
    return selection.clip_cov_selection(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        key,
        fraction=objective.selected_fraction,
        low=objective.covariance_low,
        high=objective.covariance_high,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
    )


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective: small pure functions and their settings; hashable, so static in jit.

    EchoRL is not an objective: its loss is added to any of these.
    """

    # (rewards [N], group [N], *, num_groups, lengths [N], on_policy [N]) -> [N]
    advantages: Callable[..., Array] = normalised
    # Rows that a group's mean is of: all, or those that the policy wrote (LUFFY's option), which
    # the advantages then take as `baseline` [N].
    baseline: Baseline = "all"
    # (logprobs [B, T], batch, objective) -> [B, T]
    token_loss: Callable[[Array, TrainBatch, "Objective"], Array] = clipped_loss
    # How token losses become one number.
    aggregation: Aggregation = "token-mean"
    # Clip range of the ratio; None is no bound.
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    # Bound c on the loss where the advantage is negative: -A c.
    dual_clip: float | None = None
    # Weight and estimator of the KL term against the reference policy; 0 needs no reference.
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    # Weight of the entropy bonus.
    entropy_coef: float = 0.0
    # Weight of the negative log-likelihood of hint tokens.
    nll_coef: float = 0.0
    # Cap C of the truncated importance weights; None applies none.
    tis_cap: float | None = None
    # (logprobs [B, T], batch) -> [B, T], the log-ratio that is clipped and whose clipping is
    # reported.
    log_ratio: Callable[[Array, TrainBatch], Array] = token_ratio
    # Picks batch.selected from the whole batch; None where the loss does not use it.
    select_tokens: Callable[..., Array] | None = None
    # The token loss is 0 where the advantage is: such rows need no computing. False for a loss of
    # one's own that is not.
    zero_without_advantage: bool = True
    # Share of tokens to pick, bounds of their covariance, weight of KL-Cov's penalty.
    selected_fraction: float = 0.0002
    covariance_low: float = 1.0
    covariance_high: float = 5.0
    kl_cov_coef: float = 1.0
    # gamma of LUFFY's policy shaping.
    shaping: float = 0.1
    # Expert trajectories placed in each group.
    expert_rows: int = 0
    # Leave groups with a single outcome out of the policy loss and sample others for them.
    dynamic_sampling: bool = False
    # Slope of the overlong punishment, as a share of the completion limit; 0 punishes nothing.
    overlong_buffer: float = 0.0
    # Append hints to prompts (UFT).
    hints: bool = False
    # Learn from demonstrations alone: nothing is sampled.
    supervised: bool = False

    def __post_init__(self) -> None:
        takes = inspect.signature(self.advantages).parameters
        if self.baseline != "all" and "baseline" not in takes:
            raise ValueError(
                f"baseline = {self.baseline!r}: this objective's advantages have no such choice"
            )


_GRPO = Objective(
    aggregation="seq-mean-token-mean", epsilon_low=0.2, epsilon_high=0.2, kl_coef=0.001
)
_COV = dataclasses.replace(_GRPO, aggregation="token-mean", kl_coef=0.0)

OBJECTIVES: dict[str, Objective] = {
    "grpo": _GRPO,
    "dr_grpo": dataclasses.replace(
        _GRPO, advantages=centred, aggregation="seq-mean-token-sum-norm", kl_coef=0.0
    ),
    "dapo": Objective(
        epsilon_low=0.2,
        epsilon_high=0.28,
        dual_clip=10.0,
        dynamic_sampling=True,
        overlong_buffer=0.2,
    ),
    "gspo": Objective(
        aggregation="seq-mean-token-mean",
        log_ratio=sequence_ratio,
        epsilon_low=3e-4,
        epsilon_high=4e-4,
    ),
    "cispo": Objective(token_loss=cispo, epsilon_low=1.0, epsilon_high=0.28),
    "rloo": Objective(advantages=from_rewards(adv.rloo_advantages)),
    "reinforce_pp": Objective(
        advantages=from_lengths(adv.whitened_advantages), epsilon_low=0.2, epsilon_high=0.2
    ),
    "reinforce_pp_baseline": Objective(
        advantages=from_lengths(adv.whitened_advantages, group_baseline=True),
        epsilon_low=0.2,
        epsilon_high=0.2,
    ),
    "opo": Objective(advantages=from_lengths(adv.opo_advantages)),
    "luffy": Objective(
        advantages=centred,
        token_loss=luffy,
        aggregation="seq-mean-token-sum-norm",
        expert_rows=1,
    ),
    "uft": dataclasses.replace(_GRPO, nll_coef=0.001, hints=True),
    "sft": Objective(advantages=from_rewards(alike), token_loss=nll, supervised=True),
    "kl_cov": dataclasses.replace(
        _COV, token_loss=kl_cov, epsilon_low=None, epsilon_high=None, select_tokens=select_kl_cov
    ),
    "clip_cov": dataclasses.replace(_COV, token_loss=clip_cov, select_tokens=select_clip_cov),
}


def load_objective(name: str, **settings: Any) -> Objective:
    """An objective by name or import path, with some of its settings changed.

    Args:
      name: a key of ``OBJECTIVES``, or ``package.module:attribute`` that holds an
        :class:`Objective`.
      **settings: fields to replace; None leaves the objective's own.

    Returns:
      The objective.

    Raises:
      ValueError: if there is no such objective or setting (the message names the nearest), or a
        setting that it cannot serve.

    >>> load_objective("dapo", epsilon_high=0.3, aggregation=None).epsilon_high
    0.3
    """
    objective = _imported(name) if ":" in name else OBJECTIVES.get(name)
    if not isinstance(objective, Objective):
        raise ValueError(f"no objective {name!r}{_hint(name, OBJECTIVES)}")
    fields = [field.name for field in dataclasses.fields(objective)]
    for setting in settings:
        if setting not in fields:
            raise ValueError(f"an objective has no setting {setting!r}{_hint(setting, fields)}")
    changes = {key: value for key, value in settings.items() if value is not None}
    return dataclasses.replace(objective, **changes)


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return vars(importlib.import_module(module)).get(attribute)
    except ModuleNotFoundError as error:
        raise ValueError(f"no module {error.name!r} for the objective {path!r}") from error
    # The module is the user's program: anything can go wrong in it.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"cannot import {module!r} for the objective {path!r}: {error!r}"
        ) from error


def _hint(name: str, known: Any) -> str:
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else f"; known are {', '.join(known)}"


def _selected(batch: TrainBatch) -> Array:
    if batch.selected is None:
        raise ValueError("this objective needs batch.selected, from its select_tokens")
    return batch.selected
