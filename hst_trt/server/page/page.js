// The page of `hst-trt serve`: draws what the form says, keeps what was drawn in this tab, and shows one run and what is beside it.

import { drawPicture, ServerError, servedModel, useKey } from "./api.js";
import { drawingSeconds, percent, seconds } from "./figures.js";
import { masksOfSteps } from "./masks.js";
import { controlOf, explain, identity, largeOnly, nameOf, offer, readForm } from "./settings.js";
import * as view from "./view.js";

const KEPT = 12; // pictures, and as many large-only ones
const PLAY_MS = 350;
const THIS = "This picture";
const WIDE = "(min-width: 60rem)";

const byId = (id) => document.getElementById(id);
const form = byId("request");

let model = null;
let runs = []; // the latest first
let references = new Map(); // large-only runs by what was asked for
let shown = null;
let pinned = null; // a run that was chosen to stand beside the shown one
let drawing = null; // the AbortController of what is being drawn
let playing = null;

// -- drawing -------------------------------------------------------------------------------------------------------------
async function draw() {
  const request = readForm(model);
  begin();
  try {
    const run = await drawRun(request, THIS);
    runs = [run, ...runs].slice(0, KEPT);
    await show(run);
    if (byId("beside").checked) await drawReference(run);
    finish(`Done in ${seconds(drawingSeconds(run))}, ${percent(run.answer.stats.large_compute_saved)} of the large model's compute saved.`);
  } catch (error) {
    finish(error.name === "AbortError" ? "Cancelled." : "Not drawn.");
    if (error.name !== "AbortError") showError(error);
  }
}

/** The large model alone on the same seed, unless it is there already. */
async function drawReference(run) {
  const request = largeOnly(model, run);
  if (run.request.schedule === "large") references.set(identity(request), run);
  if (!references.has(identity(request))) {
    if (run === shown && !pinned) view.showBlank(byId("other-figure"), "Drawing …", "Large only");
    try {
      references.set(identity(request), await drawRun(request, "Large only"));
      references = new Map([...references].slice(-KEPT));
    } finally {
      if (run === shown) await show(run);
    }
  } else if (run === shown) await show(run);
}

async function drawRun(request, name) {
  say(`${name}: sent.`);
  let stage = null;
  const data = await withKey(() =>
    drawPicture(request, {
      signal: drawing.signal,
      onEvent: (event, data) => {
        if (event === "image_generation.queued") say(`${name}: waiting, ${data.position} before it.`);
        if (event !== "image_generation.progress") return;
        byId("bar").max = data.steps;
        byId("bar").value = data.step;
        byId("bar").dataset.stage = data.stage;
        byId("doing").textContent = `${name}: step ${data.step} of ${data.steps}, ${data.stage} stage, large model on ${data.large_tokens} tokens`;
        if (stage !== data.stage) announce(`${name}: ${data.stage} stage, step ${data.step} of ${data.steps}`);
        stage = data.stage;
      },
    }),
  );
  return runOf(request, data);
}

let number = 0;

function runOf(request, { b64_json, size, seed, output_format, hst_trt: answer }) {
  const bytes = Uint8Array.from(atob(b64_json), (character) => character.charCodeAt(0));
  const [width, height] = size.split("x").map(Number);
  const url = URL.createObjectURL(new Blob([bytes], { type: `image/${output_format}` }));
  const masks = masksOfSteps(answer);
  const masked = masks.map((mask) => mask.includes(true) && mask.includes(false));
  const columns = width / model.side;
  return { number: number++, request, answer, seed, width, height, url, format: output_format, masks, masked, columns };
}

function begin() {
  drawing = new AbortController();
  byId("error").textContent = "";
  for (const invalid of form.querySelectorAll("[aria-invalid]")) {
    invalid.removeAttribute("aria-invalid");
    invalid.removeAttribute("aria-errormessage");
  }
  byId("progress").classList.add("busy");
  byId("bar").value = 0;
  swap(byId("draw"), byId("cancel"));
  if (byId("result").getBoundingClientRect().top > innerHeight * 0.8) byId("result").scrollIntoView();
}

function finish(text) {
  drawing = null;
  byId("progress").classList.remove("busy");
  say(text);
  swap(byId("cancel"), byId("draw"));
}

/** One button gives way to the other, and hands the focus on if it has it. */
function swap(from, to) {
  const focused = document.activeElement === from;
  to.disabled = false;
  if (focused) to.focus();
  from.disabled = true;
}

// -- words for the reader and the listener -----------------------------------------------------------------------------------
function say(text) {
  byId("doing").textContent = text;
  announce(text);
}

function announce(text) {
  byId("announced").textContent = text;
}

function showError(error) {
  const wait = error.retryAfter ? `\nThe server asks to wait ${error.retryAfter} s.` : "";
  byId("error").textContent = `${error.message}${wait}`;
  const control = controlOf(error.param);
  if (!control) return;
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-errormessage", "error");
  if (byId("settings").contains(control)) byId("settings").open = true;
}

