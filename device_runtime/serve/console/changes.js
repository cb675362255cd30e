// Changes of what the device knows, and the way back.
import { post } from "./api.js";
import { refreshMemory } from "./connection.js";
import { Icon } from "./parts.js";
import { attempt, current, set, tell, useStore } from "./store.js";
import { html, useState } from "./vendor.js";
import { changed } from "./words.js";

/** Make a change that the device answers with a result; it can then be undone with one button. Returns the result. */
export async function change(path, body) {
  const result = await attempt(() => post(path, body));
  if (result) {
    const said = [result.left && `What is left of it: ${result.left}.`, ...(result.warnings ?? [])].filter(Boolean);
    set({ change: { generation: result.generation, back: null, said } });
    await attempt(refreshMemory);
  }
  return result;
}

/** Go back to a generation (null: to the one before the current one). */
export async function goBack(generation = null) {
  const from = current().status?.generation;
  const result = await attempt(() => post("v1/rollback", generation === null ? {} : { generation }));
  if (!result) return;
  set({ change: { generation: result.generation, back: from }, teach: { phase: "idle" } });
  await attempt(refreshMemory);
  tell("Done. The device knows again exactly what it knew then.");
}

const find = (history, number) => history?.generations.find((one) => one.number === number);

/** The last change with the button that takes it back: large after a change of this visit, small otherwise. */
export function Undo({ besideResult }) {
  const history = useStore((state) => state.history);
  const last = useStore((state) => state.change);
  const told = useStore((state) => state.teach.phase === "ended"); // the result has a button of its own
  const [busy, setBusy] = useState(false);
  const now = find(history, history?.generation);
  if (!now || (besideResult && told && last?.generation === now.number)) return null;
  const run = async (generation) => {
    setBusy(true);
    await goBack(generation);
    setBusy(false);
  };
  const fresh = last?.generation === now.number;
  if (fresh && last.back !== null) {
    const undone = find(history, last.back);
    return html`
      <section class="undo" aria-label="Last change">
        <p>You went back. ${undone && html`Not in use now: <b>${changed(undone)}</b>`}</p>
        <button type="button" class="quiet" disabled=${busy} onClick=${() => run(last.back)}>Take that back</button>
      </section>
    `;
  }
  if (now.parent === null || now.parent === undefined || !find(history, now.parent)?.intact) return null;
  return html`
    <section class="undo ${fresh ? "fresh" : ""}" aria-label="Last change">
      <p>${fresh ? "" : "Last change: "}<b>${changed(now)}</b></p>
      <button type="button" class=${fresh ? "primary" : "quiet"} disabled=${busy} onClick=${() => run(null)}>
        <${Icon} name="undo" /> Undo
      </button>
      ${fresh && (last.said ?? []).map((sentence) => html`<p class="small said">${sentence}</p>`)}
    </section>
  `;
}
