// The tray: moments that the device was not sure about. They are put onto names, and learned.
import { post, remove } from "./api.js";
import { refreshTray } from "./connection.js";
import { Learned } from "./learned.js";
import { Icon, NameField } from "./parts.js";
import { Ring } from "./ring.js";
import { attempt, current, set, useStore } from "./store.js";
import * as teaching from "./teaching.js";
import { html, useRef, useState } from "./vendor.js";
import { count, probability, UNKNOWN } from "./words.js";

const MOMENTS = "application/x-ssd-edge-moments"; // what is dragged: ids of moments
const FIRST = "First choose one picture or several.";
const baskets = {}; // capture → ids of the moments in it, which are shown there and not among the others

/** Put moments into the capture of a name. */
async function put(ids, label) {
  await attempt(async () => {
    const { id } = await teaching.captureOf(label);
    const capture = await post(`v1/captures/${id}/tray`, { ids });
    set({ captures: { ...current().captures, [id]: capture } });
    baskets[id] = [...(baskets[id] ?? []), ...ids];
    set({ tray: [...current().tray] });
  });
}

async function learn(id) {
  const job = await attempt(() => teaching.learn(id));
  const moments = baskets[id] ?? [];
  if (!job) return;
  delete baskets[id];
  for (const moment of moments) await remove(`v1/tray/${encodeURIComponent(moment)}`).catch(() => null);
  await attempt(refreshTray);
}

function discard(id) {
  delete baskets[id];
  teaching.discard(id);
}

/** Sort moments onto names, by drag and drop or by choosing. */
export function Tray() {
  const tray = useStore((state) => state.tray);
  const classes = useStore((state) => state.classes) ?? [];
  const captures = useStore((state) => state.captures);
  const [chosen, setChosen] = useState(new Set());
  const [name, setName] = useState("");
  const [problem, setProblem] = useState("");
  const field = useRef();
  const taken = new Set(Object.values(baskets).flat());
  const moments = tray.filter((moment) => !taken.has(moment.id));
  const ids = moments.map((moment) => moment.id).filter((id) => chosen.has(id));
  const sending = useStore((state) => state.teach.capture);
  const open = Object.values(captures).filter(
    (one) => one.camera === null && one.state === "held" && one.images > 0 && one.id !== sending,
  );

  const choose = (id) => {
    const next = new Set(chosen);
    if (!next.delete(id)) next.add(id);
    setChosen(next);
    setProblem("");
  };
  const drag = (event, id) => {
    event.dataTransfer.setData(MOMENTS, JSON.stringify(chosen.has(id) ? ids : [id]));
    event.dataTransfer.effectAllowed = "move";
  };
  const onto = (moved, label) => {
    if (!moved.length) return setProblem(FIRST);
    setChosen(new Set());
    setName("");
    return put(moved, label);
  };
  const submit = (event) => {
    event.preventDefault();
    if (!ids.length) setProblem(FIRST);
    else if (!name.trim()) setProblem("Type what they show.");
    else onto(ids, name.trim());
  };
  const clear = async () => {
    for (const id of ids) await attempt(() => remove(`v1/tray/${encodeURIComponent(id)}`));
    setChosen(new Set());
    attempt(refreshTray);
  };

  return html`
    <div class="tray">
      <section aria-labelledby="moments-title">
        <h2 id="moments-title">Not sure about these</h2>
        <p class="hint">
          Moments that looked unknown or doubtful, the newest first. They are kept in memory only and are gone when the service
          restarts.
        </p>
        ${!moments.length && html`<p class="empty">Nothing to sort. When the device is not sure what it sees, the picture appears here.</p>`}
        <ul class="moments">
          ${moments.map(
            (moment) => html`
              <li key=${moment.id}>
                <button
                  type="button"
                  class="moment"
                  draggable="true"
                  aria-pressed=${chosen.has(moment.id) ? "true" : "false"}
                  onClick=${() => choose(moment.id)}
                  onDragStart=${(event) => drag(event, moment.id)}
                >
                  <img src="v1/tray/${encodeURIComponent(moment.id)}.jpg" alt="" loading="lazy" draggable="false" />
                  <span>${called(moment)}</span>
                </button>
              </li>
            `,
          )}
        </ul>
        ${ids.length > 0 && html`<button type="button" class="primary toward" onClick=${() => toward(field.current)}>${count(ids.length, "picture")}: say what it is</button>`}
      </section>
      <section class="card onto" aria-labelledby="onto-title">
        <h2 id="onto-title">What is it?</h2>
        <p class="hint" role="status">${ids.length ? `${count(ids.length, "picture")} chosen` : "Choose pictures, or drag them onto a name."}</p>
        <form onSubmit=${submit}>
          <${NameField} label="Name" value=${name} change=${setName} problem=${problem} hint="A known name or a new one" field=${field} />
          <div class="buttons">
            <button type="submit" class="primary">Put there</button>
            <button type="button" class="quiet" disabled=${!ids.length} onClick=${clear}>Throw away</button>
          </div>
        </form>
        <ul class="targets" aria-label="Known names">
          ${classes.map(({ name: known }) => html`<${Target} key=${known} name=${known} onto=${onto} ids=${ids} />`)}
        </ul>
        ${open.map((capture) => html`<${Basket} key=${capture.id} capture=${capture} />`)}
        <${Learned} field=${field} />
      </section>
    </div>
  `;
}

function toward(field) {
  field.closest("section").scrollIntoView();
  field.focus({ preventScroll: true });
}

function called({ label, nearest, score, frames }) {
  const views = frames > 1 ? ` · ${frames} pictures` : "";
  if (label !== UNKNOWN) return `called ${label}${score === null ? "" : `, ${probability(score)}`}${views}`;
  return `${nearest ? `unknown, most like ${nearest}` : "unknown"}${views}`;
}

/** A known name, onto which pictures are dropped; pressing it takes the chosen ones. */
function Target({ name, ids, onto }) {
  const [over, setOver] = useState(false);
  const takes = (event) => event.dataTransfer.types.includes(MOMENTS);
  return html`
    <li>
      <button
        type="button"
        class="chip ${over ? "over" : ""}"
        aria-disabled=${ids.length ? null : "true"}
        onClick=${() => onto(ids, name)}
        onDragOver=${(event) => {
          if (!takes(event)) return;
          event.preventDefault();
          setOver(true);
        }}
        onDragLeave=${() => setOver(false)}
        onDrop=${(event) => {
          event.preventDefault();
          setOver(false);
          onto(JSON.parse(event.dataTransfer.getData(MOMENTS)), name);
        }}
      >
        ${name}
      </button>
    </li>
  `;
}

/** What was put onto one name and is not learned yet. */
function Basket({ capture }) {
  const { id, label, different, needed } = capture;
  const enough = different >= needed;
  const busy = useStore((state) => state.teach.phase === "learning");
  return html`
    <div class="basket" role="group" aria-label=${`Pictures of ${label}`}>
      <${Ring} different=${different} needed=${needed} small />
      <p>
        <b>${label}</b><br />
        ${count(different, "different view")}${enough ? "" : `; ${needed} are needed. Add more of it.`}
      </p>
      <div class="buttons">
        <button type="button" class="primary" disabled=${!enough || busy} onClick=${() => learn(id)}>Learn</button>
        <button type="button" class="quiet icon-only" aria-label=${`Discard the pictures of ${label}`} onClick=${() => discard(id)}><${Icon} name="close" /></button>
      </div>
    </div>
  `;
}
