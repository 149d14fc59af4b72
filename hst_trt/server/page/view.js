// What is shown of a run: its picture with the overlay, the timelines, the figures, the table of steps, the strip.

import { drawingSeconds, loopSeconds, percent, psnr, seconds, times } from "./figures.js";
import { paintMask } from "./masks.js";
import { commandLine, nameOf } from "./settings.js";
import { timeAxis, timelineRow } from "./timeline.js";

const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A picture in its figure, under a canvas for the overlay. */
export function showPicture(figure, run, caption) {
  const image = make("img", { src: run.url, alt: `“${run.request.prompt}”, ${nameOf(run)}`, width: run.width, height: run.height });
  const overlay = make("canvas", { width: run.width, height: run.height });
  overlay.setAttribute("aria-hidden", "true"); // the step's description beside the slider says what it shows
  figure.querySelector(".canvas").replaceChildren(image, overlay);
  figure.querySelector("figcaption").replaceChildren(make("strong", { textContent: caption }), ` ${nameOf(run)}, seed ${run.seed}`);
}

export function showBlank(figure, text, caption) {
  figure.querySelector(".canvas").replaceChildren(make("p", { className: "blank", textContent: text }));
  figure.querySelector("figcaption").textContent = caption;
}

/** Paints step `t` of a run over its picture; null takes the overlay away. */
export function showOverlay(figure, run, t) {
  const overlay = figure.querySelector("canvas");
  if (!overlay) return;
  if (t === null || t >= run.masks.length) overlay.getContext("2d").clearRect(0, 0, overlay.width, overlay.height);
  else paintMask(overlay, run.masks[t], run.columns);
}

/** "5 of 20, hybrid stage: large model on 80 of 256 tokens" */
export function describeStep({ answer }, t) {
  const { stage, large_tokens } = answer.plan[t];
  const all = answer.stats.num_tokens;
  const share = large_tokens === all ? "all tokens" : large_tokens === 0 ? "no token" : `${large_tokens} of ${all} tokens`;
  return `${t + 1} of ${answer.plan.length}, ${stage} stage: large model on ${share}`;
}

export function markStep(t) {
  for (const segment of document.querySelectorAll(".segment")) {
    segment.classList.toggle("chosen", Number(segment.dataset.step) === t);
    if (segment.classList.contains("chosen")) segment.parentNode.append(segment); // its outline above its neighbours
  }
}

/** Rows of one time scale: the shown run, and what is beside it. */
export function showTimelines(runs, onChoose) {
  const scale = Math.max(...runs.map(({ run }) => run.answer.steps.reduce((sum, step) => sum + step.seconds, 0)));
  const rows = runs.map(({ run, name }, i) =>
    timelineRow({
      name, steps: run.answer.steps, tokens: run.answer.stats.num_tokens, scale, onChoose: i === 0 ? onChoose : null,
    }),
  );
  byId("timelines").replaceChildren(...rows, timeAxis(scale));
}

/** @param other {run, name, reference} what is beside it, if anything; reference: it is the large model alone. */
export async function showFigures(run, other) {
  const { stats, batch, queued_seconds } = run.answer;
  const parts = Object.entries(stats.seconds).map(([part, spent]) => `${part === "vae" ? "VAE" : part} ${seconds(spent)}`);
  if (queued_seconds >= 0.001) parts.push(`waited ${seconds(queued_seconds)}`);
  if (batch > 1) parts.push(`in a batch of ${batch}`);
  const predicted = run.request.speedup
    ? `${times(run.request.speedup)} was asked for`
    : `predicted ${times(stats.modelled_speedup)}`;
  const facts = [["Time taken", seconds(drawingSeconds(run)), parts.join(", ")]];
  if (other) {
    const steps = other.run.answer.plan.length;
    facts.push([other.reference ? "Large only took" : "The one beside took", seconds(drawingSeconds(other.run)), `${steps} steps, loop ${seconds(loopSeconds(other.run))}`]);
    facts.push(["Speed-up of the loop", times(loopSeconds(other.run) / loopSeconds(run)), `measured over ${other.reference ? "large only" : "the one beside"}; ${predicted}`]);
  } else {
    facts.push(["Speed-up of the loop", times(stats.modelled_speedup), `not measured; by ${stats.cost_source}`]);
  }
  const computed = `${stats.large_tokens} of ${stats.num_tokens * stats.steps} tokens in ${stats.steps} steps`;
  facts.push(["Large compute saved", percent(stats.large_compute_saved), computed]);
  if (other && run.width === other.run.width && run.height === other.run.height) {
    const images = await Promise.all([run.url, other.run.url].map(loaded));
    const noise = psnr(...images);
    facts.push([`PSNR to ${other.reference ? "large only" : "the one beside"}`, noise === Infinity ? "equal" : `${noise.toFixed(1)} dB`, "higher is nearer"]);
  }
  byId("facts").replaceChildren(
    ...facts.map(([name, value, note]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }), make("dd", { className: "hint", textContent: note })),
    ),
  );
}

/** The rest of what one run leaves: download, command, table of steps. */
export function showFiles(model, run) {
  Object.assign(byId("download"), { href: run.url, download: `hst_${run.seed}_${run.request.schedule ?? `${run.request.speedup}x`}.${run.format}` });
  byId("command").querySelector("code").textContent = commandLine(model, run);
  byId("table").querySelector("tbody").replaceChildren(
    ...run.answer.steps.map(({ stage, large_tokens, seconds: spent }, t) =>
      make(
        "tr", {},
        make("th", { scope: "row", textContent: t + 1 }),
        ...[stage, large_tokens, run.answer.plan[t].small ? "yes" : "no", (1000 * spent).toFixed(1)].map((text) => make("td", { textContent: text })),
      ),
    ),
  );
}

/** Thumbnails, the latest first. */
export function showStrip(runs, { shown, beside, onShow, onBeside }) {
  byId("session").hidden = runs.length < 2;
  byId("strip").replaceChildren(
    ...runs.map((run) => {
      const label = `${nameOf(run)}, seed ${run.seed}: ${run.request.prompt}`;
      const show = make("button", { type: "button", className: "thumbnail", title: run.request.prompt }, make("img", { src: run.url, alt: "" }));
      show.setAttribute("aria-label", `Show ${label}`);
      show.setAttribute("aria-current", run === shown);
      show.dataset.key = `show ${run.number}`;
      show.addEventListener("click", () => onShow(run));
      const pin = make("button", { type: "button", textContent: "Beside", disabled: run === shown });
      pin.setAttribute("aria-label", `Beside: ${label}`);
      pin.setAttribute("aria-pressed", run === beside);
      pin.dataset.key = `beside ${run.number}`;
      pin.addEventListener("click", () => onBeside(run === beside ? null : run));
      return make(
        "li", {}, show,
        make("span", { textContent: nameOf(run) }), make("span", { className: "hint", textContent: seconds(drawingSeconds(run)) }), pin,
      );
    }),
  );
}

async function loaded(url) {
  const image = make("img", { src: url });
  await image.decode();
  return image;
}
