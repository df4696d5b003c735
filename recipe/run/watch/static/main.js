// The page's course: which view is shown, by the address; what is asked again, and when; the list of runs, the details.
//
// What tests hold on to:
//   head        #state .pill, #phase, #step, #eta, #dollars, #step-seconds, #checkpoint, #gpu-memory, #host-memory, #error
//   page        #place, #views a[data-view], #connection, #announcement, #main[data-view]
//   runs        #runs tr[data-run], #runs input[name=with], #compare input[name=with]
//   curves      #advice li[data-rule], #controls, #smoothing, #smoothing-kind, #log-scale, #zoom-from, #zoom-to, #zoom-reset,
//               #pointed, #legend, #curves .chart[data-metric], #more, #filter-curves, #more-curves .chart[data-metric];
//               of a chart: .reading, .plot (role img), button (table of the values), .values; #comparison
//   time        #phases .chart, #phase-shares, #timeline .chart, #timeline-step, #tail, #time-curves .chart[data-metric]
//   step        #step-values, #step-phases, #timeline, #step-samples
//   samples     #filters, #filter-text and #filter-NAME for every filter, #filters-clear, #samples-found,
//               #samples-results tr[data-rollout][data-line], #samples-before, #samples-after, #samples-further
//   sample      #prompt-text, #sample-text .token[data-place], #token-reading, #colouring input[value], #grade-text, #group
//   details     #details, #difference, #versions, #hashes, #cost
"use strict";

