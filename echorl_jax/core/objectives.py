"""The table of objectives, their advantages, and objectives from outside the package."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from echorl_jax.choices import ImportanceWeight
from echorl_jax.core import advantages as adv
from echorl_jax.core import pieces, selection
from echorl_jax.core.pieces import Objective
from echorl_jax.custom import load_custom
from echorl_jax.errors import nearest
from echorl_jax.types import Array, StepData, TrainBatch

# Settings that do nothing while another one has its default.
_NEEDS = {
    "importance_low": "importance_mask",
    "importance_high": "importance_mask",
    "entropy_kappa": "entropy_alpha",
    "kl_estimator": "kl_coef",
}
# Settings that only the functions of some objectives read.
_PARTS = {
    *("baseline", "divide_by_std", "std_of", "virtual_rewards", "success_weight"),
    *("failure_weight", "zero_variance_alpha", "zero_variance_failures", "tau_positive"),
    *("tau_negative", "trust_bound", "trust_divergence", "ratio_cap", "hold_coef", "hold_delta"),
    *("second_moment", "order_statistic", "order_samples", "order_amount", "shaping"),
    *("selected_fraction", "covariance_low", "covariance_high", "kl_cov_coef"),
    *("epsilon_low", "epsilon_high", "dual_clip", "normalise_each"),
}

_GRPO = Objective(
    aggregation="seq-mean-token-mean", epsilon_low=0.2, epsilon_high=0.2, kl_coef=0.001
)
_MEAN = dataclasses.replace(_GRPO, kl_coef=0.0)
_COV = dataclasses.replace(_MEAN, aggregation="token-mean")
_VERDICT = dataclasses.replace(_COV, advantages=pieces.by_verdict, count_zero_advantage=False)

OBJECTIVES: dict[str, Objective] = {
    "grpo": _GRPO,
    "dr_grpo": dataclasses.replace(
        _MEAN, divide_by_std=False, aggregation="seq-mean-token-sum-norm"
    ),
    "dapo": Objective(
        epsilon_low=0.2,
        epsilon_high=0.28,
        dual_clip=10.0,
        dynamic_sampling=True,
        overlong_buffer=0.2,
    ),
    "gspo": dataclasses.replace(
        _MEAN, log_ratio=pieces.sequence_ratio, epsilon_low=3e-4, epsilon_high=4e-4
    ),
    "cispo": Objective(token_loss=pieces.cispo, epsilon_low=1.0, epsilon_high=0.28),
    "rloo": Objective(advantages=pieces.leave_one_out),
    "reinforce_pp": Objective(advantages=pieces.whitened, epsilon_low=0.2, epsilon_high=0.2),
    "reinforce_pp_baseline": Objective(
        advantages=pieces.whitened_by_group, epsilon_low=0.2, epsilon_high=0.2
    ),
    "opo": Objective(advantages=pieces.by_length),
    "luffy": Objective(
        divide_by_std=False,
        token_loss=pieces.luffy,
        aggregation="seq-mean-token-sum-norm",
        expert_rows=1,
    ),
    "uft": dataclasses.replace(_GRPO, nll_coef=0.001, hints=True),
    "sft": Objective(advantages=pieces.alike, token_loss=pieces.nll, supervised=True),
    "kl_cov": dataclasses.replace(
        _COV,
        token_loss=pieces.kl_cov,
        epsilon_low=None,
        epsilon_high=None,
        select_tokens=pieces.select_kl_cov,
    ),
    "clip_cov": dataclasses.replace(
        _COV, token_loss=pieces.clip_cov, select_tokens=pieces.select_clip_cov
    ),
    # Repairs of groups with one outcome, EchoRL's rivals.
    "rl_zvp": dataclasses.replace(_MEAN, advantages=pieces.zero_variance),
    "avspo": dataclasses.replace(_MEAN, virtual_rewards=1),
    "mcpo": dataclasses.replace(
        _MEAN,
        advantages=pieces.mastery,
        token_loss=pieces.mcpo,
        epsilon_high=0.28,
        acts_on_solved=True,
    ),
    "psr": dataclasses.replace(_VERDICT, failure_weight=0.0),
    "nsr": dataclasses.replace(_VERDICT, success_weight=0.0),
    "w_reinforce": dataclasses.replace(_VERDICT, success_weight=0.1),
    # Other weights of prompts and rows.
    "maxrl": Objective(advantages=pieces.by_mean),
    "lite_ppo": dataclasses.replace(_COV, std_of="batch"),
    "curverl": Objective(advantages=pieces.by_curve, rate_steps=10),
    "ordergrad": Objective(advantages=pieces.by_order),
    "scale_rl": Objective(
        std_of="batch_centred",
        token_loss=pieces.cispo,
        aggregation="prompt-mean",
        epsilon_high=4.0,
        count_zero_advantage=False,
    ),
    # Other trust regions.
    "sapo": dataclasses.replace(_MEAN, token_loss=pieces.sapo, epsilon_low=None, epsilon_high=None),
    "gmpo": dataclasses.replace(_MEAN, token_loss=pieces.gmpo, epsilon_low=0.4, epsilon_high=0.4),
    "luspo": dataclasses.replace(
        _MEAN,
        log_ratio=pieces.sequence_ratio,
        aggregation="seq-mean-token-sum",
        epsilon_low=2e-3,
        epsilon_high=2.5e-3,
    ),
    "dppo_tv": Objective(token_loss=pieces.dppo),
    "dppo_kl": Objective(token_loss=pieces.dppo, trust_divergence="kl", trust_bound=0.05),
    "vespo": Objective(token_loss=pieces.vespo),
    "m2po": Objective(token_loss=pieces.m2po, select_tokens=pieces.select_m2po),
    "topr": Objective(advantages=pieces.by_verdict, token_loss=pieces.topr),
}


def compute_advantages(step: StepData, objective: Objective) -> Array:
    """The advantages of a step's rows, shaped by entropy where the objective asks for it.

    Args:
      step: the rows of the whole step.

    Returns:
      ``[N]`` float32; ``[N, T]``, 0 outside the completions, where tokens have their own.

    >>> rewards, group = jnp.array([1.0, 0.0]), jnp.array([0, 0])
    >>> step = StepData.plain(rewards=rewards, group=group, num_groups=1)
    >>> print(compute_advantages(step, OBJECTIVES["dr_grpo"]))
    [ 0.5 -0.5]
    """
    found = objective.advantages(step, objective)
    if objective.entropy_alpha:
        found = adv.entropy_shaped_advantages(
            found,
            step.token_entropy,
            alpha=objective.entropy_alpha,
            kappa=objective.entropy_kappa,
        )
    if objective.entropy_fraction < 1:
        learnt = step.mask & step.in_policy[:, None]
        kept = selection.top_entropy_tokens(
            step.token_entropy, learnt, fraction=objective.entropy_fraction
        )
        found = jnp.where(kept, found[:, None] if found.ndim == 1 else found, 0.0)
    return found if found.ndim == 1 else jnp.where(step.mask, found, 0.0)


def importance_level(objective: Objective) -> ImportanceWeight:
    """The unit of the objective's importance weights: tokens where only a cap is given.

    >>> importance_level(Objective(tis_cap=2.0)), importance_level(Objective())
    ('token', 'none')
    """
    capped = objective.tis_cap is not None and objective.importance_weight == "none"
    return "token" if capped else objective.importance_weight


def token_level(objective: Objective) -> bool:
    """True if tokens have advantages of their own; nothing is computed.

    >>> token_level(OBJECTIVES["grpo"]), token_level(OBJECTIVES["rl_zvp"])
    (False, True)
    """
    rewards, group = jnp.zeros(2), jnp.zeros(2, jnp.int32)
    step = StepData.plain(rewards=rewards, group=group, num_groups=1, mask=jnp.ones((2, 3), bool))
    return jax.eval_shape(lambda step: compute_advantages(step, objective), step).ndim == 2


def load_objective(name: str, **settings: Any) -> Objective:
    """An objective by name or import path, with some of its settings changed.

    Args:
      name: a key of ``OBJECTIVES``, or ``package.module:attribute`` that holds an
        :class:`Objective`.
      **settings: fields to replace; None leaves the objective's own.

    Returns:
      The objective.

    Raises:
      ValueError: if there is no such objective or setting (the message names the nearest), the
        objective has no use for it, or it does nothing without another one.

    >>> load_objective("dapo", epsilon_high=0.3, aggregation=None).epsilon_high
    0.3
    """
    objective = load_custom(name, "objective") if ":" in name else OBJECTIVES.get(name)
    if not isinstance(objective, Objective):
        raise ValueError(f"no objective {name!r}{_hint(name, OBJECTIVES)}")
    fields = [field.name for field in dataclasses.fields(objective)]
    for setting in settings:
        if setting not in fields:
            raise ValueError(f"an objective has no setting {setting!r}{_hint(setting, fields)}")
    changes = {key: value for key, value in settings.items() if value is not None}
    changed = dataclasses.replace(objective, **changes)
    differ = {key for key, value in changes.items() if getattr(objective, key) != value}
    unused = (_PARTS & differ) - _used_by_parts(changed) if _PARTS & differ else None
    if unused:
        raise ValueError(f"{name!r} has no use for {', '.join(sorted(unused))}")
    for setting, needed in _NEEDS.items():
        if setting in differ and getattr(changed, needed) == getattr(Objective, needed):
            raise ValueError(f"{setting} does nothing without {needed}")
    return changed


def _used_by_parts(objective: Objective) -> set[str]:
    """The settings in ``_PARTS`` that the objective's functions read."""
    used: set[str] = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            used.add(name)
            return getattr(objective, name)

    def run(step: StepData, batch: TrainBatch, key: Array) -> None:
        watched: Any = Watched()
        objective.advantages(step, watched)
        objective.token_loss(batch.old_logprobs, batch, watched)
        if objective.select_tokens is not None:
            objective.select_tokens(batch, batch.old_logprobs, key, watched)

    zeros, row = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    step = StepData.plain(rewards=zeros[:, 0], group=row, num_groups=1, mask=zeros == 0)
    batch = TrainBatch.plain(
        tokens=jnp.zeros((2, 4), jnp.int32),
        prompt_length=row,
        length=row,
        loss_mask=zeros,
        selected=zeros > 0,
        solved=row > 0,
    )
    try:
        jax.eval_shape(run, step, batch, jax.random.key(0))
    # The functions may be the user's and need more than these arrays.
    except Exception:
        return set(_PARTS)
    return used


def _hint(name: str, known: Any) -> str:
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else f"; known are {', '.join(known)}"
