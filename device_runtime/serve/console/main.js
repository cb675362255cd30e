// The page: who is there, which view, and what to say above it.
import { Classes } from "./classes.js";
import { DeviceView } from "./device.js";
import { History } from "./history.js";
import { Live } from "./live.js";
import { Icon } from "./parts.js";
import { open, SignIn, tokenFromAddress } from "./signin.js";
import { set, useStore } from "./store.js";
import { Tray } from "./tray.js";
import { html, render, useEffect, useRef, useState } from "./vendor.js";

const VIEWS = {
  live: ["Live", Live],
  sort: ["To sort", Tray],
  known: ["Known", Classes],
  history: ["History", History],
  device: ["Device", DeviceView],
};
const asked = () => (location.hash.slice(2) in VIEWS ? location.hash.slice(2) : "live");

function App() {
  const session = useStore((state) => state.session);
  if (!session) return html`<p class="empty">Connecting …</p>`;
  return html`
    <${Notice} />
    ${session.token_needed && !session.signed_in ? html`<${SignIn} />` : html`<${Console} session=${session} />`}
  `;
}

function Console({ session }) {
  const [view, setView] = useState(asked());
  const tray = useStore((state) => state.tray.length);
  const title = useRef();
  const first = useRef(true);
  const go = (name) => {
    location.hash = `/${name}`;
  };
  useEffect(() => {
    const listener = () => setView(asked());
    window.addEventListener("hashchange", listener);
    return () => window.removeEventListener("hashchange", listener);
  }, []);
  useEffect(() => {
    document.title = `${VIEWS[view][0]} – ${session.device ?? "SSD-Edge"}`;
    if (!first.current) title.current.focus({ preventScroll: true }); // a screen reader reads the new view
    if (!first.current) window.scrollTo(0, 0);
    first.current = false;
  }, [view]);
  const [name, View] = VIEWS[view];
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); title.current.focus(); }}>Skip to the content</a>
    <header>
      <img src="console/mark.svg" alt="" width="32" height="32" />
      <span class="brand">${session.device || "SSD-Edge"}</span>
      <${Connection} />
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([key, [text]]) => html`
            <a href="#/${key}" aria-current=${key === view ? "page" : null}>
              <${Icon} name=${key} /><span>${text}</span>
              ${key === "sort" && html`<span class="count ${tray ? "" : "none"}">${tray}<span class="spoken"> pictures</span></span>`}
            </a>
          `,
        )}
      </nav>
    </header>
    <main id="main">
      <h1 ref=${title} tabindex="-1" class=${view === "live" ? "spoken" : ""}>${name}</h1>
      <${View} go=${go} />
    </main>
  `;
}

function Connection() {
  const connection = useStore((state) => state.connection);
  const text = { connecting: "Connecting", open: "Connected", lost: "No connection. Trying again …" }[connection];
  return html`<span class="connection ${connection}" role="status">${text}</span>`;
}

function Notice() {
  const notice = useStore((state) => state.notice);
  return html`
    <div class="notices" role=${notice?.kind === "error" ? "alert" : "status"}>
      ${notice &&
      html`
        <div class="notice ${notice.kind}">
          <p>${notice.text}</p>
          <button type="button" class="quiet icon-only" aria-label="Close this message" onClick=${() => set({ notice: null })}><${Icon} name="close" /></button>
        </div>
      `}
    </div>
  `;
}

window.addEventListener("hashchange", () => {
  const token = tokenFromAddress();
  if (token) open(token);
});
const root = document.getElementById("console");
root.textContent = "";
render(html`<${App} />`, root);
open(tokenFromAddress());
