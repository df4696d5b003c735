// Samples of a run: a search with filters, a table of what it finds, and one sample with its tokens and its group.
"use strict";

(function (Watch) {
  const { h, fill, foreign } = Watch;
  const PAGE = 50;
  const PAUSE_MS = 350; // after the last key of a filter
  const MOST_TOKENS = 20000; // before a button shows the rest
  const MOST_OF_TOKEN = 1000; // characters
  const MOST_OF_TEXT = 200000;
  const FILTERS = ["text", "prompt", "group", "min_reward", "max_reward", "min_length", "max_length", "finish", "grade",
    "from_step", "to_step", "sort", "descending"];

  const words = (text) => Watch.beginning(text ?? "–", 24).replace(/_/g, " ");

  /** A table of samples with a link to each. */
  Watch.sampleTable = function (name, rows, { id = null, here = null } = {}) {
    const columns = ["Sample", ">Step", ">Reward", ">Advantage", ">Length", "Finish", "Grade", "Prompt and response"];
    const table = Watch.table(columns, rows.map((row) => cells(name, row)), { id, class: "samples" });
    rows.forEach((row, place) => {
      const line = table.tBodies[0].rows[place];
      Object.assign(line.dataset, { rollout: row.rollout, line: row.line });
      if (here && row.rollout === here.rollout && row.line === here.line) line.setAttribute("aria-current", "true");
      line.addEventListener("click", (event) => {
        if (!event.target.closest("a") && !String(getSelection())) location.hash = Watch.links.sample(name, row.rollout, row.line);
      });
    });
    return table;
  };

  function cells(name, row) {
    return [
      h("a", { href: Watch.links.sample(name, row.rollout, row.line) }, `${row.rollout}/${row.line}`),
      h("a", { href: Watch.links.step(name, row.step) }, Watch.count(row.step)),
      h("b", {}, Watch.value(row.reward)), Watch.value(row.advantage), Watch.count(row.response_length),
      foreign(words(row.finish_reason)), foreign(words(row.grade)),
      h("div", { class: "beginnings" },
        h("span", { dir: "auto", class: "minor" }, Watch.beginning(row.prompt)), h("span", { dir: "auto" }, Watch.beginning(row.response))),
    ];
  }

  /** The form of filters. */
  class Filters {
    constructor(query, changed) {
      this.fields = {};
      const wait = () => {
        clearTimeout(this.waiting);
        this.waiting = setTimeout(changed, PAUSE_MS);
      };
      const submit = (event) => {
        event.preventDefault();
        clearTimeout(this.waiting);
        changed();
      };
      this.element = h("form", { id: "filters", role: "search", "aria-label": "Samples", on: { input: wait, submit } },
        this.labelled("text", "Text in prompt or response", this.field("text", query, { type: "search", maxlength: 1000 })),
        this.pair("Reward", "min_reward", "max_reward", query, "any"), this.pair("Length", "min_length", "max_length", query, 1),
        this.pair("Step", "from_step", "to_step", query, 1),
        this.labelled("finish", "Finish reason", this.choice("finish", query, [["", "any"]])),
        this.labelled("grade", "Grade", this.choice("grade", query, [["", "any"]])),
        this.labelled("prompt", "Prompt", this.field("prompt", query, { type: "number", min: 0, placeholder: "any" })),
        this.labelled("group", "Group", this.field("group", query, { type: "number", min: 0, placeholder: "any" })),
        this.labelled("sort", "Order by", this.choice("sort", query,
          [["newest", "step"], ["reward", "reward"], ["length", "length"], ["advantage", "advantage"]])),
        this.labelled("descending", "Direction", this.choice("descending", query, [["1", "largest first"], ["0", "smallest first"]])),
        h("button", { type: "button", id: "filters-clear", on: { click: () => { this.clear(); changed(); } } }, "Clear"));
    }

    field(name, query, attributes) {
      return (this.fields[name] = h("input", { id: `filter-${name}`, name, value: query[name] || null, autocomplete: "off", ...attributes }));
    }

    choice(name, query, options) {
      const chosen = query[name];
      const listed = chosen && !options.some(([value]) => value === chosen) ? [...options, [chosen, words(chosen)]] : options;
      const option = ([value, text]) => h("option", { value, selected: value === chosen }, text);
      return (this.fields[name] = h("select", { id: `filter-${name}`, name }, listed.map(option)));
    }

    labelled(name, label, field) {
      return h("div", { class: `field of-${name}` }, h("label", { for: `filter-${name}` }, label), field);
    }

    pair(label, low, high, query, step) {
      const one = (name, text) => this.field(name, query, { type: "number", step, "aria-label": `${label}, ${text}`, placeholder: text });
      return h("div", { class: "field pair" }, h("span", { class: "label" }, label), h("span", {}, one(low, "from"), one(high, "to")));
    }

    /** Offers the values that the run has. */
    offer(name, values) {
      const select = this.fields[name];
      const listed = new Set([...select.options].map((option) => option.value));
      for (const value of values || []) if (!listed.has(value)) select.append(h("option", { value }, words(value)));
    }

    clear() {
      clearTimeout(this.waiting);
      for (const field of Object.values(this.fields)) {
        if (field.tagName === "SELECT") field.selectedIndex = 0;
        else field.value = "";
      }
    }

    get query() {
      const usual = { sort: "newest", descending: "1" };
      const given = FILTERS.map((name) => [name, this.fields[name].value]).filter(([name, value]) => value !== "" && value !== usual[name]);
      return Object.fromEntries(given);
    }

    end() {
      clearTimeout(this.waiting);
    }
  }

  /** The view of the search. */
  Watch.SamplesView = class {
    constructor(root, run, { query }) {
      Object.assign(this, { run, query });
      this.filters = Watch.isReport ? null : new Filters(query, () => this.search(this.filters.query));
      this.said = h("p", { id: "samples-found", role: "status" });
      this.results = h("div", { id: "samples" });
      this.pages = h("nav", { id: "samples-pages", class: "set", "aria-label": "Pages of samples" });
      const sentence = "A report has the samples whose tokens were kept in the newest steps; the run's page searches all of them.";
      const only = Watch.isReport ? h("p", {}, sentence) : null;
      Watch.put(root, [h("h2", { class: "unseen" }, "Samples"), only, this.filters && this.filters.element, this.said, this.results, this.pages]);
      this.load();
    }

    update() {}

    /** Looks for something else, and has the address say so. */
    search(query) {
      this.query = query;
      history.replaceState(null, "", Watch.links.samples(this.run.name, query));
      this.load();
    }

    async load() {
      const asked = (this.asked = {});
      this.results.setAttribute("aria-busy", "true");
      try {
        const found = await Watch.get(Watch.path(this.run.name, "samples", Watch.isReport ? {} : this.query));
        if (asked === this.asked) this.show(found);
      } catch (error) {
        if (asked !== this.asked) return;
        fill(this.said, "");
        fill(this.results, h("p", { class: "error" }, error.message));
        fill(this.pages, []);
      }
      this.results.removeAttribute("aria-busy");
    }

    show(found) {
      const first = Number(this.query.offset || 0);
      const { length } = found.rows;
      const range = length ? `, ${Watch.count(first + 1)} to ${Watch.count(first + length)} shown` : "";
      const before = this.query.before_step ? ` before step ${Watch.count(Number(this.query.before_step))}` : "";
      fill(this.said, found.matches === 1 ? `1 sample${before}.` : `${Watch.count(found.matches)} samples${before}${range}.`);
      if (this.filters) {
        this.filters.offer("finish", found.finish_reasons);
        this.filters.offer("grade", found.grades);
      }
      const table = () => Watch.sampleTable(this.run.name, found.rows, { id: "samples-results" });
      fill(this.results, length ? table() : h("p", {}, "No sample has all of this."));
      this.turn(found, first);
    }

    turn(found, first) {
      const button = (id, text, change, there) => there
        ? h("button", { id, type: "button", on: { click: () => this.search({ ...this.query, ...change }) } }, text) : null;
      const last = first + found.rows.length;
      fill(this.pages,
        button("samples-before", "Page before", { offset: Math.max(0, first - PAGE) || "" }, first > 0),
        button("samples-after", "Page after", { offset: last }, last < found.matches),
        found.complete ? null : h("span", {}, `The search ran out of time at step ${Watch.count(found.searched_from_step)}.`),
        button("samples-further", "Search further", { before_step: found.searched_from_step, offset: "" }, !found.complete));
    }

    end() {
      if (this.filters) this.filters.end();
    }
  };

  const SEQUENTIAL = [0.05, 0.2, 0.5, 1, 2, 4, 8];
  const COLOURINGS = {
    none: { title: "No colour", level: () => "" },
    log_prob: {
      title: "Log-prob", bounds: SEQUENTIAL, what: "-log p of the token under the engine",
      of: (tokens, place) => (tokens.log_probs || [])[place],
      level: (value) => { const level = SEQUENTIAL.filter((bound) => -value >= bound).length; return level ? `q${level}` : ""; },
    },
    advantage: {
      title: "Advantage", bounds: [0.1, 0.5, 1, 2], what: "below 0 orange, above 0 blue",
      of: (tokens, place) => (tokens.advantages || [])[place],
    },
    difference: {
      title: "Train/rollout difference", bounds: [0.01, 0.05, 0.2, 0.7], of: difference,
      what: "trainer's log-prob - engine's; below 0 orange, above 0 blue",
    },
  };
  for (const one of [COLOURINGS.advantage, COLOURINGS.difference]) one.level = (value) => diverging(value, one.bounds);

  function difference({ trainer_log_probs: trainer, log_probs: engine }, place) {
    const there = trainer && Number.isFinite(trainer[place] ?? NaN) && Number.isFinite(engine[place] ?? NaN);
    return there ? trainer[place] - engine[place] : null;
  }

  function diverging(value, bounds) {
    const level = bounds.filter((bound) => Math.abs(value) >= bound).length;
    return level ? `${value < 0 ? "n" : "p"}${level}` : "";
  }

  /** A response's tokens, coloured, with the numbers of the one pointed at. */
  class Tokens {
    constructor(tokens) {
      Object.assign(this, { tokens, at: null, kind: tokens.log_probs ? "log_prob" : "none" });
      const on = { mouseover: (event) => this.point(event.target), keydown: (event) => this.step(event), focus: () => this.mark(this.at ?? 0) };
      this.text = h("div", { id: "sample-text", class: "text", dir: "auto", tabindex: "0", role: "region",
        "aria-label": "Response; arrow keys go from token to token", on });
      this.reading = h("p", { id: "token-reading", "aria-live": "polite" }, "Point at a token, or go through them with the arrow keys.");
      this.key = h("p", { class: "key" });
      this.more = h("p");
      this.extend(MOST_TOKENS);
      this.colour();
    }

    choices() {
      const known = (of) => this.tokens.pieces.some((_, place) => Number.isFinite(of(this.tokens, place) ?? NaN));
      const there = Object.entries(COLOURINGS).filter(([, { of }]) => !of || known(of));
      const one = ([value, { title }]) => h("label", {},
        h("input", { type: "radio", name: "colouring", value, checked: value === this.kind,
          on: { change: () => { this.kind = value; this.colour(); } } }), title);
      return h("fieldset", { id: "colouring" }, h("legend", {}, "Colour tokens by"), there.map(one));
    }

    extend(most) {
      const { pieces } = this.tokens;
      const first = this.text.children.length;
      const added = document.createDocumentFragment();
      for (let place = first; place < Math.min(pieces.length, first + most); place += 1) {
        added.append(h("span", { class: "token", data: { place } }, Watch.clipped(pieces[place], MOST_OF_TOKEN)));
      }
      this.text.append(added);
      const left = pieces.length - this.text.children.length;
      const go = () => { this.extend(Infinity); this.colour(); };
      fill(this.more, left ? h("button", { type: "button", on: { click: go } }, `Show the other ${Watch.count(left)} tokens`) : "");
    }

    colour() {
      const { of, level, bounds, what } = COLOURINGS[this.kind];
      [...this.text.children].forEach((span, place) => {
        const value = of ? of(this.tokens, place) : null;
        const kind = Number.isFinite(value ?? NaN) ? level(value) : "";
        span.className = kind ? `token ${kind}` : "token";
      });
      if (this.at !== null) this.mark(this.at);
      const swatch = (letter) => (bound, place) =>
        h("span", { class: `token ${letter}${place + 1}` }, `${letter === "n" ? "-" : ""}${bound}`);
      const swatches = (letter) => (bounds || []).map(swatch(letter));
      const scale = this.kind === "log_prob" ? swatches("q") : [...swatches("n").reverse(), ...swatches("p")];
      fill(this.key, bounds ? [...scale, h("span", { class: "minor" }, ` ${what}`)] : "");
    }

    point(target) {
      if (target.dataset.place !== undefined) this.mark(Number(target.dataset.place));
    }

    step(event) {
      const by = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      this.mark(Math.max(0, Math.min(this.text.children.length - 1, (this.at ?? 0) + by)));
      this.text.children[this.at].scrollIntoView({ block: "nearest" });
    }

    mark(place) {
      const { tokens, text } = this;
      if (!text.children[place]) return;
      if (this.at !== null) text.children[this.at].classList.remove("marked");
      this.at = place;
      text.children[place].classList.add("marked");
      const number = (name, values) => (values && Number.isFinite(values[place] ?? NaN) ? [name, values[place].toFixed(4)] : null);
      const apart = difference(tokens, place);
      const found = [number("log-prob", tokens.log_probs), number("trainer's", tokens.trainer_log_probs),
        apart === null ? null : ["difference", apart.toFixed(4)], number("advantage", tokens.advantages)].filter(Boolean);
      fill(this.reading, h("span", {}, `Token ${Watch.count(place + 1)} of ${Watch.count(tokens.pieces.length)} `),
        foreign(JSON.stringify(tokens.pieces[place]).slice(0, 80), "code"),
        found.map(([name, value]) => h("span", {}, `${name} `, h("b", {}, value))));
    }
  }

  /** A text with what was left out of its middle. */
  function longText(sample, name, attributes) {
    const left = sample[`${name}_left_out`];
    return h("div", { class: "text", dir: "auto", tabindex: "0", role: "region", ...attributes }, Watch.clipped(sample[name], MOST_OF_TEXT),
      left ? h("em", {}, ` … ${Watch.count(left)} characters are left out here … `) : null, left ? sample[`${name}_end`] || "" : null);
  }

  /** The view of one sample. */
  Watch.SampleView = class {
    constructor(root, run, { rollout, line }) {
      Object.assign(this, { root, run, rollout, line });
      this.load();
    }

    update() {}

    async load() {
      const { root, run, rollout, line } = this;
      try {
        const sample = await Watch.get(Watch.path(run.name, "sample", { rollout, line }));
        if (root.isConnected) this.show(sample);
      } catch (error) {
        fill(root, h("h2", {}, "Sample"), h("p", { class: "error" }, error.message));
      }
    }

    facts(sample) {
      const rows = [
        ["Reward", Watch.value(sample.reward)], ["Advantage", Watch.value(sample.advantage)], ["Grade", foreign(words(sample.grade))],
        ["Answer", foreign(Watch.beginning(sample.answer ?? "–"))], ["Label", foreign(Watch.beginning(sample.label ?? "–"))],
        ["Length", `${Watch.count(sample.response_length)} tokens after ${Watch.count(sample.prompt_length)}`],
        ["Finish", foreign(words(sample.finish_reason))], ["Mean log-prob", Watch.value(sample.mean_log_prob)],
        ["Weights", (sample.weight_versions || []).join(", ") || "–"],
        ["Prompt", foreign([sample.source, Watch.count(sample.prompt_index)].filter(Boolean).join(" "))],
        ["Group", Watch.count(sample.group)],
      ];
      return h("dl", { class: "facts sample-facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    }

    response(sample) {
      if (!sample.tokens) {
        return [h("h3", {}, "Response"), h("p", { class: "minor" }, sample.tokens_missing || ""),
          longText(sample, "response", { id: "sample-text", "aria-label": "Response" })];
      }
      const tokens = new Tokens(sample.tokens);
      const missing = sample.differences_missing ? h("p", { class: "minor" }, sample.differences_missing) : null;
      return [h("h3", {}, "Response"), tokens.choices(), tokens.key, missing, tokens.reading, tokens.text, tokens.more];
    }

    show(sample) {
      const { root, run } = this;
      const here = { rollout: this.rollout, line: this.line };
      fill(root,
        h("p", { class: "set" }, h("a", { href: Watch.links.found || Watch.links.samples(run.name, {}) }, "Back to the samples")),
        h("h2", { class: "of-sample" }, `Sample ${sample.rollout}/${sample.line} of `,
          h("a", { href: Watch.links.step(run.name, sample.step) }, `step ${Watch.count(sample.step)}`)),
        this.facts(sample), foreign(sample.grade_text, "p", { id: "grade-text", class: "verdict" }),
        h("div", { class: "reading-room" },
          h("section", { "aria-label": "Texts" }, h("h3", {}, "Prompt"),
            longText(sample, "prompt", { id: "prompt-text", "aria-label": "Prompt" }), this.response(sample)),
          h("section", { id: "group", "aria-label": "Group" }, h("h3", {}, `Group of ${Watch.count((sample.group_rows || []).length)}`),
            Watch.sampleTable(run.name, sample.group_rows || [], { here }))));
    }

    end() {}
  };
})(window.Watch);
