// Charts: drawn by uPlot when they come into view, with a common zoom, a common cursor, a reading and a table each.
"use strict";

(function (Watch) {
  const { h } = Watch;
  const HEIGHT = 156;
  const MOST_ROWS = 300; // of a table of values
  const DOUBLE_CLICK_MS = 250;
  const FONT = "11px system-ui, sans-serif";

  /** How all charts are looked at. `runs` are those whose curves are shown, the page's own first. */
  Watch.look = { smoothing: 0, kind: "exponential", log: false, zoom: null, runs: [] };

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const styles = getComputedStyle(document.documentElement);

  /** A colour of watch.css. */
  Watch.colour = (name) => styles.getPropertyValue(`--${name}`).trim();
  /** The colour of a run by its place among those shown. */
  Watch.runColour = (place) => Watch.colour(`series-${place % 8}`);
  /** Runs that share a colour differ by dashes. */
  Watch.runDash = (place) => (place < 8 ? [] : [6, 3]);

  function faded(colour, alpha) {
    const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    return `rgba(${red}, ${green}, ${blue}, ${alpha})`;
  }
  Watch.faded = faded;

  const plots = new Map(); // by their elements

  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const plot = plots.get(entry.target);
      if (plot) plot.see(entry.isIntersecting);
    }
  }, { rootMargin: "160px" });

  const sizes = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const plot = plots.get(entry.target.closest(".chart"));
      if (plot) plot.fit(entry.contentRect.width);
    }
  });

  /** Shows anew what every chart shows. */
  Watch.redraw = function () {
    for (const plot of plots.values()) plot.update();
  };

  dark.addEventListener("change", () => {
    for (const plot of plots.values()) plot.forget();
    Watch.redraw();
  });

  /** Zooms all charts to steps; null shows all of them. */
  Watch.zoom = function (range) {
    Watch.look.zoom = range;
    Watch.redraw();
    document.dispatchEvent(new Event("zoomed"));
  };

  function cursor(plot) {
    const quiet = ["mousemove", "mouseleave", "mouseenter"];
    return {
      y: false,
      points: { size: (u, series) => (plot.model.helper[series] ? 0 : 7) },
      drag: { x: true, y: false, setScale: false, dist: 4 },
      bind: { dblclick: () => () => plot.reset() },
      sync: plot.ofSteps ? { key: "steps", filters: { pub: (type) => quiet.includes(type) } } : undefined,
    };
  }

  function selected(plot, u) {
    const { left, width } = u.select;
    if (!width) return;
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    if (!plot.ofSteps) return;
    const [low, high] = [left, left + width].map((place) => u.posToVal(place, "x"));
    if (high - low >= 0.5) Watch.zoom([low, high]);
  }

  function axis(values, more) {
    const line = { stroke: Watch.colour("line"), width: 1 };
    return { stroke: Watch.colour("faint"), font: FONT, grid: line, ticks: { show: false }, values, ...more };
  }

  function range(model, ofSteps, low, high) {
    let [first, last] = (ofSteps && Watch.look.zoom) || [low, high];
    if (model.wide) [first, last] = [first - 0.5, last + 0.5];
    return first === last ? [first - 0.5, last + 0.5] : [first, last];
  }

  /** Of a value axis, where the chart names none; one value alone gets room on its own scale. */
  function valueRange(unit, low, high) {
    if (low !== high || low === null) return uPlot.rangeNum(low, high, 0.1, true);
    const room = Math.abs(low) / 10 || (unit === "share" ? 0.01 : 1);
    return [low && low - room, low + room];
  }

  function optionsOf(plot, model, width) {
    const steps = (u, splits) => splits.map((value) => (Number.isInteger(value) ? Watch.tick(value) : ""));
    const seconds = (u, splits) => splits.map((value) => `${value} s`);
    const values = (u, splits) => splits.map((value) => (value === null ? "" : Watch.tick(value, model.unit)));
    return {
      width,
      height: plot.height,
      legend: { show: false },
      padding: [6, 16, 0, 0],
      cursor: cursor(plot),
      scales: {
        x: { time: false, range: (u, low, high) => range(plot.model, plot.ofSteps, low, high) },
        y: model.log ? { distr: 3, ...model.scale } : { range: (u, low, high) => valueRange(model.unit, low, high), ...model.scale },
      },
      axes: [
        axis(plot.ofSteps ? steps : seconds, { size: 24, gap: 4, space: 60 }),
        axis(values, { size: 50, gap: 4, space: 28 }),
      ],
      series: [{}, ...model.series],
      bands: model.bands,
      hooks: { setSelect: [(u) => selected(plot, u)], setCursor: [(u) => plot.point(u.cursor.idx)] },
    };
  }

  /**
   * A chart. `modelled` gives what it shows now: {signature, data, series, bands, helper, unit, log, scale, label,
   * reading(index), head, row(index), empty}; another signature has the chart built anew.
   */
  class Plot {
    constructor({ title, note = "", key, modelled, ofSteps = true, height = HEIGHT, level = "h3" }) {
      Object.assign(this, { modelled, ofSteps, height, note, u: null, model: null, visible: false, dirty: true, table: false });
      this.readout = h("p", { class: "reading" });
      this.holder = h("div", { class: "plot", role: "img", "aria-label": title });
      this.holder.style.height = `${height}px`;
      this.values = h("div", { class: "values", hidden: true });
      this.toggle = h("button", { class: "quiet", type: "button", "aria-pressed": "false",
        "aria-label": `Table of the values: ${title}`, on: { click: () => this.flip() } }, "table");
      this.element = h("figure", { class: "chart", data: { metric: key }, "aria-label": title },
        h("div", { class: "chart-head" }, h(level, { title: note || null }, title), this.readout, this.toggle),
        this.holder, this.values);
      plots.set(this.element, this);
      sight.observe(this.element);
      sizes.observe(this.holder);
    }

    see(visible) {
      this.visible = visible;
      if (visible && this.dirty) this.update();
    }

    fit(width) {
      if (this.u && Math.abs(this.u.width - width) >= 1 && width > 0) this.u.setSize({ width, height: this.height });
    }

    /** Shows what there is now; later, if the chart is out of view. */
    update() {
      this.dirty = true;
      if (!this.visible || !this.element.isConnected) return;
      this.dirty = false;
      const model = this.modelled();
      if (model.empty) {
        this.forget();
        Watch.fill(this.holder, model.empty);
        Watch.fill(this.readout, "");
        this.holder.setAttribute("aria-label", model.empty);
        return;
      }
      this.show(model);
    }

    show(model) {
      if (this.u && this.model.signature !== model.signature) this.forget();
      this.model = model;
      if (this.u) {
        this.u.setData(model.data);
      } else {
        this.holder.replaceChildren();
        this.u = new uPlot(optionsOf(this, model, this.holder.clientWidth || 300), model.data, this.holder);
        if (this.ofSteps) this.u.over.addEventListener("click", () => this.follow());
      }
      this.holder.setAttribute("aria-label", model.label);
      this.read(this.u.cursor.idx);
      if (this.table) this.tabulate();
    }

    /** Drops the drawing; the next update makes another. */
    forget() {
      if (this.u) this.u.destroy();
      this.u = null;
    }

    read(index) {
      if (!this.model) return;
      const none = index === null || index === undefined;
      Watch.fill(this.readout, this.model.reading(none ? null : index));
    }

    point(index) {
      this.read(index);
      const step = index === null || index === undefined ? null : this.model.data[0][index];
      if (this.ofSteps) document.dispatchEvent(new CustomEvent("pointed", { detail: step }));
    }

    /** Goes to the step that was clicked on, unless a second click follows. */
    follow() {
      const index = this.u.cursor.idx;
      if (index === null || index === undefined) return;
      const address = Watch.links.step(Watch.name, this.model.data[0][index]);
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => (location.hash = address), DOUBLE_CLICK_MS);
    }

    /** Ends the zoom. */
    reset() {
      clearTimeout(this.waiting);
      if (this.ofSteps) Watch.zoom(null);
    }

    flip() {
      this.table = !this.table;
      this.toggle.setAttribute("aria-pressed", String(this.table));
      this.holder.hidden = this.table;
      this.values.hidden = !this.table;
      if (this.table && this.model) this.tabulate();
    }

    tabulate() {
      const x = this.model.data[0];
      const [low, high] = (this.ofSteps && Watch.look.zoom) || [-Infinity, Infinity];
      const { has = () => true } = this.model;
      const places = [...x.keys()].filter((place) => x[place] >= low && x[place] <= high && has(place)).reverse();
      const rows = places.slice(0, MOST_ROWS).map((place) => [this.mark(x[place]), ...this.model.row(place)]);
      const left = places.length - rows.length;
      Watch.fill(this.values, h("p", { class: "minor" }, this.note), Watch.scrolling(this.toggle.getAttribute("aria-label"),
        Watch.table([this.ofSteps ? "Step" : "Seconds", ...this.model.head], rows),
        left > 0 ? h("p", {}, `The newest ${MOST_ROWS} are here; zoom in for the ${Watch.count(left)} before.`) : null));
    }

    mark(x) {
      return this.ofSteps ? h("a", { href: Watch.links.step(Watch.name, x) }, Watch.count(x)) : Watch.seconds(x);
    }

    /** Ends the chart. */
    end() {
      clearTimeout(this.waiting);
      this.forget();
      sight.unobserve(this.element);
      sizes.unobserve(this.holder);
      plots.delete(this.element);
    }
  }
  Watch.Plot = Plot;

  /** Values smoothed over so many steps; what is missing stays missing. */
  Watch.smoothed = function (steps, values, width, kind) {
    if (!width) return values;
    return kind === "average" ? averaged(steps, values, width) : decayed(steps, values, width);
  };

  function decayed(steps, values, width) {
    const keep = 1 - 2 / (width + 1);
    let [sum, weight, last] = [0, 0, null];
    return values.map((value, place) => {
      if (value === null || value === undefined) return null;
      const faded = last === null ? 0 : keep ** (steps[place] - last);
      sum = sum * faded + value;
      weight = weight * faded + 1;
      last = steps[place];
      return sum / weight;
    });
  }

  function averaged(steps, values, width) {
    let [first, sum, count] = [0, 0, 0];
    const has = (place) => values[place] !== null && values[place] !== undefined;
    return values.map((value, place) => {
      if (has(place)) [sum, count] = [sum + value, count + 1];
      for (; steps[first] <= steps[place] - width; first += 1) {
        if (has(first)) [sum, count] = [sum - values[first], count - 1];
      }
      return has(place) ? sum / count : null;
    });
  }

  let united = { key: null, steps: [], places: new Map() };

  /** The steps of all runs that are shown. */
  function unitedSteps(runs) {
    const key = runs.map((run) => `${run.name}\n${run.version}`).join("\n\n");
    if (united.key === key) return united;
    const all = runs.length === 1 ? runs[0].steps : [...new Set(runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
    united = { key, steps: all, places: new Map(all.map((step, place) => [step, place])) };
    return united;
  }

  function spread(run, values, { steps, places }) {
    if (run.steps.length === steps.length) return values;
    const wide = new Array(steps.length).fill(null);
    run.steps.forEach((step, place) => (wide[places.get(step)] = values[place]));
    return wide;
  }

  /** A run's curve of a metric: [value as shown, value, low, high] by the united steps; null where it has none. */
  function curve(run, name, all) {
    const { smoothing, kind, log } = Watch.look;
    const column = run.columns[name];
    if (!column || !column.some((value) => value !== null)) return null;
    const positive = (values) => (log ? values.map((value) => (value > 0 ? value : null)) : values);
    const ends = [run.columns[`${name}:low`], run.columns[`${name}:high`]];
    const smooth = (values) => positive(Watch.smoothed(run.steps, values, smoothing, kind));
    const bounds = ends[0] && ends[1] ? ends.map(smooth) : [[], []];
    const raw = smoothing ? positive(column) : [];
    return [smooth(column), raw, ...bounds].map((values) => spread(run, values, all));
  }

  /** How a curve is drawn: one of few values has points, and one with gaps by nature goes across them. */
  function kindOf(run, values) {
    const there = values.reduce((count, value) => count + (value !== null && value !== undefined), 0);
    const sparse = there < 0.6 * run.steps.length;
    return { sparse, points: there <= (sparse ? 40 : 12), many: there > 600 };
  }

  function seriesOf(place, { sparse, points, many }) {
    const colour = Watch.runColour(place);
    const common = { spanGaps: sparse, points: { show: false } };
    const edge = { ...common, stroke: "transparent", width: 0 };
    return [
      edge, edge,
      { ...common, stroke: faded(colour, 0.35), width: 1 },
      { ...common, stroke: colour, width: many ? 1 : 1.5, dash: Watch.runDash(place), points: { show: points, size: 5, fill: colour } },
    ];
  }

  /** A model for Plot: a metric of all runs that are shown. */
  Watch.curveModel = function (name) {
    const { runs, log } = Watch.look;
    const all = unitedSteps(runs);
    const found = runs.map((run, place) => ({ run, place, values: curve(run, name, all) })).filter((one) => one.values);
    if (!found.length) return { empty: "Not measured in this run." };
    if (!found.some((one) => one.values[0].some((value) => value !== null))) {
      return { empty: "It has no value above 0, so a logarithmic scale shows nothing." };
    }
    const kinds = found.map(({ run, values }) => kindOf(run, values[0]));
    const unit = found[0].run.about(name).unit;
    const model = {
      data: [all.steps], series: [], bands: [], helper: [false], unit, log,
      signature: JSON.stringify([log, found.map((one, index) => [one.run.name, one.place, kinds[index]])]),
      ...tabled(found, unit, runs.length > 1),
    };
    found.forEach(({ place, values: [shown, raw, low, high] }, index) => {
      const first = model.data.length;
      model.data.push(low, high, raw, shown);
      model.helper.push(true, true, true, false);
      model.series.push(...seriesOf(place, kinds[index]));
      model.bands.push({ series: [first + 1, first], fill: faded(Watch.runColour(place), 0.16) });
    });
    model.label = found.map((one) => summary(name, one, all.steps, unit)).join(" ");
    const band = name === "response_length" ? "10% to 90%:" : "95%:";
    model.reading = (index) => reading(found, index, { unit, band, steps: all.steps, several: runs.length > 1 });
    return model;
  };

  /** What a table of the curves has; of one run with its band. */
  function tabled(found, unit, several) {
    const [, , low] = found[0].values;
    const shown = several ? found.map((one) => one.values[0]) : found[0].values.filter((values, place) => place !== 1 && values.length);
    const head = several ? found.map((one) => `>${one.run.name}`) : low.length ? [">Value", ">Low", ">High"] : [">Value"];
    const has = (index) => shown.some((values) => values[index] !== null && values[index] !== undefined);
    return { head, has, row: (index) => shown.map((values) => Watch.value(values[index], unit)) };
  }

  /** The place of the last value up to a place. */
  function lastPlace(values, place = values.length - 1) {
    while (place > 0 && (values[place] === null || values[place] === undefined)) place -= 1;
    return place;
  }

  function summary(name, { run, values: [shown] }, steps, unit) {
    const there = shown.filter((value) => value !== null && value !== undefined);
    const [least, most] = there.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    const last = lastPlace(shown);
    return `${Watch.title(name)} of ${run.name}: ${Watch.value(shown[last], unit)} at step ${steps[last]}; between ` +
      `${Watch.value(least, unit)} and ${Watch.value(most, unit)} in ${there.length} steps.`;
  }

  function reading(found, index, { unit, band, steps, several }) {
    return found.map(({ place, values: [shown, raw, low, high] }) => {
      const at = lastPlace(shown, index === null ? undefined : index);
      const earlier = index !== null && at !== index ? `step ${Watch.count(steps[at])}` : "";
      const value = h("b", {}, Watch.value(shown[at], unit));
      if (several) value.style.color = Watch.runColour(place);
      const whole = low[at] !== null && low[at] !== undefined && high[at] !== null && high[at] !== undefined;
      const bounds = whole ? `${band} ${Watch.value(low[at], unit)} to ${Watch.value(high[at], unit)}` : "";
      const before = raw.length && raw[at] !== null ? `raw ${Watch.value(raw[at], unit)}` : "";
      return [value, several ? null : h("span", {}, [earlier, before, bounds].filter(Boolean).join(", "))];
    });
  }
})(window.Watch);
