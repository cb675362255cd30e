// The history as a line that can be walked back. Steps that were undone stay beside it.
import { goBack, Undo } from "./changes.js";
import { Dialog } from "./parts.js";
import { useStore } from "./store.js";
import { html, useState } from "./vendor.js";
import { changed, details, moment } from "./words.js";

/** Return the numbers from the current generation to its first ancestor. */
export function line(history) {
  const byNumber = new Map(history.generations.map((one) => [one.number, one]));
  const found = new Set();
  for (let at = byNumber.get(history.generation); at && !found.has(at.number); at = byNumber.get(at.parent)) found.add(at.number);
  return found;
}

/** Show every step, the newest first. */
export function History() {
  const history = useStore((state) => state.history);
  const [asked, setAsked] = useState(null);
  const [busy, setBusy] = useState(false);
  if (!history) return html`<p class="empty">Loading …</p>`;
  const used = line(history);
  const steps = [...history.generations].reverse();
  const go = async () => {
    setBusy(true);
    await goBack(asked.number);
    setBusy(false);
    setAsked(null);
  };
  return html`
    <div class="past">
      <${Undo} />
      <p class="hint">Every change is a step. Going back to one restores exactly what the device knew then.</p>
      <ol class="steps" reversed>
        ${steps.map((step) => html`<${Step} key=${step.number} step=${step} used=${used.has(step.number)} ask=${() => setAsked(step)} />`)}
      </ol>
      ${asked &&
      html`
        <${Dialog} title=${used.has(asked.number) ? "Go back?" : "Use this step again?"} close=${() => setAsked(null)}>
          <p>The device will know what it knew right after <b>${changed(asked)}</b> (step ${asked.number}).</p>
          <p>Nothing is lost: the other steps stay in this list, and you can return to them.</p>
          <div class="buttons">
            <button type="button" class="primary" disabled=${busy} onClick=${go}>${busy ? "One moment …" : "Go there"}</button>
            <button type="button" class="quiet" onClick=${() => setAsked(null)}>Cancel</button>
          </div>
        </${Dialog}>
      `}
    </div>
  `;
}

function Step({ step, used, ask }) {
  const does = used ? "Go back to here" : "Use this again";
  const when = moment(step.created_utc);
  const more = [details(step), when].filter(Boolean).join(" · ");
  return html`
    <li value=${step.number} class="step ${used ? "used" : "aside"} ${step.current ? "now" : ""}" aria-current=${step.current ? "step" : null}>
      <div>
        <h3>${changed(step)}</h3>
        <p class="small">Step ${step.number}${more && ` · ${more}`}</p>
        ${!used && html`<p class="small">Not in use${step.parent ? `; it followed step ${step.parent}` : ""}</p>`}
        ${!step.intact && html`<p class="problem">Damaged: ${step.problem}</p>`}
      </div>
      ${step.current
        ? html`<span class="badge">now</span>`
        : html`<button type="button" class="quiet" disabled=${!step.intact} aria-label=${`${does}: step ${step.number}, ${changed(step)}`} onClick=${ask}>${does}</button>`}
    </li>
  `;
}
