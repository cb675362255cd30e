// What the page knows of the device, in one place. Components read it with `useStore` and are drawn again when it changes.
import { useEffect, useRef, useState } from "./vendor.js";

let state = {
  connection: "connecting", // "connecting" | "open" | "lost"
  session: null,
  status: null,
  classes: null, // null until they are known
  history: null,
  cameras: [],
  answers: {}, // camera → its last answer
  tray: [],
  captures: {}, // id → capture
  jobs: {}, // id → job
  source: null, // id of the camera that is looked at, or OWN
  name: "", // what is typed as the name of the thing to teach
  teach: { phase: "idle" }, // see `teaching.js`
  change: null, // the last change of this visit, see `changes.js`
  notice: null, // {kind: "error" | "done", text}
};

export const OWN = "own camera";

const listeners = new Set();

export const current = () => state;

/** Resolve as soon as `pick(state)` is truthy, to that. */
export const until = (pick) =>
  new Promise((done) => {
    const listener = () => {
      const found = pick(state);
      if (!found) return;
      listeners.delete(listener);
      done(found);
    };
    listeners.add(listener);
    listener();
  });

/** Change some fields and tell the components that read them. */
export function set(fields) {
  state = { ...state, ...fields };
  for (const listener of [...listeners]) listener();
}

/** Return `pick(state)`, and draw the component again when that changes. */
export function useStore(pick) {
  const [, redraw] = useState(0);
  const last = useRef();
  const picked = pick(state);
  last.current = { pick, picked };
  useEffect(() => {
    const listener = () => Object.is(last.current.pick(state), last.current.picked) || redraw((count) => count + 1);
    listeners.add(listener);
    listener(); // it may have changed since it was drawn
    return () => listeners.delete(listener);
  }, []);
  return picked;
}

/** Show a sentence; errors stay until they are closed. */
export function tell(text, kind = "done") {
  const notice = { text, kind };
  set({ notice });
  if (kind !== "error") setTimeout(() => state.notice === notice && set({ notice: null }), 6000);
}

/** Run something, and show its error if it fails. Returns undefined then. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (error.status === 401) set({ session: { ...state.session, signed_in: false } });
    else if (error.name !== "AbortError") tell(error.message, "error");
    return undefined;
  }
}
