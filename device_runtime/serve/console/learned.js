// How far learning is, and what came of it.
import { goBack } from "./changes.js";
import { Icon, Share } from "./parts.js";
import { current, set, useStore } from "./store.js";
import * as teaching from "./teaching.js";
import { html, useEffect, useRef } from "./vendor.js";
import { count, duration, list } from "./words.js";

const FEW = 10; // pictures; with fewer, more of them help most
const WEAK = 0.8; // share recognised below which more views are asked for

/** The state of what is being sent or learned, and the result. */
export function Learned({ field }) {
  const teach = useStore((state) => state.teach);
  const job = useStore((state) => state.jobs[state.teach.job]);
  const box = useRef();
  useEffect(() => {
    box.current?.scrollIntoView({ block: "nearest" });
    if (job?.state !== "done") return;
    set({ change: { generation: job.result.generation, back: null } });
    if (current().name.trim() === job.label) set({ name: "" }); // what comes next is something else
  }, [job?.state]);

  if (teach.phase === "sending") {
    return html`
      <div class="job" role="status">
        <p>Sending ${count(teach.total, "picture")} of <b>${teach.label}</b> …</p>
        <progress max=${teach.total} value=${teach.sent} aria-label="Sent"></progress>
      </div>
    `;
  }
  if (!job) return null;
  if (!teaching.ENDED.includes(job.state)) return html`<${Running} job=${job} />`;
  const more = (name) => {
    teaching.close();
    set({ name });
    field.current?.focus();
  };
  return html`
    <div class="job" role="status" ref=${box}>
      ${job.state === "done" && html`<${Done} job=${job} more=${more} bad=${teach.bad ?? []} left_out=${teach.left_out ?? 0} />`}
      ${job.state === "refused" && html`<${Refused} job=${job} />`}
      ${job.state === "failed" && html`<p class="problem"><b>It could not be learned.</b> ${job.error?.error}</p>`}
      ${job.state === "cancelled" && html`<p>Stopped. Nothing was changed.</p>`}
      <div class="buttons">
        <button type="button" class="quiet" onClick=${teaching.close}>OK</button>
      </div>
    </div>
  `;
}

const STAGES = {
  embedding: "Looking at the pictures",
  learning: "Learning",
  trying: "Trying out what was learned",
  checking: "Checking that nothing was forgotten",
  saving: "Saving",
};

function Running({ job }) {
  const left = job.seconds_left;
  return html`
    <div class="job" role="status">
      <p>
        Learning <b>${job.label}</b><br />
        <span class="small">${STAGES[job.stage] ?? "Waiting"} … ${left ? `about ${duration(left)} left` : ""}</span>
      </p>
      <progress max="1" value=${job.share || null} aria-label="Learned"></progress>
      <button type="button" class="quiet" onClick=${() => teaching.cancel(job.id)}>Stop</button>
    </div>
  `;
}

function Done({ job, more, bad, left_out }) {
  const { result } = job;
  const taught = result.taught?.[0];
  const images = taught?.held_out?.images ?? 0;
  const right = Math.round(images * (taught?.held_out?.accuracy ?? 0));
  const confused = Object.entries(taught?.confused ?? {}).filter(([, times]) => times > 0);
  const others = confused.sort(([, a], [, b]) => b - a).map(([name]) => name);
  const weak = taught && (taught.images < FEW || (images && right < WEAK * images));
  return html`
    <h3>Learned: ${job.label}</h3>
    ${images > 0 &&
    html`
      <p><${Share} right=${right} images=${images} /> recognised in a test with pictures kept out of learning</p>
      <p class="hint">They are from the same occasion, so other days will be harder.</p>
    `}
    ${left_out > 0 && html`<p class="hint">${count(left_out, "picture")} of the folder were left out: more would not have fitted.</p>`}
    ${others.length > 0 && html`<p>Mixed up with <b>${list(others)}</b>.</p>`}
    ${(result.warnings ?? []).map((warning) => html`<p class="note">${warning}</p>`)}
    ${bad.length > 0 &&
    html`<p class="warning">${count(bad.length, "file")} could not be used: ${list(bad.map((one) => one.name))}. ${bad[0].reason}</p>`}
    <button type="button" class="primary large" onClick=${() => goBack()}><${Icon} name="undo" /> Undo</button>
    ${(weak || others.length > 0) && html`<p>What would help:</p>`}
    <div class="buttons">
      ${[job.label, ...others.slice(0, 2)].map(
        (name) => html`<button type="button" class="quiet" onClick=${() => more(name)}>Show more of ${name}</button>`,
      )}
    </div>
  `;
}

function Refused({ job }) {
  const sentence = (job.error?.error ?? "").replace(/^nothing was changed: /, "");
  return html`
    <h3>Not learned, to protect what it knows</h3>
    <p class="warning">${sentence}</p>
    <p>Nothing was changed. What usually helps:</p>
    <ul>
      <li>only ${job.label} in the middle of the picture, nothing else</li>
      <li>more and different views: near and far, all sides, other light</li>
      <li>if it is something that the device already knows: teach it under that name</li>
    </ul>
  `;
}
