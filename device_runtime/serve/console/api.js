// Requests to the device. Paths are relative, so that the page also works behind a proxy with a prefix.

export class ApiError extends Error {
  /** An answer other than success; `message` is the sentence of the server. */
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const RETRIES = 3;
const LONGEST_WAIT = 5; // seconds; a server that asks for more is not waited for

const pause = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

/** Send a request and return the parsed JSON, or the response itself with `raw`. Waits and repeats while it is busy. */
export async function request(method, path, { json, form, body, type, raw, signal } = {}) {
  const headers = json !== undefined ? { "Content-Type": "application/json" } : type ? { "Content-Type": type } : {};
  const sent = json !== undefined ? JSON.stringify(json) : (form ?? body);
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(path, { method, headers, body: sent, signal, credentials: "same-origin" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The device does not answer. Is it switched on, and are you in the same network?", 0);
    }
    if (response.ok) return raw ? response : response.status === 204 ? null : response.json();
    const wait = Number(response.headers.get("Retry-After") ?? NaN);
    if ([429, 503].includes(response.status) && attempt < RETRIES && wait <= LONGEST_WAIT) {
      await pause(Math.max(wait, 0.2));
      continue;
    }
    const problem = await response.json().catch(() => ({}));
    const sentence = problem.error ?? `The device answered with status ${response.status}.`;
    throw new ApiError(sentence, response.status, problem.code);
  }
}

export const get = (path) => request("GET", path);
export const post = (path, json = {}) => request("POST", path, { json });
export const remove = (path) => request("DELETE", path);

/** Send pictures as multipart fields `image`. */
export function sendImages(path, blobs, signal) {
  const form = new FormData();
  blobs.forEach((blob, index) => form.append("image", blob, blob.name ?? `${index}.jpg`));
  return request("POST", path, { form, signal });
}

/** Save what a POST returns as a file, under the name that the server proposes. */
export async function download(path, fallback) {
  const response = await request("POST", path, { json: {}, raw: true });
  const stated = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = stated ? stated[1] : fallback;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
