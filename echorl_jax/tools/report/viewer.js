"use strict";
// The EchoClip viewer: filter the sampled groups, shows one rollout in full and the others of its group in short.

const OUTCOMES = [
  ["", "any outcome"],
  ["mixed", "mixed"],
  ["right", "all right"],
  ["wrong", "all wrong"],
];

function shade(hundredths) {
  const level = Math.min(1, hundredths / 100 / page.viewer.entropy_scale);
  return level < 0.02 ? "" : "rgba(var(--heat), " + (0.85 * level).toFixed(2) + ")";
}

function tokenSpan(text, hundredths, closesStep = false) {
  const span = element("span", "token");
  if (hundredths !== undefined) {
    span.style.backgroundColor = shade(hundredths);
    span.title = (hundredths / 100).toFixed(2) + " nats";
  }
  text.split("\n").forEach((piece, i, pieces) => {
    if (i) span.append(element("span", "newline", "↵"));
    if (i && !(closesStep && i === pieces.length - 1 && !piece)) span.append("\n");
    span.append(piece);
  });
  return span;
}

/** The step with the highest mean entropy, or -1 where no entropy is known. */
function peakStep(rollout) {
  let best = -1;
  rollout.steps.forEach(([, mean], i) => {
    if (mean !== null && (best < 0 || mean > rollout.steps[best][1])) best = i;
  });
  return best;
}

function stepRow(rollout, i, start, highest) {
  const [end, mean] = rollout.steps[i];
  const inClip = rollout.clip_tokens >= end;
  const peak = i === peakStep(rollout);
  const row = element(
    "li",
    "step" + (inClip ? " in-clip" : rollout.clip_tokens ? " after-clip" : "") + (peak ? " peak" : ""),
  );
  const gutter = element("div", "gutter", mean === null ? "" : mean.toFixed(2));
  gutter.title =
    mean === null
      ? ""
      : "step " + (i + 1) + ": " + (end - start) + " tokens, mean entropy " + mean.toFixed(3) + " nats";
  if (peak) gutter.append(" peak");
  if (mean !== null) {
    const bar = element("span", "bar-line");
    bar.style.width = Math.round((100 * mean) / Math.max(highest, 1e-9)) + "%";
    gutter.append(bar);
  }
  const tokens = element("div", "tokens");
  for (let t = start; t < end; t++) {
    const last = t === rollout.tokens.length - 1;
    const text = rollout.tokens[t];
    // Each step is a row of its own, so the newline that ends it is drawn only as a mark.
    tokens.append(tokenSpan(text, rollout.entropy[t], t === end - 1 && !last));
  }
  row.append(gutter, tokens);
  return row;
}

function verdict(rollout) {
  const parts = [];
  if (rollout.reward !== null) parts.push("reward " + significant(rollout.reward));
  if (rollout.advantage !== null) parts.push("advantage " + significant(rollout.advantage));
  parts.push(rollout.length.toLocaleString("en") + " tokens");
  if (rollout.truncated) parts.push("truncated");
  if (rollout.reason) parts.push(rollout.reason);
  return parts.join(" · ");
}

function badges(rollout) {
  const outcome = rollout.correct ? "right" : rollout.correct === null ? "unjudged" : "wrong";
  const made = [element("span", "badge " + outcome, outcome)];
  if (rollout.clip_tokens) made.push(element("span", "badge clip", "EchoClip"));
  return made;
}

function pictures(group) {
  return group.pictures.map((data, i) => {
    const image = element("img", "picture");
    image.alt = "Picture " + (i + 1) + " of the prompt";
    image.src = "data:image/jpeg;base64," + data;
    return image;
  });
}

function fullRollout(group, number) {
  const rollout = group.rollouts[number];
  const sheet = element("article", "sheet");
  const title = element(
    "h3",
    "",
    "Step " +
      group.step.toLocaleString("en") +
      ", rollout " +
      (number + 1) +
      " of " +
      group.rollouts.length +
      " ",
  );
  title.append(...badges(rollout));
  sheet.append(title, element("p", "facts-line", verdict(rollout)), element("div", "prompt", group.prompt));
  sheet.append(...pictures(group));
  if (rollout.entropy.length) {
    const scale = element("p", "scale", "0");
    scale.append(
      element("i"),
      page.viewer.entropy_scale.toFixed(2) + " nats of entropy; a number is its step's mean",
    );
    sheet.append(scale);
  }
  const steps = element("ol", "steps");
  const highest = Math.max(0, ...group.rollouts.flatMap((r) => r.steps.map(([, mean]) => mean ?? 0)));
  let start = 0;
  rollout.steps.forEach(([end], i) => {
    steps.append(stepRow(rollout, i, start, highest));
    if (rollout.clip_tokens && rollout.clip_tokens > start && rollout.clip_tokens <= end) {
      const text =
        rollout.clip_tokens === rollout.length ? "EchoClip: the whole rollout, " : "EchoClip ends here: ";
      steps.append(
        element(
          "li",
          "clip-end",
          text +
            rollout.clip_tokens.toLocaleString("en") +
            (rollout.clip_tokens === 1 ? " token" : " tokens"),
        ),
      );
    }
    start = end;
  });
  sheet.append(steps);
  if (rollout.tokens.length < rollout.length) {
    sheet.append(
      element(
        "p",
        "note",
        "… " +
          (rollout.length - rollout.tokens.length).toLocaleString("en") +
          " more tokens are in the samples file.",
      ),
    );
  }
  return sheet;
}

