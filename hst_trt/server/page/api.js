// The server's HTTP interface: what it serves, and a picture as a stream of events. Errors are the server's own words.

let key = "";

/** Kept in this module's memory and nowhere else. */
export function useKey(value) {
  key = value;
}

/** What the server answered instead of what was asked for. `status` 0: it did not answer. */
export class ServerError extends Error {
  constructor(status, { message, param = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

/** What /v1/models says of the one bundle that is served: {id, ...hst_trt}. */
export async function servedModel() {
  const [model] = (await (await ask("v1/models")).json()).data;
  return { id: model.id, ...model.hst_trt };
}

/**
 * Draws one picture. `onEvent(name, data)` gets what happens before it is finished; aborting the signal closes the stream, and
 * the server stops at its next step. Returns the data of the event that carries the picture.
 */
export async function drawPicture(request, { signal, onEvent }) {
  const response = await ask("v1/images/generations", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, details: true }),
    signal,
  });
  for await (const { name, data } of serverSentEvents(response.body)) {
    if (name === "error") throw new ServerError(response.status, data.error);
    if (name === "image_generation.completed") return data;
    onEvent(name, data);
  }
  throw new ServerError(0, { message: "The stream ended before the picture was finished." });
}

async function ask(path, { headers = {}, ...options } = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: key ? { ...headers, Authorization: `Bearer ${key}` } : headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: `The server cannot be reached: ${error.message}` });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const said = body?.error ?? { message: `The server answered ${response.status} ${response.statusText}` };
  throw new ServerError(response.status, said, response.headers.get("Retry-After"));
}

/** The events of a stream of bytes, as {name, data}; data is JSON. Chunks may end anywhere, also within a character. */
export async function* serverSentEvents(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parseEvent(block);
        if (event.data !== "") yield { name: event.name, data: JSON.parse(event.data) };
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  const event = { name: "message", data: [] };
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "event") event.name = value;
    if (field === "data") event.data.push(value);
  }
  return { name: event.name, data: event.data.join("\n") };
}
