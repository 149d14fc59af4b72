// A run as one row of segments, a step each: as wide as the step took, as high as the share of tokens the large model
// computed, coloured by stage. Rows of one scale lie below each other, so that a shorter row is a faster run.

import { seconds } from "./figures.js";

const SVG = "http://www.w3.org/2000/svg";
const STRIP = 8; // percent of the height that names the stage where the large model computed nothing
const TICKS = [1, 2, 2.5, 5, 10];

/**
 * @param steps [{stage, large_tokens, seconds}]
 * @param scale seconds that the row's full width stands for
 */
export function timelineRow({ name, steps, tokens, scale, onChoose }) {
  const row = document.createElement("div");
  row.className = "timeline";
  const total = steps.reduce((sum, step) => sum + step.seconds, 0);
  const title = document.createElement("p");
  title.append(name, " ", Object.assign(document.createElement("span"), { textContent: seconds(total) }));
  const svg = element("svg", { role: "img", "aria-label": `${name}: ${described(steps)}, ${seconds(total)} in all` });
  let start = 0;
  steps.forEach((step, t) => {
    const share = step.large_tokens / tokens;
    const [x, width] = [(100 * start) / scale, (100 * step.seconds) / scale];
    const height = STRIP + (100 - STRIP) * share;
    const segment = element("g", { class: `segment ${step.stage}`, "data-step": t });
    const bar = { x: `${x}%`, width: `${width}%` };
    segment.append(
      element("rect", { ...bar, class: "slot", y: 0, height: "100%" }),
      element("rect", { ...bar, class: "bar", y: `${100 - height}%`, height: `${height}%` }),
    );
    const hint = element("title", {});
    hint.textContent = `Step ${t + 1}, ${step.stage}: ${step.large_tokens} of ${tokens} tokens by the large model, ${seconds(step.seconds)}`;
    segment.append(hint);
    if (onChoose) segment.addEventListener("click", () => onChoose(t));
    svg.append(segment);
    start += step.seconds;
  });
  row.append(title, svg);
  return row;
}

/** The axis below rows of one scale. */
export function timeAxis(scale) {
  const rough = scale / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = TICKS.find((tick) => tick * power >= rough) * power;
  const axis = element("svg", { class: "axis", "aria-hidden": "true" });
  for (let k = 0; k * step <= scale; k++) {
    const x = (100 * k * step) / scale;
    axis.append(element("line", { x1: `${x}%`, x2: `${x}%`, y1: 0, y2: 5 }));
    const label = element("text", { x: `${x}%`, y: 18, class: k === 0 ? "first" : x > 94 ? "last" : "" });
    label.textContent = k === 0 ? "0" : seconds(k * step);
    axis.append(label);
  }
  return axis;
}

/** "2 large steps, 7 hybrid steps, 11 small steps". */
export function described(steps) {
  const runs = [];
  for (const { stage } of steps) {
    if (runs.at(-1)?.stage === stage) runs.at(-1).count++;
    else runs.push({ stage, count: 1 });
  }
  return runs.map(({ stage, count }) => `${count} ${stage} step${count === 1 ? "" : "s"}`).join(", ");
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
