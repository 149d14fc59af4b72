// The form's values as a request, and what a request means: its large-only twin, its name, its command line.

const WHAT = {
  hybrid: "Large model first, then both with the large one on a mask, then small alone.",
  large: "The large model alone: what the others are compared with.",
  small: "The small model alone: the fastest.",
  "t-stitch": "Small model first, then large.",
  srdiffusion: "Large model first, then small.",
  ras: "Large model alone; after the first steps only on a mask, while other tokens keep their last velocity.",
};
const STAGES = {
  hybrid: ["large", "hybrid", "small"],
  "t-stitch": ["large", "small"],
  srdiffusion: ["large", "small"],
  ras: ["large", "hybrid"],
};
const MASKED = ["hybrid", "ras"];
const SHAPES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const EDGES = [0.5, 0.75, 1, 1.5]; // of the usual size, for squares
const CONTROLS = {
  prompt: "prompt", negative_prompt: "negative-prompt", seed: "seed", size: "size", schedule: "schedule",
  num_inference_steps: "steps", stages: "stage-large", mask_ratio: "mask-ratio", speedup: "speedup",
};
const STAGE_INPUTS = ["large", "hybrid", "small"];

const byId = (id) => document.getElementById(id);

/** Fills the form with what the served model offers. */
export function offer(model) {
  byId("size").replaceChildren(...sizes(model).map(({ width, height }) => new Option(`${width} × ${height}`, `${width}x${height}`)));
  byId("size").value = `${model.width}x${model.height}`;
  byId("size-field").hidden = byId("size").length === 1;
  byId("schedule").replaceChildren(...model.schedules.map((name) => new Option(name, name)));
  byId("steps").max = model.max_steps;
  byId("steps").value = model.num_inference_steps;
  byId("speedup").max = model.speedups.length;
  byId("speedup").disabled = model.speedups.length === 0;
  explain(model);
}

/** Says what the chosen values mean, and leaves only those controls open that count. */
export function explain(model) {
  const chosen = chosenSpeedup(model);
  byId("speedup-value").value = chosen ? `${chosen.speedup.toFixed(2)}×` : "off";
  byId("speedup").setAttribute("aria-valuetext", chosen ? `${chosen.speedup.toFixed(2)} times` : "off");
  byId("speedup-hint").textContent = chosen
    ? `Nearest to the large model at that speed, by this pair's calibration: ${chosen.schedule}`
    : model.speedups.length
      ? "How many times faster than the large model; this pair's calibration chooses the schedule."
      : "Needs a calibration of this pair, which this server's bundle lacks.";
  byId("by-hand").disabled = chosen !== null;
  const schedule = byId("schedule").value;
  byId("schedule-hint").textContent = WHAT[schedule] ?? "";
  byId("mask-ratio").disabled = !MASKED.includes(schedule);
  byId("mask-ratio-value").value = Number(byId("mask-ratio").value).toFixed(2);
  for (const name of STAGE_INPUTS) byId(`stage-${name}`).disabled = !(STAGES[schedule] ?? []).includes(name);
}

/** The request that the form describes, with nothing in it that the server would choose by itself, but schedule and steps. */
export function readForm(model) {
  const request = { prompt: byId("prompt").value };
  if (byId("negative-prompt").value.trim()) request.negative_prompt = byId("negative-prompt").value;
  if (byId("seed").value !== "") request.seed = byId("seed").valueAsNumber;
  if (byId("size").value !== `${model.width}x${model.height}`) request.size = byId("size").value;
  const chosen = chosenSpeedup(model);
  if (chosen) return { ...request, speedup: chosen.speedup };
  request.schedule = byId("schedule").value;
  request.num_inference_steps = byId("steps").valueAsNumber;
  const stages = STAGE_INPUTS.map((name) => byId(`stage-${name}`)).map((input) => (input.disabled ? "" : input.value));
  if (stages.some((count) => count !== "")) request.stages = stages.map(Number);
  if (!byId("mask-ratio").disabled) request.mask_ratio = byId("mask-ratio").valueAsNumber;
  return request;
}

/** Same prompt, seed and size by the large model alone: in as many steps, or in as many as speed-ups are counted from. */
export function largeOnly(model, run) {
  const { prompt, negative_prompt, size } = run.request;
  const steps = run.request.speedup ? model.baseline_steps : run.answer.plan.length;
  const request = { prompt, negative_prompt, seed: run.seed, size, schedule: "large", num_inference_steps: steps };
  return JSON.parse(JSON.stringify(request)); // without what is undefined
}

/** One string for requests that give the same picture. */
export const identity = (request) => JSON.stringify(Object.entries(request).sort());

/** "hybrid, 20 steps, mask 0.3" */
export function nameOf({ request, answer }) {
  const name = request.speedup ? `speed-up ${request.speedup.toFixed(2)}` : request.schedule;
  const steps = request.stages ? `${request.stages.join(" + ")} steps` : `${answer.plan.length} steps`;
  return [name, steps, ...(request.mask_ratio ? [`mask ${request.mask_ratio}`] : [])].join(", ");
}

/** The command that draws the same picture from this server's bundle. */
export function commandLine(model, run) {
  const words = ["hst-trt run", `--prompt ${quoted(run.request.prompt)}`];
  if (run.request.negative_prompt) words.push(`--negative-prompt ${quoted(run.request.negative_prompt)}`);
  words.push(`--seed ${run.seed}`);
  if (run.width !== model.width || run.height !== model.height) words.push(`--width ${run.width} --height ${run.height}`);
  return [...words, run.answer.schedule].join(" ");
}

/** The control that a field of a request comes from. */
export const controlOf = (field) => byId(CONTROLS[field?.split(".")[0]]) ?? null;

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function chosenSpeedup(model) {
  const index = byId("speedup").valueAsNumber;
  return index === 0 ? null : model.speedups[index - 1];
}

/** Usual shapes of the usual area, and squares of other sizes, as far as the model draws them. */
export function sizes({ width, height, side, max_side }) {
  const round = (pixels) => Math.max(side, Math.round(pixels / side) * side);
  const edge = Math.sqrt(width * height);
  const wanted = [
    { width, height },
    ...SHAPES.map(([w, h]) => ({ width: round(edge * Math.sqrt(w / h)), height: round(edge * Math.sqrt(h / w)) })),
    ...EDGES.map((share) => ({ width: round(edge * share), height: round(edge * share) })),
  ];
  const fitting = wanted.filter((size) => Math.max(size.width, size.height) <= max_side);
  return [...new Map(fitting.map((size) => [`${size.width}x${size.height}`, size])).values()];
}