(function (Watch) {
  const { h, fill, foreign } = Watch;
  const OFTEN_MS = 2000;
  const SELDOM_MS = 10000;
  const element = (id) => document.getElementById(id);
  const main = element("main");
  const VIEWS = [["curves", "Curves"], ["time", "Time"], ["samples", "Samples"], ["details", "Details"]];

  /** Names of the runs whose curves are laid over the page's own. */
  Watch.checked = new Set();
  /** The run of the page; null in the list of runs. */
  Watch.name = null;

  const encoded = (query) => Object.entries(query).filter(([, value]) => value !== "" && value !== null)
    .map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  const beside = (name) => [...Watch.checked].filter((other) => other !== name);

  function address(name, rest, query = {}) {
    const text = encoded(query);
    return `#/run/${encodeURIComponent(name)}${rest}${text ? "?" + text : ""}`;
  }

  const withOthers = (name) => ({ with: beside(name).map(encodeURIComponent).join(",") });
  Watch.links = {
    found: null, // the last search
    run: (name) => address(name, "", withOthers(name)),
    step: (name, step) => address(name, `/step/${step}`),
    samples: (name, query) => (Watch.links.found = address(name, "/samples", query)),
    sample: (name, rollout, line) => address(name, `/samples/${rollout}/${line}`),
    view: (name, view) => (view === "curves" ? Watch.links.run(name) : address(name, `/${view}`)),
  };

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  /** What an address shows: {view, name, query, ...}. */
  function routeOf(hash) {
    const [path, text = ""] = hash.replace(/^#\/?/, "").split("?");
    const query = Object.fromEntries(text.split("&").filter(Boolean).map((pair) => {
      const [key, ...value] = pair.split("=");
      return [key, decoded(value.join("="))];
    }));
    const [kind, name, view, ...rest] = path.split("/").map(decoded);
    if (kind !== "run" || !name) return { view: "runs", name: null, query };
    const numbers = rest.map(Number);
    if (view === "step" && Number.isInteger(numbers[0])) return { view, name, query, step: numbers[0] };
    if (view === "samples" && numbers.length === 2) return { view: "sample", name, query, rollout: numbers[0], line: numbers[1] };
    return { view: ["time", "samples", "details"].includes(view) ? view : "curves", name, query };
  }

  /** Tables of what a run was made of. */
  Watch.details = function (run) {
    const { head } = run;
    const pairs = (object) => Object.entries(object || {}).map(([name, value]) => [foreign(name), foreign(written(value), "code")]);
    const part = (id, title, columns, rows, none) => h("div", { id }, h("h3", {}, title),
      rows.length ? Watch.scrolling(title, Watch.table(columns, rows)) : h("p", {}, none));
    const difference = (head.difference_from_recipe || []).map((one) => [one.flag, one.recipe, one.run].map((word) => foreign(word, "code")));
    const recipe = head.recipe ? ` ${head.recipe}` : "";
    const versions = { ...head.versions, commit: head.commit, image: head.image };
    return h("div", { id: "details" }, h("h2", {}, "Details"),
      h("div", { class: "halves" },
        part("difference", `Difference from the recipe${recipe}`, ["Flag", "Recipe", "This run"], difference, "None: every flag is the recipe's."),
        part("cost", "Cost", ["What", ">Amount"], costs(head), "")),
      h("div", { class: "halves" },
        part("versions", "Versions", ["Of", "Version"], pairs(versions), "Not known."),
        part("hashes", "Hashes (SHA-256)", ["File", "Hash"], pairs(head.hashes), "None were taken.")));
  };

  const written = (value) => (typeof value === "object" && value !== null ? JSON.stringify(value) : String(value ?? "–"));

  function costs(head) {
    return [
      ["Began", Watch.date(head.began)], ["Time so far", Watch.duration(head.seconds_so_far)],
      ["GPUs", Watch.count(head.gpus)], ["Price of a GPU an hour", Watch.dollars(head.price)],
      ["Dollars so far", Watch.dollars(head.dollars_so_far)], ["Dollars to go", Watch.dollars(head.dollars_to_go)],
      ["Dollars at most", Watch.dollars(head.max_dollars)], ["Hours at most", Watch.value(head.max_hours)],
    ];
  }

  class DetailsView {
    constructor(root, run) {
      Object.assign(this, { root, run });
      this.update();
    }

    update() {
      const { head } = this.run;
      if (!head) return;
      const { difference_from_recipe: difference, versions, hashes, dollars_so_far: dollars } = head;
      const key = JSON.stringify([difference, versions, hashes, dollars]);
      if (key !== this.key) fill(this.root, Watch.details(this.run));
      this.key = key;
    }

    end() {}
  }

  class RunsView {
    constructor(root) {
      this.root = root;
      this.update();
    }

    row(run) {
      const box = h("input", { type: "checkbox", name: "with", value: run.name, "aria-label": `Compare ${run.name}`,
        checked: Watch.checked.has(run.name), on: { change: (event) => { Watch.check(run.name, event.target.checked); this.offer(); } } });
      const total = run.total_steps ? ` of ${Watch.count(run.total_steps)}` : "";
      const doing = foreign(run.state_text === run.state ? "" : run.state_text, "span", { class: "minor" });
      return [box, h("a", { href: Watch.links.run(run.name) }, foreign(run.name)), Watch.statePill(run.state), doing,
        [h("b", {}, Watch.count(run.step)), total], Watch.value(run.reward), Watch.value(run.held_out), Watch.dollars(run.dollars),
        Watch.date(run.changed)];
    }

    offer() {
      const [first] = Watch.checked;
      const enough = Watch.checked.size > 1;
      fill(this.compare, enough
        ? h("a", { class: "button", href: Watch.links.run(first) }, `Compare the ${Watch.checked.size} runs`)
        : "Check two runs or more to lay their curves over one another.");
    }

    update() {
      const { folder, runs } = Watch.list;
      const key = JSON.stringify(runs);
      if (key === this.key) return;
      this.key = key;
      const columns = ["Compare", "Run", "State", "Doing", ">Step", ">Reward", ">Held out", ">Dollars", ">Changed"];
      const table = Watch.table(columns, runs.map((run) => this.row(run)), { id: "runs" });
      runs.forEach((run, place) => {
        const row = table.tBodies[0].rows[place];
        row.dataset.run = run.name;
        columns.forEach((column, cell) => (row.cells[cell].dataset.label = column.replace(">", "")));
      });
      this.compare = h("p", { id: "compare-offer" });
      this.offer();
      fill(this.root, h("h1", {}, "Runs"), h("p", { class: "minor", dir: "auto" }, folder),
        runs.length ? Watch.scrolling("Runs", table) : h("p", {}, "No run is in this folder yet."), this.compare);
    }

    end() {}
  }

  const MADE = {
    runs: RunsView, curves: Watch.CurvesView, time: Watch.TimeView, step: Watch.StepView, samples: Watch.SamplesView,
    sample: Watch.SampleView, details: DetailsView,
  };

  let route = null;
  let entered = null; // the route that is on the page; before, it is loading
  let view = null;
  const scrolled = new Map(); // how far a view was scrolled, by its address

  function lookAt(name) {
    Watch.look.runs = name === null ? [] : [name, ...beside(name)].map(Watch.run);
  }

  /** Lays a run's curves over the page's own, or takes them away. */
  Watch.check = async function (name, wanted) {
    if (wanted) Watch.checked.add(name);
    else Watch.checked.delete(name);
    if (route.view !== "curves") return;
    history.replaceState(null, "", Watch.links.run(route.name));
    navigation();
    if (wanted) await ask(Watch.run(name));
    lookAt(route.name);
    view.update();
  };

  function navigation() {
    const { name } = route;
    const several = Watch.list.runs.length > 1;
    const list = h("a", { href: "#/", "aria-current": name === null ? "page" : null }, "Runs");
    fill(element("place"), several || name === null ? list : h("span", {}, "Run"), name === null ? null : foreign(name));
    const current = { sample: "samples" }[route.view] || route.view;
    fill(element("views"), name === null ? [] : VIEWS.map(([one, title]) =>
      h("a", { href: Watch.links.view(name, one), data: { view: one }, "aria-current": one === current ? "page" : null }, title)));
  }

  /** Shows what the address says. */
  async function go() {
    const before = route;
    if (location.hash && !location.hash.startsWith("#/")) return;
    route = routeOf(location.hash);
    if (route.view === "runs" && Watch.list.runs.length === 1) route = { ...route, view: "curves", name: Watch.list.runs[0].name };
    if (route.view === "curves" && (route.query.with || before === null)) {
      Watch.checked = new Set((route.query.with || "").split(",").filter(Boolean).map(decoded));
    }
    const shown = route;
    Watch.name = route.name;
    if (view) view.end();
    view = null;
    lookAt(route.name);
    navigation();
    main.dataset.view = element("top").dataset.view = route.view;
    element("run-header").hidden = route.name === null;
    fill(main, h("p", { class: "minor" }, "Loading."));
    if (route.name !== null) await Promise.all(Watch.look.runs.map(ask));
    if (route === shown) enter(before);
  }

  function enter(before) {
    entered = route;
    main.replaceChildren();
    const root = h("div", { class: "view" });
    main.append(root);
    const run = route.name === null ? null : Watch.run(route.name);
    const unknown = run && run.error && !run.head;
    if (!unknown) view = new MADE[route.view](root, run, route);
    show();
    if (before) {
      main.focus({ preventScroll: true });
      scrollTo(0, scrolled.get(location.hash) || 0);
    }
  }

  let announced = null;

  function show() {
    const run = route.name === null ? null : Watch.run(route.name);
    if (run) Watch.showHead(run);
    if (run && run.head && !view && entered === route) return enter(null);
    if (view) view.update();
    fill(document.querySelector("title"), titleOf(run));
    const state = run && run.head ? `${run.name}: ${run.head.state}` : null;
    if (state && announced !== null && state !== announced) fill(element("announcement"), `The run ${run.head.state_text}.`);
    announced = state;
  }

  function titleOf(run) {
    if (!run || !run.head) return run ? run.name : "Runs";
    const reward = (run.columns.reward || []).filter((value) => value !== null).at(-1);
    const parts = [`step ${run.head.step}`, reward === undefined ? null : `reward ${Watch.value(reward)}`, run.name];
    return parts.filter(Boolean).join(" · ");
  }

  /** Asks for what is new of a run; a server that does not answer is told of elsewhere. */
  async function ask(run) {
    try {
      await run.refresh();
    } catch (error) {
      if (!(error instanceof Watch.Unreachable)) throw error;
    }
  }

  let timer = null;
  let listed = 0;
  let lost = false;

  const due = (run, first) => first || Date.now() - run.asked >= SELDOM_MS;

  async function askList() {
    if (Date.now() - listed < SELDOM_MS && !lost) return;
    listed = Date.now();
    try {
      await Watch.refreshList();
    } catch (error) {
      if (!(error instanceof Watch.Unreachable)) fill(element("connection"), error.message);
    }
  }

  /** Asks for everything that the view shows, shows it, and comes again later. */
  async function tick() {
    clearTimeout(timer);
    if (document.hidden) return;
    const { runs } = Watch.look;
    await Promise.all([askList(), ...runs.filter((run, place) => due(run, place === 0)).map(ask)]);
    show();
    const often = lost || (runs.length && (!runs[0].head || runs[0].living));
    clearTimeout(timer);
    timer = setTimeout(tick, often ? OFTEN_MS : SELDOM_MS);
  }

  Watch.onConnection((reachable) => {
    lost = !reachable;
    fill(element("connection"), reachable ? "" : "The page's server does not answer; trying again.");
  });

  async function start() {
    element("skip").addEventListener("click", (event) => {
      event.preventDefault();
      main.focus();
    });
    document.addEventListener("scroll", () => { if (view) scrolled.set(location.hash, scrollY); }, { passive: true });
    await askList();
    const [first, second] = Watch.list.runs;
    if (Watch.isReport && !location.hash && first) {
      history.replaceState(null, "", address(first.name, "", second ? { with: encodeURIComponent(second.name) } : {}));
    }
    addEventListener("hashchange", go);
    await go();
    if (Watch.isReport) return;
    document.addEventListener("visibilitychange", tick);
    timer = setTimeout(tick, OFTEN_MS);
  }

  start();
})(window.Watch);
