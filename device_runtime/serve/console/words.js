// Figures and records of the device in words.

export const UNKNOWN = "unknown";

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** Return a probability in percent; only a certain one is 100 %. */
export function percent(share) {
  const rounded = Math.round(share * 100);
  return `${share < 1 ? Math.min(rounded, 99) : 100}\u00a0%`;
}

/** Return an estimated probability in percent; it never is a certainty. */
export const probability = (score) => percent(Math.min(score, 0.99));

/** Return a probability in words. */
export function sure(score) {
  if (score === null || score === undefined) return "";
  if (score >= 0.97) return "almost certain";
  if (score >= 0.85) return "very likely";
  if (score >= 0.65) return "likely";
  if (score >= 0.5) return "more likely than not";
  return "only a guess";
}

/** Return names as an enumeration: "a", "a and b", "a, b and c". */
export function list(names, most = 4) {
  const shown = names.length > most ? [...names.slice(0, most - 1), `${names.length - most + 1} more`] : names;
  return shown.length < 2 ? shown.join("") : `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}`;
}

/** Return the change that made a generation as a title. `info` is what was recorded with it. */
export function changed(generation) {
  const { info, what, number } = generation;
  if (!info) return what || `Step ${number}`;
  const taught = (info.taught ?? []).map((one) => one.label);
  if (info.renamed) return `Renamed ${info.renamed[0]} to ${info.renamed[1]}`;
  if (info.forgot) return `Forgot ${info.forgot}`;
  if (info.merged_labels) return `Merged ${list(info.merged_labels)} into ${info.into}`;
  if (info.merged) return `Took over what another device had learned: ${list(taught)}`;
  if (taught.length) return `Learned ${list(taught)}`;
  return info.bundle ? "Set up" : what || `Step ${number}`;
}

/** Return what else is known about that change. */
export function details(generation) {
  const { info } = generation;
  if (!info) return "";
  const taught = info.taught ?? [];
  if (taught.length) {
    const images = taught.reduce((sum, one) => sum + one.images, 0);
    const held = info.held_out?.accuracy ?? null;
    return count(images, "picture") + (held === null ? "" : `, ${percent(held)} recognised when tested`);
  }
  if (info.forgot) return `${count(info.images ?? 0, "picture")} taken back${info.exact ? "" : ", as far as possible"}`;
  return info.bundle && !info.merged ? `from ${info.bundle}` : "";
}

/** Return a moment in UTC in the reader's time zone. Clocks of devices without a battery start in 1970. */
export function moment(utc) {
  const date = new Date(utc);
  if (!utc || Number.isNaN(date.getTime()) || date.getFullYear() < 2020) return "";
  const today = new Date().toDateString() === date.toDateString();
  const clock = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return today ? `today ${clock}` : `${date.toLocaleDateString([], { dateStyle: "medium" })} ${clock}`;
}

/** Return a duration in words. */
export function duration(seconds) {
  if (seconds < 90) return count(Math.max(1, Math.round(seconds)), "second");
  if (seconds < 90 * 60) return count(Math.round(seconds / 60), "minute");
  if (seconds < 48 * 3600) return count(Math.round(seconds / 3600), "hour");
  return count(Math.round(seconds / 86400), "day");
}

export const megabytes = (mib) => (mib >= 1024 ? `${(mib / 1024).toFixed(1)} GiB` : `${Math.round(mib)} MiB`);
