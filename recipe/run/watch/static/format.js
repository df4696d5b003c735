// Numbers, times and sizes as text, and elements made of text: nothing of a run is ever read as HTML.
"use strict";

(function (Watch) {
  const DASH = "–";
  const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const given = (value) => value !== null && value !== undefined && Number.isFinite(value);

  /** An element. Attributes by name; `on` is listeners; children are nodes or text, null is left out. */
  Watch.h = function (tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
      else if (name === "data") Object.assign(element.dataset, value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    Watch.put(element, children);
    return element;
  };

  /** Adds children, lists of them too. */
  Watch.put = function (element, children) {
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) element.append(child);
  };

  /** Replaces what is in an element; text that is already there is left as it is. */
  Watch.fill = function (element, ...children) {
    if (children.length === 1 && typeof children[0] === "string") {
      if (element.textContent !== children[0]) element.textContent = children[0];
      return;
    }
    element.replaceChildren();
    Watch.put(element, children);
  };

  /** A text of a run that is a sentence by nature, cut where it is none: laying out a megabyte takes a browser minutes. */
  Watch.clipped = function (text, most = 2000) {
    const whole = String(text ?? "");
    return whole.length > most ? `${whole.slice(0, most)} … ${counts.format(whole.length - most)} characters more` : whole;
  };

  /** Text of a run: isolated, so that its direction changes nothing around it. */
  Watch.foreign = (text, tag = "bdi", attributes = {}) => Watch.h(tag, { dir: "auto", ...attributes }, Watch.clipped(text));

  /** The beginning of a text, in one line. */
  Watch.beginning = function (text, most = 240) {
    const line = String(text ?? "").slice(0, most + 1).replace(/\s+/g, " ");
    return line.length > most ? line.slice(0, most) + "…" : line;
  };

  Watch.count = (value) => (given(value) ? counts.format(value) : DASH);

  function significant(value, digits) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) {
      return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
    }
    if (size >= 1000) return counts.format(value);
    return value.toFixed(Math.max(0, Math.min(4, digits - 1 - Math.floor(Math.log10(size || 1)))));
  }

  function share(value) {
    const percent = 100 * value;
    const small = percent !== 0 && Math.abs(percent) < 1;
    return `${small ? significant(percent, 2) : percent.toFixed(1)}%`;
  }

  /** A size in binary units. */
  Watch.bytes = function (value) {
    if (!given(value)) return DASH;
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let place = 0;
    while (Math.abs(value) >= 1024 && place < units.length - 1) {
      value /= 1024;
      place += 1;
    }
    return `${value.toFixed(value >= 100 || place === 0 ? 0 : 1)} ${units[place]}`;
  };

  /** A time in its two largest units. */
  Watch.duration = function (seconds) {
    if (!given(seconds)) return DASH;
    if (seconds === 0) return "0 s";
    if (Math.abs(seconds) < 1) return `${(1000 * seconds).toFixed(0)} ms`;
    if (seconds < 10) return `${seconds.toFixed(1)} s`;
    const whole = Math.round(seconds);
    if (whole < 60) return `${whole} s`;
    const parts = [[Math.floor(whole / 86400), "d"], [Math.floor(whole / 3600) % 24, "h"]];
    parts.push([Math.floor(whole / 60) % 60, "min"], [whole % 60, "s"]);
    const first = parts.findIndex(([amount]) => amount > 0);
    return parts.slice(first, first + 2).filter(([amount]) => amount > 0).map((part) => part.join(" ")).join(" ");
  };

  Watch.dollars = (value) => (given(value) ? `$${value < 1000 ? value.toFixed(2) : counts.format(value)}` : DASH);

  /** A value of a metric by its unit. */
  Watch.value = function (value, unit = "") {
    if (!given(value)) return DASH;
    if (unit === "share") return share(value);
    if (unit === "bytes") return Watch.bytes(value);
    if (unit === "bytes/s") return `${Watch.bytes(value)}/s`;
    if (unit === "s") return Watch.seconds(value);
    return Number.isInteger(value) && Math.abs(value) < 1e7 ? counts.format(value) : significant(value, 4);
  };

  /** Seconds of a step or phase. */
  Watch.seconds = (value) => (given(value) ? `${value >= 100 ? counts.format(value) : value.toFixed(2)} s` : DASH);

  /** A value where there is room for little, as beside an axis. */
  Watch.tick = function (value, unit = "") {
    if (unit === "share") return `${Number((100 * value).toPrecision(3))}%`;
    if (unit.startsWith("bytes")) return Watch.bytes(value).replace(" ", "").replace("iB", "");
    const size = Math.abs(value);
    if (size >= 1e9 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    return String(Number(value.toPrecision(4)));
  };

  /** A unit as words behind a name; nothing where a number says it. */
  Watch.unit = (unit) => (["", "1", "share", "number", "reward", "bytes", "bytes/s"].includes(unit) ? "" : unit);

  const clock = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const hour = new Intl.DateTimeFormat("en-GB", { timeStyle: "short" });
  const day = new Intl.DateTimeFormat("en-GB", { weekday: "short", hour: "2-digit", minute: "2-digit" });
  Watch.date = (seconds) => (given(seconds) ? clock.format(new Date(1000 * seconds)) : DASH);

  /** A time soon to come: without the day, if it is today. */
  Watch.moment = function (seconds) {
    const then = new Date(1000 * seconds);
    if (then.toDateString() === new Date().toDateString()) return hour.format(then);
    return (seconds - Date.now() / 1000 < 6 * 86400 ? day : clock).format(then);
  };

  const TITLES = {
    reward: "Reward", response_length: "Response length", truncated_share: "Truncated", entropy: "Entropy",
    clip_share: "Clipped", kl: "KL to the reference", policy_kl: "KL of the steps", grad_norm: "Gradient norm",
    logprob_diff_mean: "Train/rollout difference", draft_accept_length: "Acceptance length",
    tokens_per_second: "Tokens a second", gpu_idle_share: "GPU idle share", engine_restarts: "Engine restarts",
    rollout_tokens_per_second: "Rollout tokens a second",
  };

  /** The title of a metric's chart. */
  Watch.title = function (name) {
    const words = (text) => text.replace(/_/g, " ");
    if (name.startsWith("eval/")) return `Held out: ${name.slice(5)}`;
    return TITLES[name] || words(name).replace(/^./, (first) => first.toUpperCase());
  };

  /** A table. Each row is a list of cells: nodes or text; a column that starts with ">" is of numbers. */
  Watch.table = function (columns, rows, attributes = {}) {
    const numeric = columns.map((column) => column.startsWith(">"));
    const cell = (tag) => (child, place) =>
      Watch.h(tag, { class: numeric[place] ? "number" : null, scope: tag === "th" ? "col" : null }, child);
    const heads = columns.map((column) => column.replace(/^>/, ""));
    return Watch.h("table", attributes,
      Watch.h("thead", {}, Watch.h("tr", {}, heads.map(cell("th")))),
      Watch.h("tbody", {}, rows.map((row) => Watch.h("tr", {}, row.map(cell("td"))))));
  };

  /** A part that scrolls by itself, with a name for those who reach it by keyboard. */
  Watch.scrolling = (name, ...children) =>
    Watch.h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": name }, ...children);
})(window.Watch);
