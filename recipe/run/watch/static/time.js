// Where the time of a run goes: phases of all steps, a rollout's tail, idle GPUs; and everything about one step.
"use strict";

(function (Watch) {
  const { h, fill } = Watch;
  const PHASES = [
    ["rollout", "Rollout"], ["log_probs", "Log-probs"], ["train", "Training"], ["update_weights", "Weight update"],
    ["eval", "Evaluation"], ["save", "Saving"], ["other", "Other"],
  ];
  const CURVES = ["engine_restarts", "gpu_idle_share", "rollout_tokens_per_second", "seconds_step"];
  const MOST_BARS = 700; // with more steps in view, neighbours are shown as their mean
  const TAIL = 0.1;

  const column = (run, name) => run.columns[`seconds_${name}`] || new Array(run.steps.length).fill(null);

  let kept = { run: null, version: -1, columns: [] };

  /** Seconds of each phase by the run's steps; what no phase explains is the last. */
  function phaseColumns(run) {
    if (kept.run === run && kept.version === run.version) return kept.columns;
    const named = PHASES.slice(0, -1).map(([name]) => column(run, name).map((value) => value || 0));
    const other = column(run, "step").map((whole, place) =>
      Math.max(0, (whole || 0) - named.reduce((sum, values) => sum + values[place], 0)));
    kept = { run, version: run.version, columns: [...named, other] };
    return kept.columns;
  }

  /** Places of the steps in view, in bins of neighbours. */
  function bins(steps) {
    const [low, high] = Watch.look.zoom || [-Infinity, Infinity];
    const places = [...steps.keys()].filter((place) => steps[place] >= low - 1 && steps[place] <= high + 1);
    const size = Math.max(1, Math.ceil(places.length / MOST_BARS));
    const found = [];
    for (let first = 0; first < places.length; first += size) found.push(places.slice(first, first + size));
    return found;
  }

  const mean = (values, places) => places.reduce((sum, place) => sum + values[place], 0) / places.length;

  /** A model for Plot: the phases of every step on one another. */
  function phaseModel(run) {
    if (!run.columns.seconds_step) return { empty: "No step has been timed yet." };
    const groups = bins(run.steps);
    if (!groups.length) return { empty: "No step is in view." };
    const values = phaseColumns(run).map((one) => groups.map((places) => mean(one, places)));
    let below = groups.map(() => 0);
    const tops = values.map((one) => (below = one.map((value, place) => below[place] + value)));
    const bars = uPlot.paths.bars({ size: [1, Infinity], align: 0 });
    const series = PHASES.map((_, place) => {
      const colour = Watch.colour(`phase-${place}`);
      return { fill: colour, stroke: colour, width: 0, paths: bars, points: { show: false } };
    });
    const total = tops[tops.length - 1];
    return {
      data: [groups.map((places) => run.steps[places[0]]), ...tops.reverse()],
      series: series.reverse(), bands: [], helper: new Array(PHASES.length + 1).fill(true), unit: "s", log: false, wide: true,
      scale: { range: (u, low, high) => [0, (high || 1) * 1.05] }, signature: "phases",
      label: `Seconds of each phase by step, stacked. ${shares(run).map(({ title, share }) => `${title} ${Watch.value(share, "share")}`)}.`,
      head: [">Whole step", ...PHASES.map(([, title]) => `>${title}`)],
      row: (index) => [Watch.seconds(total[index]), ...values.map((one) => Watch.seconds(one[index]))],
      reading: (index) => phaseReading(index === null ? groups.length - 1 : index, values, total),
    };
  }

  function phaseReading(index, values, total) {
    const parts = PHASES.map(([, title], place) => [title, values[place][index], place]).filter(([, value]) => value > 0);
    return [h("b", {}, Watch.seconds(total[index])),
      h("span", {}, parts.map(([title, value]) => `${title} ${Watch.seconds(value)}`).join(", "))];
  }

  /** Seconds and share of each phase over the steps in view. */
  function shares(run) {
    const places = bins(run.steps).flat();
    const sums = phaseColumns(run).map((one) => places.reduce((sum, place) => sum + one[place], 0));
    const whole = sums.reduce((a, b) => a + b, 0);
    return PHASES.map(([name, title], place) => {
      const share = whole ? sums[place] / whole : 0;
      return { name, title, place, share, seconds: sums[place], steps: places.length };
    });
  }

  function swatch(place) {
    const box = h("span", { class: "swatch", "aria-hidden": "true" });
    box.style.backgroundColor = Watch.colour(`phase-${place}`);
    return box;
  }

  function phaseTable(rows) {
    const bar = (share, place) => {
      const drawn = Watch.meter([[share, "used"]]);
      drawn.firstChild.style.backgroundColor = Watch.colour(`phase-${place}`);
      return drawn;
    };
    return Watch.table(["Phase", ">Share", "Part of the whole", ">Time", ">A step"], rows.map(({ title, place, seconds, share, steps }) =>
      [[swatch(place), title], Watch.value(share, "share"), bar(share, place), Watch.duration(seconds),
        Watch.seconds(seconds / Math.max(1, steps))]));
  }

  /** What a rollout's course says in words: how long its tail is and how busy its engines were. */
  function tailSentence({ seconds, running, total_seconds: total }) {
    const most = Math.max(...running);
    if (!most || !total) return "";
    let last = running.length - 1;
    while (last > 0 && running[last] <= TAIL * most) last -= 1;
    const start = seconds[Math.min(last + 1, seconds.length - 1)];
    const area = running.slice(0, -1).reduce((sum, value, place) => sum + value * (seconds[place + 1] - seconds[place]), 0);
    return `Up to ${Watch.count(most)} sequences ran at once. With a tenth of them or fewer it went on for ${Watch.duration(total - start)} of ` +
      `${Watch.duration(total)} (${Watch.value((total - start) / total, "share")}). On average ${Watch.count(area / total)} ran ` +
      `(${Watch.value(area / (most * total), "share")} of the most).`;
  }

  function timelineModel(found) {
    const colour = Watch.colour("series-0");
    const { seconds, running } = found;
    return {
      data: [seconds, running], bands: [], helper: [false, false], unit: "", log: false,
      series: [{ stroke: colour, width: 1.5, fill: Watch.faded(colour, 0.18), points: { show: false },
        paths: uPlot.paths.stepped({ align: 1 }) }],
      scale: { range: (u, low, high) => [0, (high || 1) * 1.05] }, signature: `timeline ${found.rollout}`,
      label: `Sequences running in the rollout of step ${found.rollout + 1}, by seconds. ${tailSentence(found)}`,
      head: [">Sequences running"], row: (index) => [Watch.count(running[index])],
      reading: (index) => index === null ? [] : [h("b", {}, Watch.count(running[index])), h("span", {}, `at ${Watch.seconds(seconds[index])}`)],
    };
  }

  /** A rollout's course, of one step or of one that is chosen. */
  class Timeline {
    constructor(run, chosen) {
      Object.assign(this, { run, chosen, found: null });
      this.plot = new Watch.Plot({ title: "Sequences running in a rollout", key: "timeline", ofSteps: false,
        modelled: () => (this.found ? timelineModel(this.found) : { empty: this.missing || "Loading." }) });
      this.text = h("p", { id: "tail" });
      this.element = h("div", { id: "timeline" }, chosen === null ? this.chooser() : null, this.plot.element, this.text);
      this.load();
    }

    chooser() {
      if (Watch.isReport) return null;
      this.field = h("input", { id: "timeline-step", type: "number", min: 1, on: { change: () => this.choose(Number(this.field.value)) } });
      const go = (by) => this.choose(this.found ? this.found.rollout + 1 + by : 1);
      const turn = (by, text) => h("button", { type: "button", on: { click: () => go(by) } }, text);
      return h("p", { class: "set" }, h("label", { for: "timeline-step" }, "Rollout of step"), this.field, turn(-1, "Before"), turn(1, "After"),
        h("button", { type: "button", on: { click: () => this.choose(null) } }, "Newest"));
    }

    choose(step) {
      this.chosen = step !== null && step >= 1 ? step : null;
      this.load();
    }

    /** Asks for the course; again with every new step, where the newest is shown. */
    async load() {
      const query = this.chosen === null ? {} : { rollout: this.chosen - 1 };
      const asked = (this.asked = {});
      try {
        const answer = await Watch.get(Watch.path(this.run.name, "timeline", query));
        if (asked !== this.asked) return;
        this.missing = answer.missing || null;
        this.found = answer.missing ? null : answer;
      } catch (error) {
        if (asked !== this.asked) return;
        [this.missing, this.found] = [error.message, null];
      }
      const restarts = this.found && this.found.restarts;
      fill(this.text, this.found ? tailSentence(this.found) + (restarts ? ` Engines that were started again: ${Watch.count(restarts)}.` : "") : "");
      if (this.field && this.found) this.field.value = this.found.rollout + 1;
      this.plot.update();
    }

    end() {
      this.plot.end();
    }
  }

  /** The view of a run's time. */
  Watch.TimeView = class {
    constructor(root, run) {
      Object.assign(this, { run, version: -1, grid: new Watch.Grid({ id: "time-curves" }) });
      this.controls = Watch.controls();
      this.phases = new Watch.Plot({ title: "Phases of every step", key: "phases", height: 240, modelled: () => phaseModel(run) });
      this.timeline = new Timeline(run, null);
      this.table = h("div", { id: "phase-shares" });
      this.zoomed = () => this.tabulate();
      document.addEventListener("zoomed", this.zoomed);
      Watch.put(root, [h("h2", { class: "unseen" }, "Where the time goes"), this.controls.row,
        h("div", { class: "halves" }, h("div", { id: "phases" }, this.phases.element), this.table),
        h("h2", {}, "The rollout's tail"), this.timeline.element,
        h("h2", {}, "Engines and idle GPUs"), this.grid.element]);
      this.update();
    }

    tabulate() {
      const { run } = this;
      if (run.columns.seconds_step) fill(this.table, phaseTable(shares(run)));
    }

    update() {
      const { run } = this;
      if (run.version === this.version) return;
      if (this.version >= 0 && this.timeline.chosen === null) this.timeline.load();
      this.version = run.version;
      this.phases.update();
      this.tabulate();
      this.grid.show(CURVES.filter((name) => run.columns[name]));
    }

    end() {
      document.removeEventListener("zoomed", this.zoomed);
      this.controls.end();
      this.phases.end();
      this.timeline.end();
      this.grid.end();
    }
  };

  /** Names of all columns in an order in which they are looked for: what the run is about first. */
  function ordered(run) {
    const names = Object.keys(run.columns).filter((name) => !name.includes(":"));
    const first = ["reward", ...Watch.mainMetrics];
    const rank = (name) => {
      if (first.includes(name)) return first.indexOf(name);
      return first.length + [name.startsWith("eval/"), !/^seconds_|_per_second$/.test(name), true].indexOf(true);
    };
    return names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  }

  function interval(run, name, step) {
    const [low, high] = [run.at(`${name}:low`, step), run.at(`${name}:high`, step)];
    if (low === null || high === null) return "";
    const { unit } = run.about(name);
    return `${Watch.value(low, unit)} to ${Watch.value(high, unit)}`;
  }

  /** The view of one step. */
  Watch.StepView = class {
    constructor(root, run, { step }) {
      Object.assign(this, { run, step, version: -1 });
      this.values = h("div", { id: "step-values" });
      this.phases = h("div", { id: "step-phases" });
      this.head = h("div", { class: "set" });
      this.advice = h("div");
      this.timeline = new Timeline(run, step);
      this.samples = h("div", { id: "step-samples" });
      Watch.put(root, [this.head, this.advice, h("div", { class: "halves" },
        h("div", {}, h("h3", {}, "Values"), this.values),
        h("div", {}, h("h3", {}, "Time"), this.phases, h("h3", {}, "Rollout"), this.timeline.element)),
      h("h3", {}, "Samples of this step"), this.samples]);
      this.update();
      this.list();
    }

    update() {
      const { run, step } = this;
      if (run.version === this.version || !run.head) return;
      this.version = run.version;
      const place = run.steps.indexOf(step);
      const near = (by, text) => (place >= 0 && run.steps[place + by] !== undefined
        ? h("a", { class: "button", href: Watch.links.step(run.name, run.steps[place + by]) }, text) : null);
      fill(this.head, h("h2", {}, `Step ${Watch.count(step)}`), near(-1, "Step before"), near(1, "Step after"));
      fill(this.advice, Watch.adviceOf(run, step));
      if (place < 0) {
        fill(this.values, h("p", {}, "This step has no values: it is not done yet, or was cut off."));
        return;
      }
      this.tabulate(place);
      const parts = phaseColumns(run).map((values) => values[place]);
      const whole = parts.reduce((a, b) => a + b, 0);
      fill(this.phases, phaseTable(PHASES.map(([name, title], at) =>
        ({ name, title, place: at, seconds: parts[at], share: whole ? parts[at] / whole : 0, steps: 1 })).filter(({ seconds }) => seconds > 0)));
    }

    tabulate(place) {
      const { run, step } = this;
      const before = run.steps[place - 1];
      const rows = ordered(run).filter((name) => run.at(name, step) !== null).map((name) => {
        const { unit, sentence } = run.about(name);
        const earlier = before === undefined ? null : run.at(name, before);
        return [h("span", { title: sentence || null, class: "name" }, name), Watch.value(run.at(name, step), unit),
          h("span", { class: "minor" }, interval(run, name, step)), Watch.value(earlier, unit), h("span", { class: "minor" }, Watch.unit(unit))];
      });
      fill(this.values, Watch.scrolling("Values of the step", Watch.table(["Name", ">Value", ">Interval", ">Step before", "Unit"], rows)));
    }

    async list() {
      const { run, step } = this;
      const query = { from_step: step, to_step: step };
      try {
        const found = await Watch.get(Watch.path(run.name, "samples", Watch.isReport ? {} : query));
        const rows = found.rows.filter((row) => row.step === step);
        const all = Watch.isReport ? null : h("a", { href: Watch.links.samples(run.name, query) }, `Search all ${Watch.count(found.matches)}`);
        fill(this.samples, rows.length ? [Watch.sampleTable(run.name, rows), h("p", {}, all)] : h("p", {}, "No sample of this step is here."));
      } catch (error) {
        fill(this.samples, h("p", { class: "error" }, error.message));
      }
    }

    end() {
      this.timeline.end();
    }
  };
})(window.Watch);
