// Small parts that several views use.
import { useStore } from "./store.js";
import { html, useEffect, useId, useRef } from "./vendor.js";

const ICONS = {
  live: "M3 8.5A2.5 2.5 0 0 1 5.5 6H8l1.5-2h5L16 6h2.5A2.5 2.5 0 0 1 21 8.5v8a2.5 2.5 0 0 1-2.5 2.5h-13A2.5 2.5 0 0 1 3 16.5zM12 9a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7",
  sort: "M4 13 6.5 5h11L20 13M4 13v5.5a.5.5 0 0 0 .5.5h15a.5.5 0 0 0 .5-.5V13M4 13h5a3 3 0 0 0 6 0h5",
  known: "M4 5v6.6L12.4 20 20 12.4 11.6 4H5a1 1 0 0 0-1 1M8.5 8.5v.01",
  history: "M4 12a8 8 0 1 0 2.5-5.8M4 4v4h4M12 8v4.5l3 2",
  device: "M7 7h10v10H7zM10 4v3M14 4v3M10 17v3M14 17v3M4 10h3M4 14h3M17 10h3M17 14h3",
  undo: "M8 5 4 9l4 4M4.5 9H14a5.5 5.5 0 0 1 0 11h-4",
  close: "M6 6l12 12M18 6 6 18",
  folder: "M3 18V6a1 1 0 0 1 1-1h5l2 2.5h9a1 1 0 0 1 1 1V18a1 1 0 0 1-1 1H4a1 1 0 0 1-1-1",
  pictures: "M4 5h16v14H4zM4 16l5-5 4 4 2.5-2.5L20 17M15.5 9v.01",
};

/** Draw a decorative icon. */
export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${ICONS[name]} /></svg>
`;

/** Ask in front of the page. Escape and a click outside close it; the focus returns to where it was. */
export function Dialog({ title, close, children }) {
  const box = useRef();
  const id = useId();
  useEffect(() => {
    const dialog = box.current;
    const opener = document.activeElement;
    dialog.showModal();
    return () => {
      dialog.close();
      (opener.isConnected ? opener : document.querySelector("h1")).focus({ preventScroll: true });
    };
  }, []);
  const outside = (event) => event.target === box.current && close();
  return html`
    <dialog ref=${box} aria-labelledby=${id} onCancel=${close} onClick=${outside}>
      <div class="dialog">
        <h2 id=${id}>${title}</h2>
        ${children}
      </div>
    </dialog>
  `;
}

/** A field for the name of a thing; known names are proposed. */
export function NameField({ label, value, change, problem, hint, field, names }) {
  const id = useId();
  const classes = useStore((state) => state.classes) ?? [];
  const proposed = names ?? classes.map((one) => one.name);
  return html`
    <div class="field">
      <label for=${id}>${label}</label>
      <input
        id=${id}
        ref=${field}
        list="${id}-names"
        value=${value}
        maxlength="64"
        autocomplete="off"
        autocapitalize="off"
        spellcheck="false"
        enterkeyhint="done"
        aria-invalid=${problem ? "true" : null}
        aria-describedby="${id}-about"
        onInput=${(event) => change(event.target.value)}
      />
      <datalist id="${id}-names">${proposed.map((name) => html`<option value=${name} />`)}</datalist>
      <p id="${id}-about" class=${problem ? "problem" : "hint"}>${problem || hint}</p>
    </div>
  `;
}

/** A share of recognised pictures as a bar with its figures beside it. */
export const Share = ({ right, images }) => html`
  <span class="share">
    <svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
      <rect class="rail" width="100" height="8" /><rect class="fill" width=${(100 * right) / images} height="8" />
    </svg>
    <span>${right} of ${images}</span>
  </span>
`;

/** Text that is read out but not shown. */
export const Spoken = ({ children, live }) =>
  html`<p class="spoken" role=${live ? "status" : null}>${children}</p>`;
