// The head of a run's page, what it advises, and the curves with everything that governs how they are looked at.
"use strict";

(function (Watch) {
  const { h, fill } = Watch;
  const MAIN = Watch.mainMetrics = ["response_length", "truncated_share", "entropy", "clip_share", "kl", "logprob_diff_mean", "grad_norm",
    "draft_accept_length", "tokens_per_second"];
  const element = (id) => document.getElementById(id);
  const given = (value) => value !== null && value !== undefined;
  const minor = (text) => h("span", { class: "minor" }, text);
  const line = (...texts) => h("div", { class: "minor" }, texts.filter(Boolean).join(", "));

  const SYMBOLS = { starting: "◔", running: "●", saving: "◍", finished: "✓", interrupted: "❙❙", stopped: "❙❙", failed: "✕", died: "✕" };

  /** A run's state as a symbol and a word. */
  Watch.statePill = (state) =>
    h("span", { class: `pill ${Object.hasOwn(SYMBOLS, state) ? state : "died"}` },
      h("span", { "aria-hidden": "true" }, SYMBOLS[state] || "?"), " ", state);

  /** A bar of shares: [share, class] each; shares are of the bar's whole width. */
  function meter(parts) {
    const bar = h("span", { class: "meter", "aria-hidden": "true" });
    for (const [share, kind] of parts) {
      const part = h("span", { class: kind });
      const percent = `${(100 * Math.max(0, Math.min(1, share))).toFixed(2)}%`;
      if (kind === "mark") part.style.left = percent;
      else part.style.width = percent;
      bar.append(part);
    }
    return bar;
  }
  Watch.meter = meter;

  const writers = {
    step: (head) => [
      h("b", {}, Watch.count(head.step)), minor(` of ${Watch.count(head.total_steps)}`),
      meter([[head.total_steps ? head.step / head.total_steps : 0, "used"]]),
    ],
    eta: (head) => {
      const lived = line(`${Watch.duration(head.seconds_so_far)} so far`, head.max_hours && `at most ${head.max_hours} h`);
      if (!given(head.seconds_to_go)) return [h("b", {}, "–"), lived];
      return [h("b", {}, Watch.duration(head.seconds_to_go)), line(`until ${Watch.moment(head.now + head.seconds_to_go)}`), lived];
    },
    dollars: (head) => {
      const toGo = given(head.dollars_to_go) ? line(`${Watch.dollars(head.dollars_to_go)} to go`) : null;
      return [h("b", {}, Watch.dollars(head.dollars_so_far)), minor(" so far"), toGo, planOfDollars(head)];
    },
    "step-seconds": (head) => {
      const { measured, planned } = head.step_seconds || {};
      const short = (seconds) => (seconds < 10 ? String(Number(seconds.toPrecision(2))) : Watch.count(Math.round(seconds)));
      const plan = planned ? `planned ${short(planned[0])} to ${short(planned[1])} s` : "not planned";
      return [h("b", {}, Watch.seconds(measured)), line(plan)];
    },
    checkpoint: (head) => {
      const every = given(head.save_interval) ? `one every ${Watch.count(head.save_interval)} steps` : "";
      if (!head.checkpoint) return [h("b", {}, "none"), line(every)];
      const { step, written } = head.checkpoint;
      const [first, second] = [`${Watch.duration(Math.max(0, head.now - written))} ago`, `of step ${Watch.count(step)}`];
      return Watch.living(head) ? [h("b", {}, first), line(second), line(every)]
        : [h("b", {}, `step ${Watch.count(step)}`), line(Watch.date(written))];
    },
    "gpu-memory": (head) => memory(head.gpu_memory || {}),
    "host-memory": (head) => memory(head.host_memory || {}),
  };

  Watch.living = (head) => Watch.LIVING.includes(head.state);

  /** What all steps were planned to cost, and the most that the run may. */
  function planOfDollars(head) {
    const { planned } = head.step_seconds || {};
    const cost = (seconds) => (seconds * head.total_steps * head.gpus * head.price) / 3600;
    const dollars = (seconds) => Watch.dollars(cost(seconds)).replace(/(\d\d)\.\d\d$/, "$1");
    const text = () => (cost(planned[1]) < 0.01 ? "under $0.01" : `${dollars(planned[0])} to ${dollars(planned[1])}`);
    const known = planned && given(head.price) && given(head.gpus);
    return [line(known ? `planned ${text()}` : "not planned"),
      given(head.max_dollars) ? line(`at most ${Watch.dollars(head.max_dollars)}`) : null];
  }

  function memory({ measured, planned, capacity }) {
    const whole = capacity || (given(planned) ? Math.max(measured || 0, planned) : 0);
    const parts = [[(measured || 0) / whole, given(planned) && measured > planned ? "over" : "used"]];
    if (given(planned)) parts.push([planned / whole, "mark"]);
    return [h("b", {}, Watch.bytes(measured)), given(capacity) ? minor(` of ${Watch.bytes(capacity)}`) : null,
      line(given(planned) ? `planned ${Watch.bytes(planned)}` : "not planned"), whole ? meter(parts) : null];
  }

  /** Shows the head of a run. */
  Watch.showHead = function (run) {
    const { head } = run;
    const problem = run.error || (head && head.error);
    element("run-header").hidden = false;
    fill(element("run-name"), Watch.foreign(run.name));
    element("error").hidden = !problem;
    fill(element("error"), Watch.clipped(problem));
    if (!head) return;
    const since = Watch.living(head) && given(head.phase_since) ? ` for ${Watch.duration(head.now - head.phase_since)}` : "";
    fill(element("state"), Watch.statePill(head.state));
    const repeated = head.state_text === head.state ? "" : head.state_text + since;
    fill(element("phase"), Watch.foreign(repeated));
    for (const [id, write] of Object.entries(writers)) fill(element(id), write(head));
  };

  /** A link to more about something; a page of the documentation has a path, not an address. */
  Watch.reference = function (link) {
    if (!link) return null;
    if (/^https?:\/\//.test(link)) return h("a", { href: link, rel: "noreferrer noopener", target: "_blank" }, "Read more");
    return h("span", { class: "minor" }, "See ", h("code", {}, Watch.clipped(link)));
  };

  /** The list of what the run advises; null where it advises nothing. */
  Watch.adviceOf = function (run, onlyStep = null) {
    const advice = ((run.head && run.head.advice) || []).filter((one) => onlyStep === null || one.step === onlyStep);
    if (!advice.length) return null;
    return h("section", { class: "advice-box", "aria-label": "Advice" },
      h("h2", {}, advice.length === 1 ? "One thing to look at" : `${advice.length} things to look at`),
      h("ul", { id: "advice" }, advice.map((one) =>
        h("li", { data: { rule: one.rule } },
          h("p", {}, Watch.foreign(one.sentence, "b")),
          Watch.foreign(one.reason, "p"),
          h("p", { class: "set" }, h("a", { href: Watch.links.step(run.name, one.step) }, `Since step ${Watch.count(one.step)}`),
            Watch.reference(one.link))))));
  };

  function slider() {
    const shown = h("output", { for: "smoothing" }, `${Watch.look.smoothing} steps`);
    const kinds = [["exponential", "exponential"], ["average", "moving average"]];
    return [
      h("label", { for: "smoothing-kind" }, "Smoothing"),
      h("select", { id: "smoothing-kind", on: { change: (event) => { Watch.look.kind = event.target.value; Watch.redraw(); } } },
        kinds.map(([value, text]) => h("option", { value, selected: Watch.look.kind === value }, text))),
      h("input", { id: "smoothing", type: "range", min: 0, max: 50, value: Watch.look.smoothing, "aria-label": "Steps to smooth over",
        on: { input: (event) => {
          Watch.look.smoothing = Number(event.target.value);
          fill(shown, `${Watch.look.smoothing} steps`);
          Watch.redraw();
        } } }),
      shown,
    ];
  }

  /** Fields for the first and last step of the zoom, in step with it. */
  function zoomFields() {
    const field = (id, label) => h("input", { id, type: "number", min: 0, "aria-label": label, placeholder: "all", on: { change: apply } });
    const [from, to] = [field("zoom-from", "First step shown"), field("zoom-to", "Last step shown")];
    const reset = h("button", { id: "zoom-reset", type: "button", on: { click: () => Watch.zoom(null) } }, "Show all steps");
    function apply() {
      if (!from.value && !to.value) return Watch.zoom(null);
      const low = Number(from.value || 0);
      const last = Math.max(...Watch.look.runs.map((run) => run.lastStep || 0), 1);
      const high = Number(to.value || last);
      if (high > low) Watch.zoom([low, high]);
    }
    function show() {
      const { zoom } = Watch.look;
      [from.value, to.value] = zoom ? [Math.ceil(zoom[0]), Math.floor(zoom[1])] : ["", ""];
      reset.disabled = !zoom;
    }
    show();
    document.addEventListener("zoomed", show);
    return { nodes: [h("span", {}, "Steps"), from, "to", to, reset], end: () => document.removeEventListener("zoomed", show) };
  }

  /** The row of controls above charts. */
  Watch.controls = function () {
    const zoom = zoomFields();
    const pointed = h("span", { id: "pointed", class: "minor" });
    const point = (event) => fill(pointed, event.detail === null ? "" : `step ${Watch.count(event.detail)}`);
    document.addEventListener("pointed", point);
    const log = h("input", { id: "log-scale", type: "checkbox", checked: Watch.look.log,
      on: { change: (event) => { Watch.look.log = event.target.checked; Watch.redraw(); } } });
    const row = h("div", { id: "controls", role: "group", "aria-label": "How the curves are shown" },
      h("span", { class: "set" }, slider()), h("label", { class: "set" }, log, "Log scale"),
      h("span", { class: "set" }, zoom.nodes), pointed);
    const end = () => {
      zoom.end();
      document.removeEventListener("pointed", point);
    };
    return { row, end };
  };

  /** The runs whose curves can be laid over those of a run, to be checked; null if there is but one run. */
  function others(run) {
    const rest = Watch.list.runs.filter((one) => one.name !== run.name);
    if (!rest.length) return null;
    const box = (one) => h("label", {},
      h("input", { type: "checkbox", name: "with", value: one.name, checked: Watch.checked.has(one.name),
        on: { change: (event) => Watch.check(one.name, event.target.checked) } }),
      Watch.foreign(one.name), minor(` ${one.state}`));
    return h("details", { id: "compare", open: Watch.checked.size > 0 },
      h("summary", {}, `Lay other runs over the curves (${rest.length})`),
      Watch.scrolling("Runs to compare with", h("div", { class: "checks" }, rest.map(box))));
  }

  function legend() {
    const { runs } = Watch.look;
    if (runs.length < 2) return [];
    return runs.map((run, place) => {
      const line = h("span", { class: "swatch", "aria-hidden": "true" });
      line.style.backgroundColor = Watch.runColour(place);
      return h("li", {}, line, h("a", { href: Watch.links.run(run.name) }, Watch.foreign(run.name)));
    });
  }

  /** The comparison of two runs, as a report has it. */
  function comparison(head) {
    const found = head.comparison;
    if (!found) return null;
    const share = (value) => Watch.value(value, "share");
    const p = (value) => (given(value) ? value.toPrecision(2) : "–");
    const rows = found.difference.map((one) => [
      Watch.foreign(one.set), share(one.a), share(one.b), share(one.mean), `${share(one.low)} to ${share(one.high)}`,
      p(one.p_value), p(one.p_value_signs), Watch.count(one.problems), `${one.step_a}, ${one.step_b}`]);
    const columns = ["Held-out set", `>${head.name}`, `>${found.with}`, ">Difference", ">95% interval", ">p", ">p by signs",
      ">Problems", ">At steps"];
    const costs = [["Dollars", ...(found.dollars || []).map(Watch.dollars)], ["Hours", ...(found.hours || []).map((one) => one.toFixed(1))]];
    return h("section", { id: "comparison", "aria-label": "Comparison" },
      h("h2", {}, "Comparison with ", Watch.foreign(found.with)),
      Watch.scrolling("Comparison of held-out scores", Watch.table(columns, rows)),
      Watch.table(["Cost", `>${head.name}`, `>${found.with}`], costs),
      (found.notes || []).map((note) => Watch.foreign(note, "p")));
  }

  /** The names of the first charts, and of all others, of the runs that are shown. */
  function names(run) {
    const sets = (run.head && run.head.eval_sets) || [];
    const first = ["reward", ...sets.map((set) => `eval/${set}`), ...MAIN];
    const there = new Set(Watch.look.runs.flatMap((one) => Object.keys(one.columns)));
    const rest = [...there].filter((name) => !name.includes(":") && !first.includes(name)).sort();
    return { first: first.filter((name) => there.has(name)), rest };
  }

  /** Charts of metrics in a grid, added to as metrics appear. */
  class Grid {
    constructor(attributes) {
      this.element = h("div", { class: "grid", ...attributes });
      this.plots = new Map();
    }

    show(metrics) {
      for (const [name, plot] of this.plots) if (!metrics.includes(name)) this.drop(name, plot);
      metrics.forEach((name, place) => {
        if (!this.plots.has(name)) this.plots.set(name, Watch.metricPlot(name));
        const { element: shown } = this.plots.get(name);
        if (this.element.children[place] !== shown) this.element.insertBefore(shown, this.element.children[place] || null);
      });
      for (const plot of this.plots.values()) plot.update();
    }

    drop(name, plot) {
      plot.end();
      plot.element.remove();
      this.plots.delete(name);
    }

    end() {
      for (const [name, plot] of this.plots) this.drop(name, plot);
    }
  }
  Watch.Grid = Grid;

  /** A chart of a metric. */
  Watch.metricPlot = function (name) {
    const { unit, sentence } = (Watch.look.runs.find((run) => run.columns[name]) || Watch.look.runs[0]).about(name);
    const band = name === "response_length" ? "The band is where the middle 80% of responses are." : "";
    const words = [`${name}: ${sentence || ""}`, Watch.unit(unit) && `In ${unit}.`, band].filter(Boolean).join(" ");
    return new Watch.Plot({ title: Watch.title(name), note: words, key: name, modelled: () => Watch.curveModel(name) });
  };

  /** The view of a run's curves. */
  Watch.CurvesView = class {
    constructor(root, run) {
      Object.assign(this, { run, grid: new Grid({ id: "curves" }), more: new Grid({ id: "more-curves" }) });
      this.controls = Watch.controls();
      this.advice = h("div");
      this.legend = h("ul", { id: "legend", "aria-label": "Runs in the curves" });
      this.filter = h("input", { id: "filter-curves", type: "search", placeholder: "name", on: { input: () => this.update() } });
      this.folded = h("details", { id: "more", open: Watch.isReport, on: { toggle: () => this.update() } },
        h("summary", {}, "More curves"), h("p", { class: "set" }, h("label", { for: "filter-curves" }, "Only with"), this.filter), this.more.element);
      this.none = h("p", { class: "minor" }, "No step is done yet.");
      this.compare = h("div");
      this.comparison = h("div");
      this.details = Watch.isReport ? h("div") : null;
      Watch.put(root, [this.advice, this.comparison, this.compare, this.controls.row, h("h2", { class: "unseen" }, "Curves"),
        this.legend, this.none, this.grid.element, this.details, this.folded]);
      this.shown = {};
      this.update();
    }

    /** Fills a part if what it is made of is not what it was. */
    refill(part, key, make) {
      const text = JSON.stringify(key);
      if (this.shown[part] === text) return;
      this.shown[part] = text;
      fill(this[part], make());
    }

    update() {
      const { run } = this;
      if (!run.head) return;
      const { first, rest } = names(run);
      this.refill("advice", run.head.advice, () => Watch.adviceOf(run));
      this.refill("comparison", run.head.comparison, () => comparison(run.head));
      this.refill("compare", Watch.list.runs.map((one) => [one.name, one.state]), () => others(run));
      this.refill("legend", Watch.look.runs.map((one) => one.name), legend);
      if (this.details) this.refill("details", run.head, () => Watch.details(run));
      const wanted = this.filter.value.trim().toLowerCase();
      const drawn = JSON.stringify([Watch.look.runs.map((one) => [one.name, one.version]), this.folded.open, wanted]);
      if (this.shown.drawn === drawn) return;
      this.shown.drawn = drawn;
      this.none.hidden = first.length > 0;
      this.grid.show(first);
      this.folded.hidden = !rest.length;
      this.more.show(this.folded.open ? rest.filter((name) => name.toLowerCase().includes(wanted)) : []);
    }

    end() {
      this.controls.end();
      this.grid.end();
      this.more.end();
    }
  };
})(window.Watch);
