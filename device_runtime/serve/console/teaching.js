// Teaching one thing: its pictures are collected on the device (a capture), then learned (a job).
//
// `teach.phase` is "idle", "collecting" (the button is held), "held" (let go too early), "sending" (files), "learning" or
// "ended" (the job says how).
import { post, remove, sendImages } from "./api.js";
import { attempt, current, OWN, set, until } from "./store.js";

const BATCH = 16; // pictures of one request
const BATCH_BYTES = 16e6;
const BETWEEN = 250; // ms between pictures of the browser's own camera
export const ENDED = ["done", "refused", "failed", "cancelled"];

let steps = Promise.resolve(); // requests about the capture, one after the other, however fast somebody presses
const step = (action) => (steps = steps.then(() => attempt(action)));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

const phase = (fields) => set({ teach: { ...current().teach, ...fields } });
const keep = (capture) => capture?.id && set({ captures: { ...current().captures, [capture.id]: capture } });

/** Return the open capture of a label from a source, or open one. */
export async function captureOf(label, camera = null) {
  const open = Object.values(current().captures).find(
    (one) => one.label === label && (one.camera ?? null) === camera && ["collecting", "held"].includes(one.state),
  );
  if (open) return open;
  const capture = await post("v1/captures", camera === null ? { label } : { label, camera });
  keep(capture);
  return capture;
}

/** Collect pictures of `label` while the button is held; `grab` returns one of the browser's own camera as a JPEG. */
export function begin(label, source, grab) {
  set({ teach: { phase: "collecting", label, capture: null, job: null, since: Date.now() } });
  step(async () => {
    const camera = source === OWN ? null : source;
    const capture = await captureOf(label, camera);
    phase({ capture: capture.id });
    if (camera === null) grabbing(capture.id, grab);
    else if (capture.state === "held") keep(await post(`v1/captures/${capture.id}/resume`));
  }).then(() => current().teach.capture ?? phase({ phase: "idle" }));
}

async function grabbing(id, grab) {
  const going = () => current().teach.phase === "collecting" && current().teach.capture === id;
  while (going()) {
    const next = pause(BETWEEN);
    const picture = await grab();
    if (picture && going()) keep(await step(() => sendImages(`v1/captures/${id}/images`, [picture])));
    await next;
  }
}

/** The button was let go: learn if there are enough different views. `interrupted`: it was taken from the hand. */
export function letGo(interrupted) {
  if (current().teach.phase !== "collecting") return;
  phase({ phase: "held" });
  step(async () => {
    const { capture: id } = current().teach;
    if (!id) return;
    if (current().captures[id]?.camera != null) keep(await post(`v1/captures/${id}/hold`));
    const capture = await counted(id);
    if (!interrupted && capture.different >= capture.needed) await learn(id);
  });
}

/** Return a capture once its different views are counted: the first time, the device prepares that for some seconds. */
const counted = (id) =>
  until(({ captures, connection }) => (captures[id]?.hint !== "preparing" || connection !== "open") && captures[id]);

/** Learn what a capture has collected. Returns the job. */
export async function learn(id) {
  const job = await post(`v1/captures/${id}/learn`);
  const { captures, jobs } = current();
  set({
    captures: { ...captures, [id]: { ...captures[id], state: "learning" } },
    jobs: { [job.id]: job, ...jobs }, // an event may have been faster
    teach: { ...current().teach, phase: "learning", job: job.id, capture: id, label: captures[id]?.label },
  });
  until((state) => ENDED.includes(state.jobs[job.id]?.state)).then(
    () => current().teach.job === job.id && phase({ phase: "ended" }),
  );
  return job;
}

/** Throw away what was collected. */
export function discard(id) {
  const { [id]: dropped, ...captures } = current().captures;
  set({ captures });
  if (current().teach.capture === id) set({ teach: { phase: "idle" } });
  return step(() => remove(`v1/captures/${id}`));
}

export const close = () => set({ teach: { phase: "idle" } });
export const cancel = (job) => attempt(() => remove(`v1/jobs/${job}`));

/** Divide files into requests of a reasonable size. */
export function batches(files, most = BATCH, bytes = BATCH_BYTES) {
  const found = [];
  let size = Infinity;
  for (const file of files) {
    if (size + file.size > bytes || found.at(-1).length === most) {
      found.push([]);
      size = 0;
    }
    found.at(-1).push(file);
    size += file.size;
  }
  return found;
}

/** Return at most `most` of the files, evenly spread: neighbours resemble each other. */
export const spread = (files, most = files.length) =>
  files.length <= most ? files : Array.from({ length: most }, (_, at) => files[Math.floor((at * files.length) / most)]);

/** Teach things from files, one after the other: `groups` is a list of {label, files}. */
export async function teachFiles(groups) {
  for (const [index, { label, files }] of groups.entries()) {
    const rest = groups.length - index - 1;
    set({ teach: { phase: "sending", label, capture: null, job: null, sent: 0, total: files.length, rest, bad: [] } });
    const job = await attempt(() => fromFiles(label, files));
    if (!job) return set({ teach: { phase: "idle" } });
    const { state } = await until(({ jobs }) => ENDED.includes(jobs[job.id]?.state) && jobs[job.id]);
    if (state !== "done") return undefined;
  }
  return undefined;
}

async function fromFiles(label, all) {
  const opened = await post("v1/captures", { label });
  const { id } = opened;
  keep(opened);
  const files = spread(all, opened.most);
  const bad = [];
  phase({ total: files.length, left_out: all.length - files.length });
  for (const batch of batches(files)) {
    keep(await sendImages(`v1/captures/${id}/images`, batch).catch((error) => oneByOne(id, batch, error, bad)));
    phase({ capture: id, sent: current().teach.sent + batch.length, bad });
  }
  const capture = await counted(id);
  if (!(capture?.different >= capture?.needed)) {
    await remove(`v1/captures/${id}`).catch(() => null);
    throw new Error(
      `${label} was not taught: ${capture?.different ?? 0} of ${files.length} pictures are different views, and at least ` +
        `${capture?.needed ?? 3} are needed. ${bad[0]?.reason ?? "Pictures that are nearly the same count once."}`,
    );
  }
  return learn(id);
}

/** Send pictures again one by one after an error about one of them, and note which cannot be used. */
async function oneByOne(id, batch, error, bad) {
  if (![400, 413, 415].includes(error.status)) throw error;
  let capture;
  for (const file of batch) {
    try {
      capture = await sendImages(`v1/captures/${id}/images`, [file]);
    } catch (reason) {
      if (![400, 413, 415].includes(reason.status)) throw reason;
      bad.push({ name: file.name, reason: reason.message });
    }
  }
  return capture;
}
