// The stream of events of the device: what keeps the page up to date, and what notices that the device is gone.
import { get } from "./api.js";
import { attempt, current, OWN, set } from "./store.js";

const AGAIN = 2000; // ms until a broken connection is tried again
const MOST = 50; // captures and jobs that are kept

let source = null;
let timer = 0;

const without = (record, most = MOST) => Object.fromEntries(Object.entries(record).slice(-most));
const byId = (items) => Object.fromEntries(items.map((item) => [item.id, item]));

export const refreshTray = async () => set({ tray: (await get("v1/tray")).tray });

/** Read what a change of the device's memory changes. */
export async function refreshMemory() {
  const [status, classes, history] = await Promise.all([get("v1/status"), get("v1/classes"), get("v1/history")]);
  const sorted = [...classes.classes].sort((one, two) => one.name.localeCompare(two.name, undefined, { numeric: true }));
  set({ status, classes: sorted, history });
}

/** Read everything. */
export async function refresh() {
  const [cameras, jobs, captures] = await Promise.all([get("v1/cameras"), get("v1/jobs"), get("v1/captures")]);
  set({ cameras: cameras.cameras, jobs: byId(jobs.jobs), captures: byId(captures.captures) });
  const known = cameras.cameras.map((camera) => camera.id);
  const { source: looked } = current();
  if (looked !== OWN && !known.includes(looked)) set({ source: known[0] ?? OWN });
  const answers = cameras.cameras.filter((camera) => camera.answer).map((camera) => [camera.id, camera.answer]);
  set({ answers: { ...Object.fromEntries(answers), ...current().answers } });
  await Promise.all([refreshMemory(), refreshTray()]);
}

const handlers = {
  answer: (answer) => set({ answers: { ...current().answers, [answer.camera]: answer } }),
  camera: (changed) =>
    set({ cameras: current().cameras.map((one) => (one.id === changed.id ? { ...one, ...changed } : one)) }),
  capture: (capture) => set({ captures: without({ ...current().captures, [capture.id]: capture }) }),
  drift: (drift) => set({ status: { ...current().status, drift: { ...current().status?.drift, ...drift } } }),
  generation: () => attempt(refreshMemory),
  job: (job) => set({ jobs: without({ ...current().jobs, [job.id]: job }) }),
  lost: () => attempt(refresh),
  tray: () => attempt(refreshTray),
};

/** Listen to the events; opens the stream again whenever it breaks. */
export function connect() {
  disconnect();
  source = new EventSource("v1/events");
  source.onopen = async () => {
    set({ connection: "open" });
    await attempt(refresh);
  };
  source.onerror = async () => {
    disconnect();
    set({ connection: "lost" });
    timer = setTimeout(async () => {
      const session = await get("v1/session").catch(() => null);
      if (session) set({ session });
      if (!session || session.signed_in || !session.token_needed) connect();
    }, AGAIN);
  };
  for (const [kind, handle] of Object.entries(handlers)) {
    source.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
  }
}

/** Stop listening. */
export function disconnect() {
  clearTimeout(timer);
  source?.close();
  source = null;
}
