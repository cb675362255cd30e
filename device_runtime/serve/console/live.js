// The live view: what a camera sees, and what the device says it is.
import { missing, useOwnCamera } from "./owncamera.js";
import { Spoken } from "./parts.js";
import { current, OWN, set, useStore } from "./store.js";
import { Teach } from "./teach.js";
import { Undo } from "./changes.js";
import { html, useEffect, useRef, useState } from "./vendor.js";
import { probability, sure, UNKNOWN } from "./words.js";

const QUIET = 3000; // ms between two answers that are read out
const STATES = { starting: "is starting", lost: "is not reachable; trying again", ended: "has ended" };

/** Look at a camera, and teach from it. */
export function Live() {
  const source = useStore((state) => state.source);
  const [allowed, setAllowed] = useState(false); // the browser asks for permission only after a press
  const own = useOwnCamera(source === OWN && allowed);
  return html`
    <div class="live">
      <div class="seen">
        <${Sources} />
        ${source === OWN
          ? html`<${OwnPicture} own=${own} allowed=${allowed} allow=${() => setAllowed(true)} />`
          : html`<${Picture} id=${source} />`}
        <${Answer} source=${source} />
      </div>
      <div class="side">
        <${Undo} besideResult />
        <${Teach} source=${source} grab=${own.grab} ready=${source !== OWN || own.running} />
      </div>
    </div>
  `;
}

/** Choose among the cameras of the device and that of the browser. */
function Sources() {
  const cameras = useStore((state) => state.cameras);
  const source = useStore((state) => state.source);
  const all = [...cameras.map(({ id }) => ({ id, name: `Camera ${id}` })), { id: OWN, name: "This screen's camera" }];
  return html`
    <div class="sources" role="group" aria-label="Camera">
      ${all.map(
        ({ id, name }) => html`
          <button type="button" class="chip" aria-pressed=${id === source ? "true" : "false"} onClick=${() => set({ source: id })}>
            ${name}
          </button>
        `,
      )}
    </div>
  `;
}

/** The picture of a camera of the device, not loaded while nobody sees it. */
function Picture({ id }) {
  const camera = useStore((state) => state.cameras.find((one) => one.id === id));
  const connection = useStore((state) => state.connection);
  const [seen, setSeen] = useState(!document.hidden);
  const image = useRef();
  useEffect(() => {
    const listener = () => setSeen(!document.hidden);
    document.addEventListener("visibilitychange", listener);
    return () => {
      document.removeEventListener("visibilitychange", listener);
      image.current?.removeAttribute("src"); // ends the stream
    };
  }, []);
  const shown = camera?.state === "running" && connection === "open" && seen;
  return html`
    <div class="picture">
      ${shown && html`<img ref=${image} key=${id} src="v1/cameras/${encodeURIComponent(id)}/live.mjpeg" alt="What camera ${id} sees now" />`}
      ${camera &&
      camera.state !== "running" &&
      html`<p class="over">Camera ${id} ${STATES[camera.state] ?? camera.state}. <small>${camera.problem}</small></p>`}
    </div>
  `;
}

function OwnPicture({ own, allowed, allow }) {
  const problem = missing() || own.problem;
  return html`
    <div class="picture">
      <video ref=${own.video} muted playsinline aria-label="What this screen's camera sees now"></video>
      ${problem
        ? html`<p class="over">${problem}</p>`
        : !allowed &&
          html`<div class="over"><button type="button" class="primary" onClick=${allow}>Use this camera</button></div>`}
    </div>
  `;
}

/** What the device says it is, in large type. */
function Answer({ source }) {
  const answer = useStore((state) => state.answers[source]);
  const classes = useStore((state) => state.classes);
  const generation = useStore((state) => state.status?.generation);
  const label = answer && (answer.stable ?? answer.label);
  const nearest = answer?.nearest;
  const teach = () => document.getElementById("teach")?.querySelector("input")?.focus();

  let title;
  let about;
  if (classes && !classes.length) {
    title = "Nothing learned yet";
    about = "Hold something in front of the camera, type its name, and hold the button.";
  } else if (!label) {
    title = "…";
    about = "Waiting for a picture";
  } else if (label === UNKNOWN) {
    title = html`<button type="button" class="unsure" onClick=${teach}>Not sure what this is <span>Teach it</span></button>`;
    about = nearest ? `It looks most like ${nearest}.` : "";
  } else {
    title = label;
    const words = label === nearest ? sure(answer.score) : "";
    about = words ? `${words}, ${probability(answer.score)}` : "";
  }
  const settling = answer && answer.stable === null && source !== OWN;
  return html`
    <section class="answer ${settling ? "settling" : ""}" aria-label="Answer">
      <h2 class="what">${title}</h2>
      <p class="about">${about}</p>
      <p class="small">
        ${generation !== undefined && `Step ${answer?.generation ?? generation}`}
        ${answer?.latency_ms !== undefined && answer?.latency_ms !== null && ` · ${Math.round(answer.latency_ms)} ms`}
      </p>
      <${Announced} label=${label} />
    </section>
  `;
}

/** Read out what is seen when it changes, and not more often than somebody can listen. */
function Announced({ label }) {
  const [text, setText] = useState("");
  const spoken = useRef(0);
  useEffect(() => {
    if (!label || current().teach.phase === "collecting") return undefined;
    const wait = Math.max(600, spoken.current + QUIET - Date.now());
    const timer = setTimeout(() => {
      spoken.current = Date.now();
      setText(label === UNKNOWN ? "Not sure what this is" : label);
    }, wait);
    return () => clearTimeout(timer);
  }, [label]);
  return html`<${Spoken} live>${text}</${Spoken}>`;
}
