// How many different views there are: a ring that fills up to as many as are good.
import { html } from "./vendor.js";

export const GOOD = 20; // different views; more help little
const RADIUS = 52;
const AROUND = 2 * Math.PI * RADIUS;

/** Draw the ring with a mark where there are enough. */
export function Ring({ different, needed, small }) {
  const share = Math.min(different / GOOD, 1);
  const turn = (360 * needed) / GOOD - 90;
  return html`
    <svg class="ring ${small ? "small" : ""} ${different >= needed ? "enough" : ""}" viewBox="0 0 120 120" aria-hidden="true">
      <circle class="rail" cx="60" cy="60" r=${RADIUS} />
      <circle
        class="fill"
        cx="60"
        cy="60"
        r=${RADIUS}
        stroke-dasharray="${share * AROUND} ${AROUND}"
        transform="rotate(-90 60 60)"
      />
      <line class="mark" x1="106" x2="118" y1="60" y2="60" transform="rotate(${turn} 60 60)" />
      <text x="60" y="60" dominant-baseline="central" text-anchor="middle">${different}</text>
    </svg>
  `;
}
