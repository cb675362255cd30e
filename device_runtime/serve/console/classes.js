// What the device knows: how well, what it mixes up, and how that is changed.
import { change, Undo } from "./changes.js";
import { Dialog, NameField, Share } from "./parts.js";
import { set, useStore } from "./store.js";
import { html, useState } from "./vendor.js";
import { count, list } from "./words.js";

/** List the things that the device knows. */
export function Classes({ go }) {
  const classes = useStore((state) => state.classes);
  const [asked, setAsked] = useState(null); // {what: "rename" | "merge" | "forget", one}
  const [searched, setSearched] = useState("");
  if (!classes) return html`<p class="empty">Loading …</p>`;
  const close = () => setAsked(null);
  const shown = classes.filter((one) => one.name.toLowerCase().includes(searched.trim().toLowerCase()));
  const more = (name) => {
    set({ name, teach: { phase: "idle" } });
    go("live");
  };
  return html`
    <div class="known">
      <${Undo} />
      <div class="heading">
        <h2>${count(classes.length, "thing")} known</h2>
        ${classes.length > 12 &&
        html`<input type="search" aria-label="Search names" placeholder="Search" value=${searched} onInput=${(event) => setSearched(event.target.value)} />`}
      </div>
      ${!classes.length && html`<p class="empty">It knows nothing yet. Teach it something in the live view.</p>`}
      <ul class="classes">
        ${shown.map((one) => html`<${One} key=${one.name} one=${one} ask=${(what) => setAsked({ what, one })} more=${more} alone=${classes.length < 2} />`)}
      </ul>
      ${asked?.what === "rename" && html`<${Rename} one=${asked.one} close=${close} />`}
      ${asked?.what === "merge" && html`<${Merge} one=${asked.one} others=${classes.filter((two) => two !== asked.one)} close=${close} />`}
      ${asked?.what === "forget" && html`<${Forget} one=${asked.one} close=${close} />`}
    </div>
  `;
}

function One({ one, ask, more, alone }) {
  const { name, images, origin, recognised, confused } = one;
  const mixed = (confused ?? []).map((other) => `${other.with} (${other.images})`);
  const never = recognised?.images > 0 && recognised.right === recognised.images;
  return html`
    <li class="card class">
      <h3>${name}</h3>
      <p class="small">${count(images, "picture")} · ${origin === "device" ? "taught here" : "came with the set-up"}</p>
      <p>${recognised?.images ? html`<${Share} right=${recognised.right} images=${recognised.images} /> recognised` : html`<span class="hint">Not tested</span>`}</p>
      <p class="mixed">${mixed.length ? html`Mixed up with ${list(mixed)}` : html`<span class="hint">${never && "Not mixed up with anything"}</span>`}</p>
      <div class="buttons">
        <button type="button" class="quiet" aria-label=${`Show more of ${name}`} onClick=${() => more(name)}>Show more</button>
        <button type="button" class="quiet" aria-label=${`Rename ${name}`} onClick=${() => ask("rename")}>Rename</button>
        <button type="button" class="quiet" aria-label=${`Merge ${name} with another`} disabled=${alone} onClick=${() => ask("merge")}>Merge</button>
        <button type="button" class="quiet" aria-label=${`Forget ${name}`} onClick=${() => ask("forget")}>Forget</button>
      </div>
    </li>
  `;
}

/** The buttons below a question. The page waits for the answer of the device before it closes. */
function Buttons({ does, action, close, disabled, danger }) {
  const [busy, setBusy] = useState(false);
  const run = async (event) => {
    event.preventDefault();
    setBusy(true);
    await action();
    close();
  };
  return html`
    <div class="buttons">
      <button type="submit" class=${danger ? "danger" : "primary"} disabled=${busy || disabled} onClick=${run}>${busy ? "One moment …" : does}</button>
      <button type="button" class="quiet" onClick=${close}>Cancel</button>
    </div>
  `;
}

function Rename({ one, close }) {
  const [name, setName] = useState(one.name);
  const wanted = name.trim();
  return html`
    <${Dialog} title="Rename ${one.name}" close=${close}>
      <form>
        <${NameField} label="New name" value=${name} change=${setName} names=${[]} hint="Only the name changes; what was learned stays." />
        <${Buttons} does="Rename" close=${close} disabled=${!wanted || wanted === one.name} action=${() => change("v1/rename", { label: one.name, new: wanted })} />
      </form>
    </${Dialog}>
  `;
}

function Merge({ one, others, close }) {
  const [other, setOther] = useState(one.confused?.[0]?.with ?? others[0].name);
  const [into, setInto] = useState(one.name);
  return html`
    <${Dialog} title="Merge ${one.name} with another" close=${close}>
      <form>
        <p>Both become one thing, with the pictures of both. Use it when two names mean the same. You can undo it.</p>
        <div class="field">
          <label for="merge-other">Merge with</label>
          <select id="merge-other" value=${other} onChange=${(event) => setOther(event.target.value)}>
            ${others.map(({ name }) => html`<option value=${name}>${name}</option>`)}
          </select>
        </div>
        <fieldset class="field">
          <legend>Name of both together</legend>
          ${[one.name, other].map(
            (name) => html`
              <label class="check"><input type="radio" name="into" checked=${into === name} onChange=${() => setInto(name)} /> ${name}</label>
            `,
          )}
        </fieldset>
        <${Buttons}
          does="Merge"
          close=${close}
          action=${() => change("v1/merge-labels", { labels: [one.name, other], into: into === one.name ? into : other })}
        />
      </form>
    </${Dialog}>
  `;
}

function Forget({ one, close }) {
  return html`
    <${Dialog} title="Forget ${one.name}?" close=${close}>
      <form>
        <p>The device will no longer answer <b>${one.name}</b>. What it learned from ${count(one.images, "picture")} is taken out. The other things stay; some answers may become a little more or less certain.</p>
        <p>You can undo it: the earlier steps in the history still contain ${one.name} until they are deleted.</p>
        <${Buttons} does="Forget ${one.name}" danger close=${close} action=${() => change("v1/forget", { label: one.name })} />
      </form>
    </${Dialog}>
  `;
}
