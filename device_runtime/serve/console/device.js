// How the device itself is: what it sees compared to before, the machine, cameras, and a backup.
import { download, get, remove } from "./api.js";
import { disconnect } from "./connection.js";
import { Icon } from "./parts.js";
import { attempt, set, useStore } from "./store.js";
import { html, useEffect, useState } from "./vendor.js";
import { count, duration, megabytes, percent } from "./words.js";

const LEVELS = {
  collecting: ["Too few pictures yet", "After some hundred pictures it can be said whether they still look as they did."],
  stable: ["As usual", "What the cameras see looks as it did in the beginning."],
  moderate: ["Somewhat different", "Pictures look a little different than in the beginning. Has the light or the camera changed?"],
  drifted: ["Different", "Pictures look clearly different than in the beginning. Clean the lens, check the light, or teach the things again as they look now."],
};
const WARM = 80; // °C
const AGAIN = 10_000; // ms between two looks

/** Show the state of the device. */
export function DeviceView() {
  const status = useStore((state) => state.status);
  const session = useStore((state) => state.session);
  const cameras = useStore((state) => state.cameras);
  useEffect(() => {
    const read = async () => document.hidden || set({ status: await get("v1/status"), cameras: (await get("v1/cameras")).cameras });
    attempt(read);
    const timer = setInterval(() => read().catch(() => null), AGAIN); // a lost connection is shown above
    return () => clearInterval(timer);
  }, []);
  if (!status) return html`<p class="empty">Loading …</p>`;
  const { machine } = status;
  return html`
    <div class="device">
      ${status.warning && html`<p class="warning">${status.warning}</p>`}
      <${Drift} drift=${status.drift} />
      <section class="card" aria-labelledby="machine-title">
        <h2 id="machine-title">Machine</h2>
        <dl>
          <dt>Temperature</dt>
          <dd class=${machine.hottest >= WARM ? "problem" : ""}>${machine.hottest === null ? "not known" : `${Math.round(machine.hottest)} °C${machine.hottest >= WARM ? ", hot" : ""}`}</dd>
          <dt>Free memory</dt>
          <dd>${megabytes(machine.available_mb)}</dd>
          <dt>Used by this service</dt>
          <dd>${megabytes(machine.rss_mb)}</dd>
          <dt>Free on disk</dt>
          <dd>${machine.disk_free_mb === null ? "not known" : megabytes(machine.disk_free_mb)}</dd>
          ${machine.power_mode && html`<dt>Power</dt><dd>${machine.power_mode}</dd>`}
          ${status.uptime !== undefined && html`<dt>Running for</dt><dd>${duration(status.uptime)}</dd>`}
        </dl>
      </section>
      <section class="card" aria-labelledby="cameras-title">
        <h2 id="cameras-title">Cameras</h2>
        ${!cameras.length && html`<p class="hint">None. Start the service with --camera to have it look through one.</p>`}
        <ul class="plain">${cameras.map((camera) => html`<${CameraState} key=${camera.id} camera=${camera} />`)}</ul>
      </section>
      <${Backup} />
      <section class="card" aria-labelledby="about-title">
        <h2 id="about-title">About</h2>
        <dl>
          <dt>Set up from</dt>
          <dd>${status.bundle}${status.signed_by ? ", signed" : ""}</dd>
          <dt>Learner</dt>
          <dd>${status.learner}</dd>
          <dt>Version</dt>
          <dd>SSD-Edge ${session?.version}</dd>
        </dl>
        <p class="hint">Pictures are looked at and not stored. <a href="docs">For programs: the interface</a></p>
        ${session?.token_needed && html`<button type="button" class="quiet" onClick=${signOut}>Sign out</button>`}
      </section>
    </div>
  `;
}

function Drift({ drift }) {
  const watched = useStore((state) => state.cameras.length > 0);
  const [title, text] = LEVELS[drift?.level ?? (watched ? "collecting" : "")] ?? ["Not watched", "The service has no camera."];
  const rejected = drift?.reject_rate;
  return html`
    <section class="card" aria-labelledby="drift-title">
      <h2 id="drift-title">What it sees</h2>
      <p class="level ${drift?.level ?? ""}"><b>${title}</b></p>
      <p>${text}</p>
      ${rejected !== null && rejected !== undefined && html`<p class="small">${percent(rejected)} of the recent pictures were unknown.</p>`}
    </section>
  `;
}

function CameraState({ camera }) {
  const { id, source, state, fps, latency_ms, problem } = camera;
  const figures = state === "running" && fps ? `${fps.toFixed(1)} pictures a second${latency_ms ? `, answer after ${Math.round(latency_ms)} ms` : ""}` : state;
  return html`
    <li>
      <b>${id}</b> <span class="small">${source}</span><br />
      <span class=${state === "lost" ? "problem" : "small"}>${problem || figures}</span>
    </li>
  `;
}

function Backup() {
  const [busy, setBusy] = useState(false);
  const known = useStore((state) => state.classes?.length ?? 0);
  const save = async () => {
    setBusy(true);
    await attempt(() => download("v1/export", "backup.ssdedge"));
    setBusy(false);
  };
  return html`
    <section class="card" aria-labelledby="backup-title">
      <h2 id="backup-title">Backup</h2>
      <p>One file with everything that the device knows (${count(known, "thing")}), without pictures. Another device can be set up from it.</p>
      <button type="button" class="primary" disabled=${busy} onClick=${save}>${busy ? "One moment …" : "Save a backup"}</button>
    </section>
  `;
}

async function signOut() {
  await attempt(() => remove("v1/session"));
  disconnect();
  set({ session: { token_needed: true, signed_in: false } });
}