/** Calls, and calls again with a key for as long as the server asks for one and the user gives one. */
async function withKey(call) {
  while (true) {
    try {
      return await call();
    } catch (error) {
      if (!(error instanceof ServerError && error.status === 401) || !(await askForKey(error.message))) throw error;
    }
  }
}

function askForKey(message) {
  const dialog = byId("key-dialog");
  byId("key-message").textContent = message;
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use";
      if (given) useKey(byId("key").value);
      byId("key").value = "";
      resolve(given);
    }, { once: true });
  });
}

// -- showing -------------------------------------------------------------------------------------------------------------
/** What stands beside a run: what was chosen, else the large model alone if it was drawn. */
function besideOf(run) {
  if (pinned && pinned !== run) return { run: pinned, name: "Beside", reference: false };
  const reference = references.get(identity(largeOnly(model, run)));
  return reference && reference.request.schedule === "large" && reference !== run && run.request.schedule !== "large"
    ? { run: reference, name: "Large only", reference: true }
    : null;
}

async function show(run) {
  stop();
  shown = run;
  const other = besideOf(run);
  view.showPicture(byId("main-figure"), run, THIS);
  byId("other-figure").hidden = !other && (run.request.schedule === "large" || !byId("beside").checked);
  if (other) view.showPicture(byId("other-figure"), other.run, other.name);
  else view.showBlank(byId("other-figure"), "Not drawn.", "Large only");
  byId("masks").hidden = byId("measured").hidden = false;
  byId("scrub").max = run.masks.length;
  if (!run.masked[byId("scrub").value - 1]) byId("scrub").value = 1 + Math.max(0, run.masked.indexOf(true));
  view.showTimelines([{ run, name: THIS }, ...(other ? [other] : [])], (t) => scrubTo(t));
  view.showFiles(model, run);
  const focused = document.activeElement?.dataset.key;
  view.showStrip(runs, { shown, beside: pinned, onShow: goBack, onBeside: pin });
  if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus();
  showStep();
  forget();
  await view.showFigures(run, other);
}

function goBack(run) {
  if (!drawing) say(`Shown: ${nameOf(run)}.`);
  return show(run);
}

function pin(run) {
  pinned = run;
  return show(shown);
}

function scrubTo(t) {
  byId("scrub").value = t + 1;
  byId("overlay").checked = true;
  showStep();
}

function showStep() {
  const t = byId("scrub").valueAsNumber - 1;
  const visible = byId("overlay").checked;
  byId("scrub-value").value = view.describeStep(shown, t);
  byId("scrub").setAttribute("aria-valuetext", byId("scrub-value").value);
  view.markStep(visible ? t : null);
  view.showOverlay(byId("main-figure"), shown, visible ? t : null);
  const other = besideOf(shown);
  if (other) view.showOverlay(byId("other-figure"), other.run, visible ? t : null);
}

function play() {
  const steps = shown.masks.length;
  if (byId("scrub").valueAsNumber === steps) scrubTo(0);
  else scrubTo(byId("scrub").valueAsNumber - 1);
  byId("play").textContent = "Stop";
  playing = setInterval(() => {
    if (byId("scrub").valueAsNumber === steps) stop();
    else scrubTo(byId("scrub").valueAsNumber);
  }, PLAY_MS);
}

function stop() {
  clearInterval(playing);
  playing = null;
  byId("play").textContent = "Play";
}

const kept = new Set();

/** Frees the pictures that nothing leads to any more. */
function forget() {
  const reachable = new Set([...runs, ...references.values(), shown, pinned]);
  for (const run of kept) if (!reachable.has(run)) URL.revokeObjectURL(run.url);
  kept.clear();
  for (const run of reachable) if (run) kept.add(run);
}

// -- the form ------------------------------------------------------------------------------------------------------------
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!drawing) draw();
});
for (const event of ["input", "change"]) form.addEventListener(event, () => explain(model)); // not all ways to choose are input
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("draw").disabled) form.requestSubmit();
});
byId("cancel").addEventListener("click", () => drawing?.abort());
byId("new-seed").addEventListener("click", () => {
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
byId("overlay").addEventListener("change", showStep);
byId("scrub").addEventListener("input", () => {
  stop();
  scrubTo(byId("scrub").valueAsNumber - 1);
});
byId("play").addEventListener("click", () => (playing === null ? play() : stop()));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key-dialog").close("use");
});
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));
byId("settings").open = matchMedia(WIDE).matches;

// -- the start -----------------------------------------------------------------------------------------------------------
async function start() {
  while (model === null) {
    try {
      model = await withKey(servedModel);
    } catch (error) {
      byId("served").textContent = error.message;
      if (error.status === 401) {
        byId("served").textContent = `${error.message}. Reload the page to give a key.`;
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  byId("served").textContent = `${model.id} · ${model.backend}, ${model.precision} · ${model.width} × ${model.height}, ${model.num_tokens} tokens`;
  document.title = `${model.id} · hst_trt`;
  offer(model);
  byId("draw").disabled = false;
}

start();