function otherRollout(rollout, number, pressed, choose) {
  const button = element("button", "other");
  button.dataset.rollout = number;
  button.setAttribute("aria-pressed", String(pressed));
  button.append(...badges(rollout), element("span", "facts-line", verdict(rollout)));
  const preview = element("span", "preview tokens");
  rollout.tokens.slice(0, 160).forEach((text, t) => preview.append(tokenSpan(text, rollout.entropy[t])));
  button.append(preview);
  button.addEventListener("click", () => choose(number));
  return button;
}

function selectBox(name, label, options) {
  const box = element("select");
  box.id = "viewer-" + name;
  for (const [value, text] of options) {
    const option = element("option", "", text);
    option.value = value;
    box.append(option);
  }
  const wrap = element("label", "", label);
  wrap.append(box);
  return [box, wrap];
}

function startViewer() {
  const groups = page.viewer.groups;
  const steps = [...new Set(groups.map((group) => group.step))];
  const [stepBox, stepLabel] = selectBox("step", "Step", [
    ["", "all steps"],
    ...steps.map((s) => [String(s), s.toLocaleString("en")]),
  ]);
  const [outcomeBox, outcomeLabel] = selectBox("outcome", "Group", OUTCOMES);
  const [clipBox, clipLabel] = selectBox("clip", "Clip", [
    ["", "with or without"],
    ["yes", "with a clip"],
    ["no", "without"],
  ]);
  const back = element("button", "", "← Previous");
  const next = element("button", "", "Next →");
  const place = element("span", "count");
  place.id = "viewer-place";
  const turn = element("span", "turn");
  turn.append(back, place, next);
  document.getElementById("viewer-filter").append(stepLabel, outcomeLabel, clipLabel, turn);
  const body = document.getElementById("viewer-body");
  let shown = [];
  let at = 0;

  const hasClip = (group) => group.rollouts.some((rollout) => rollout.clip_tokens > 0);
  const show = (number) => {
    const group = shown[at];
    place.textContent = group ? at + 1 + " of " + shown.length.toLocaleString("en") : "0 of 0";
    back.disabled = at <= 0;
    next.disabled = at >= shown.length - 1;
    if (!group) return body.replaceChildren(element("p", "empty", "No sampled group fits this filter."));
    const withClip = group.rollouts.findIndex((rollout) => rollout.clip_tokens > 0);
    const chosen = number ?? Math.max(0, withClip);
    const head = element("p", "facts-line");
    const name = OUTCOMES.find(([value]) => value === group.outcome)[1];
    head.append(
      element("span", "badge " + group.outcome, name),
      group.right + " of " + group.rollouts.length + " right",
    );
    if (group.prompt_index !== null) head.append(" · prompt " + group.prompt_index.toLocaleString("en"));
    if (group.source) head.append(" · " + group.source);
    const grid = element("div", "viewer-grid");
    const others = element("div", "others");
    others.setAttribute("aria-label", "Rollouts of this group");
    group.rollouts.forEach((rollout, i) => others.append(otherRollout(rollout, i, i === chosen, show)));
    grid.append(fullRollout(group, chosen), others);
    body.replaceChildren(head, grid);
  };
  const filter = () => {
    shown = groups.filter(
      (group) =>
        (!stepBox.value || String(group.step) === stepBox.value) &&
        (!outcomeBox.value || group.outcome === outcomeBox.value) &&
        (!clipBox.value || hasClip(group) === (clipBox.value === "yes")),
    );
    at = 0;
    show();
  };
  [stepBox, outcomeBox, clipBox].forEach((box) => box.addEventListener("change", filter));
  back.addEventListener("click", () => {
    at -= 1;
    show();
  });
  next.addEventListener("click", () => {
    at += 1;
    show();
  });
  filter();
  const clip = groups.findIndex((group) => hasClip(group) && group.outcome === "right");
  const fallback = groups.findIndex(hasClip);
  at = Math.max(0, clip >= 0 ? clip : fallback);
  show();
}

if (page.viewer.groups.length) startViewer();
