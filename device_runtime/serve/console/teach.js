// The card with which something is taught: its name, the button to hold, files and folders.
import { dropped, grouped } from "./files.js";
import { HoldButton } from "./hold.js";
import { Learned } from "./learned.js";
import { Dialog, Icon, NameField, Spoken } from "./parts.js";
import { GOOD, Ring } from "./ring.js";
import { set, tell, useStore } from "./store.js";
import * as teaching from "./teaching.js";
import { html, useRef, useState } from "./vendor.js";
import { count } from "./words.js";

const TAP = "ssd-edge.tap"; // kept in the browser: presses instead of holding

/** Teach what the camera sees, or what files show. */
export function Teach({ source, grab, ready }) {
  const name = useStore((state) => state.name);
  const teach = useStore((state) => state.teach);
  const classes = useStore((state) => state.classes) ?? [];
  const [problem, setProblem] = useState("");
  const [groups, setGroups] = useState(null);
  const [over, setOver] = useState(false);
  const [tap, setTap] = useState(localStorage.getItem(TAP) === "yes");
  const field = useRef();
  const label = name.trim();
  const known = classes.find((one) => one.name === label);
  const collecting = teach.phase === "collecting";
  const busy = ["sending", "learning"].includes(teach.phase);
  const ended = teach.phase === "ended";

  const typed = (value) => {
    setProblem("");
    set({ name: value });
  };
  const begin = () => {
    if (!label) {
      setProblem("First type what it is.");
      field.current.focus();
      return;
    }
    if (!ready) {
      setProblem("First switch on the camera, or choose pictures.");
      return;
    }
    teaching.begin(label, source, grab);
  };
  const take = (found) => {
    const folders = Object.keys(found);
    if (!folders.length) return tell("There is no picture among these files.", "error");
    if (folders.length > 1 || folders[0]) return setGroups(found); // folders have names of their own
    if (!label) {
      setProblem("First type what these pictures show.");
      field.current.focus();
      return undefined;
    }
    return teaching.teachFiles([{ label, files: found[""] }]);
  };
  const drop = async (event) => {
    event.preventDefault();
    setOver(false);
    if (!busy && !collecting) take(await dropped(event.dataTransfer));
  };
  const chosen = (event) => {
    take(grouped(event.target.files));
    event.target.value = ""; // the same files can be chosen again
  };

  return html`
    <section
      id="teach"
      class="card teach ${over ? "over" : ""}"
      aria-labelledby="teach-title"
      onDragOver=${(event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave=${() => setOver(false)}
      onDrop=${drop}
    >
      <h2 id="teach-title">Teach</h2>
      <${NameField}
        label="What is it?"
        value=${name}
        change=${typed}
        problem=${problem}
        hint=${known ? `Known from ${count(known.images, "picture")}; more will be added.` : label ? "This is new." : "A new name, or one that it should know better."}
        field=${field}
      />
      <div class="holding">
        <${HoldButton}
          active=${collecting}
          start=${begin}
          stop=${teaching.letGo}
          toggle=${tap}
          disabled=${busy}
        >
          ${collecting ? (tap ? "Stop" : "Turn it slowly …") : tap ? "Start" : "Hold to teach"}
        </${HoldButton}>
        <${ended || busy ? Learned : Progress} field=${field} />
      </div>
      <label class="check">
        <input
          type="checkbox"
          checked=${tap}
          onChange=${(event) => {
            setTap(event.target.checked);
            localStorage.setItem(TAP, event.target.checked ? "yes" : "no");
          }}
        />
        Press to start and to stop, without holding
      </label>
      <div class="files">
        <${Choose} icon="pictures" disabled=${busy || collecting} chosen=${chosen} accept="image/*">Choose pictures</${Choose}>
        <${Choose} icon="folder" disabled=${busy || collecting} chosen=${chosen} webkitdirectory>Choose a folder</${Choose}>
        <p class="hint wide">or drop pictures and folders here</p>
      </div>
      ${groups && html`<${Folders} groups=${groups} close=${() => setGroups(null)} />`}
    </section>
  `;
}

/** A button that opens the file dialog. */
function Choose({ icon, children, chosen, disabled, ...rest }) {
  const input = useRef();
  return html`
    <button type="button" class="quiet" disabled=${disabled} onClick=${() => input.current.click()}>
      <${Icon} name=${icon} /> ${children}
    </button>
    <input ref=${input} type="file" multiple hidden tabindex="-1" onChange=${chosen} ...${rest} />
  `;
}

/** How many different views there are, and what to do next. Its size never changes. */
function Progress() {
  const teach = useStore((state) => state.teach);
  const capture = useStore((state) => state.captures[state.teach.capture]);
  const different = capture?.different ?? 0;
  const needed = capture?.needed ?? 3;
  let text = `${needed} different views are enough to begin, about ${GOOD} are good.`;
  if (teach.phase === "held" && capture?.hint === "preparing") text = "One moment: the views are being counted.";
  else if (teach.phase === "held" && different < needed) {
    text = `${count(different, "different view")} so far, ${needed} are needed. Hold again and turn it.`;
  } else if (["collecting", "held"].includes(teach.phase)) {
    if (capture?.hint === "preparing") text = "Getting ready. Go on showing it.";
    else if (capture?.hint === "full") text = "That is as much as fits. Let go.";
    else if (capture?.hint === "turn") text = "Turn it: these views are all alike.";
    else if (different >= GOOD) text = "Very good. Let go.";
    else if (different >= needed) text = "Enough to learn. More views make it better.";
    else text = "Show it from all sides.";
  }
  return html`
    <div class="progress">
      <${Ring} different=${different} needed=${needed} />
      <p><b>${different === 1 ? "different view" : "different views"}</b><br /><span class=${capture?.hint === "turn" && teach.phase === "collecting" ? "turn" : ""}>${text}</span></p>
      <${Spoken} live>${teach.phase === "collecting" || teach.phase === "held" ? text : ""}</${Spoken}>
    </div>
  `;
}

/** Ask what folders show before they are taught. */
function Folders({ groups, close }) {
  const [names, setNames] = useState(Object.keys(groups));
  const files = Object.values(groups);
  const rename = (at, value) => setNames(names.map((name, index) => (index === at ? value : name)));
  const teachAll = () => {
    close();
    teaching.teachFiles(files.map((group, index) => ({ label: names[index].trim(), files: group })).filter((one) => one.label));
  };
  return html`
    <${Dialog} title=${files.length === 1 ? "Teach this folder?" : `Teach ${files.length} folders?`} close=${close}>
      ${files.length > 1 && html`<p>Each folder becomes a thing of its own. Leave a name empty to leave its folder out.</p>`}
      <div class="folders">
        ${files.map(
          (group, index) => html`
            <${NameField}
              label=${`What does the folder ${Object.keys(groups)[index] || "without a name"} show?`}
              value=${names[index]}
              change=${(value) => rename(index, value)}
              hint=${count(group.length, "picture")}
            />
          `,
        )}
      </div>
      <div class="buttons">
        <button type="button" class="primary" disabled=${!names.some((name) => name.trim())} onClick=${teachAll}>Teach</button>
        <button type="button" class="quiet" onClick=${close}>Cancel</button>
      </div>
    </${Dialog}>
  `;
}
