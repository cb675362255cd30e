// A button that acts while it is held: by mouse, touch, Space or Enter; or, for people who cannot hold one, by two presses.
import { html, useEffect, useRef } from "./vendor.js";

/**
 * Call `start` when it is pressed and `stop` when it is let go. `stop(true)` means that it was not let go but interrupted:
 * the window lost the focus, or the system took the touch away.
 */
export function HoldButton({ active, start, stop, toggle, disabled, children }) {
  const held = useRef(null); // what holds it: "pointer", "key", "toggle"
  const handled = useRef(0); // when a pointer or key was last handled; its click says nothing new

  const calls = useRef();
  calls.current = { start, stop };

  const begin = (by) => {
    if (held.current || disabled) return;
    held.current = by;
    calls.current.start();
  };
  const end = (by, interrupted = false) => {
    if (held.current !== by) return;
    held.current = null;
    calls.current.stop(interrupted);
  };

  useEffect(() => {
    const away = () => held.current && end(held.current, true);
    const hidden = () => document.hidden && away();
    window.addEventListener("blur", away);
    document.addEventListener("visibilitychange", hidden);
    return () => {
      away();
      window.removeEventListener("blur", away);
      document.removeEventListener("visibilitychange", hidden);
    };
  }, []);

  const isKey = (event) => event.key === " " || event.key === "Enter";
  const events = {
    onPointerDown: (event) => {
      if (toggle || event.button !== 0) return;
      handled.current = Date.now();
      event.currentTarget.setPointerCapture(event.pointerId); // let go is noticed wherever it happens
      begin("pointer");
    },
    onPointerUp: () => {
      if (held.current === "pointer") handled.current = Date.now();
      end("pointer");
    },
    onPointerCancel: () => end("pointer", true),
    onKeyDown: (event) => {
      if (toggle || !isKey(event)) return;
      event.preventDefault(); // no click, and no scrolling
      if (!event.repeat) begin("key");
    },
    onKeyUp: (event) => {
      if (toggle || !isKey(event)) return;
      event.preventDefault();
      end("key");
    },
    // A click without a pointer or key comes from a screen reader, a switch or a voice: nobody holds anything.
    onClick: () => {
      if (!toggle && Date.now() - handled.current < 1000) return;
      if (held.current === "toggle") end("toggle");
      else begin("toggle");
    },
    onContextMenu: (event) => event.preventDefault(), // a long touch
  };
  return html`
    <button type="button" class="hold ${active ? "active" : ""}" aria-pressed=${active ? "true" : "false"} disabled=${disabled} ...${events}>
      ${children}
    </button>
  `;
}
