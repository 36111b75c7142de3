"""The method once more, from its definitions, in NumPy with plain loops: what core must equal."""

import numpy as np


def step_ids(tokens, mask, is_delimiter):
    ids = np.full(tokens.shape, -1, np.int32)
    for row in range(tokens.shape[0]):
        step, content, closed = 0, False, False
        for t in range(tokens.shape[1]):
            if not mask[row, t]:
                continue
            delimiter = is_delimiter[tokens[row, t]]
            if closed and content and not delimiter:
                step, content = step + 1, False
            closed, content = delimiter, content or not delimiter
            ids[row, t] = step
    return ids


def steps_of(row, token_entropy, ids, num_steps):
    """The steps of one rollout: (step, mean entropy, tokens, position after the last token)."""
    found = []
    for step in range(num_steps):
        places = [t for t, i in enumerate(ids[row]) if i >= 0 and min(i, num_steps - 1) == step]
        if places:
            total = np.float32(sum(float(token_entropy[row, t]) for t in places))
            found.append((step, total / np.float32(len(places)), len(places), places[-1] + 1))
    return found


def mine(
    token_entropy,
    ids,
    correct,
    group,
    *,
    num_groups,
    num_steps,
    on_policy,
    select,
    top_k,
    min_step_tokens,
    when,
):
    """For each prompt the list of (row, step, length, entropy), best first."""
    clips = []
    for prompt in range(num_groups):
        members = [row for row in range(len(group)) if group[row] == prompt]
        if when == "degenerate_only" and not all(correct[row] for row in members):
            clips.append([])
            continue
        candidates = []
        for row in members:
            if correct[row] and on_policy[row]:
                steps = steps_of(row, token_entropy, ids, num_steps)
                long_enough = [s for s in steps if s[2] >= min_step_tokens]
                candidates += _candidates(row, steps, long_enough, select)
        candidates.sort(key=lambda c: c[0])  # a stable sort: ties stay in order of row, then step
        clips.append([(row, s[0], s[3], s[1]) for _, row, s in candidates[:top_k]])
    return clips


def _candidates(row, steps, long_enough, select):
    """The candidates of one rollout, as (rank, row, step); the lowest rank wins."""
    if not long_enough:
        return []
    if select == "max":
        return [(-s[1], row, s) for s in long_enough]
    if select == "min":
        return [(s[1], row, s) for s in long_enough]
    if select == "first":
        return [(0, row, long_enough[0])]
    if select == "last":
        return [(0, row, long_enough[-1])]
    if select == "full":
        return [(-max(s[1] for s in long_enough), row, steps[-1])]
    if select in ("longest", "shortest"):
        tokens = sum(s[2] for s in steps)
        return [(-tokens if select == "longest" else tokens, row, steps[-1])]
    raise ValueError(select)


def echo_loss(logprobs, clips, normalise):
    """L_echo of clips as :func:`mine` returns them."""
    if normalise == "tokens":
        nll = [-float(logprobs[r, t]) for p in clips for r, _, n, _ in p for t in range(n)]
        return sum(nll) / len(nll) if nll else 0.0
    per_prompt = []
    for prompt in clips:
        nlls = [-np.mean(logprobs[row, :length].astype(np.float64)) for row, _, length, _ in prompt]
        if nlls:
            per_prompt.append(sum(nlls) / len(nlls))
    count = len(clips) if normalise == "all_prompts" else len(per_prompt)
    return sum(per_prompt) / count if count else 0.0


def logprobs_and_entropy(hidden, head, tokens, temperature):
    """Dense, in float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64) / temperature
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    return picked, -(np.exp(logp) * logp).sum(axis=-1)
