// Where the page's data comes from: the server, or in a report what is embedded in the page; and what is known of runs.
"use strict";

window.Watch = window.Watch || {};

(function (Watch) {
  const embedded = document.getElementById("embedded");
  const answers = embedded ? JSON.parse(embedded.textContent) : null;
  const GONE = [502, 503, 504]; // a tunnel's answers when nothing is behind it
  const PATIENCE_MS = 20000;

  Watch.isReport = answers !== null;
  Watch.LIVING = ["starting", "running", "saving"];

  /** The server did not answer. */
  Watch.Unreachable = class extends Error {};

  const listeners = [];
  let reachable = true;

  /** Calls back when the server stops or starts to answer. */
  Watch.onConnection = (listener) => listeners.push(listener);

  function setReachable(now) {
    if (now === reachable) return;
    reachable = now;
    for (const listener of listeners) listener(now);
  }

  /** The answer to a path; throws Unreachable, or an Error with the server's sentence. */
  Watch.get = async function (path) {
    if (answers) return fromReport(path);
    let response;
    let body = null;
    try {
      response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (GONE.includes(response.status)) throw new Error("gone");
      body = await response.text();
    } catch {
      setReachable(false);
      throw new Watch.Unreachable("The page's server does not answer.");
    }
    setReachable(true);
    return parsed(response, body);
  };

  function parsed(response, body) {
    let value = null;
    try {
      value = JSON.parse(body);
    } catch {
      throw new Error(`The page's server gave an answer that cannot be read; its status is ${response.status}.`);
    }
    if (!response.ok) throw new Error((value && value.error) || `The page's server answered ${response.status}.`);
    return value;
  }

  function fromReport(path) {
    const key = decodeURIComponent(path);
    if (key in answers) return answers[key];
    const [what, query] = key.split("?");
    const asked = /^rollout=(\d+)$/.exec(query || "");
    if (what.endsWith("/timeline") && asked && answers[what] && answers[what].rollout === Number(asked[1])) {
      return answers[what];
    }
    throw new Error("This is not part of this report.");
  }

  /** The path of something of a run, with a query of what is not empty in an object. */
  Watch.path = function (name, what, query = {}) {
    const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
    const text = given.map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
    return `api/run/${encodeURIComponent(name)}/${what}${text ? "?" + text : ""}`;
  };

  /** What is known of a run: its head, and its metrics by column. */
  class Run {
    constructor(name) {
      this.name = name;
      this.head = null;
      this.steps = [];
      this.columns = {};
      this.metrics = {};
      this.generation = null;
      this.version = 0; // grows with every change of the metrics
      this.error = null;
      this.asked = 0;
      this.asking = null;
    }

    get living() {
      return this.head !== null && Watch.LIVING.includes(this.head.state);
    }

    get lastStep() {
      return this.steps.length ? this.steps[this.steps.length - 1] : null;
    }

    /** Asks for what is new; one question at a time. */
    refresh() {
      this.asking = this.asking || this._refresh().finally(() => (this.asking = null));
      return this.asking;
    }

    async _refresh() {
      this.asked = Date.now();
      try {
        this.head = await Watch.get(Watch.path(this.name, "head"));
        if (this.generation === null || this.head.step !== this.lastStep) await this._refreshMetrics();
        this.error = null;
      } catch (error) {
        if (error instanceof Watch.Unreachable) throw error;
        this.error = error.message;
      }
    }

    async _refreshMetrics() {
      const known = this.steps.length ? { after: this.lastStep, generation: this.generation } : {};
      const answer = await Watch.get(Watch.path(this.name, "metrics", known));
      const goesOn = this.steps.length > 0 && answer.generation === this.generation;
      if (goesOn && !answer.steps.length) return;
      if (goesOn) this._append(answer);
      else Object.assign(this, { steps: answer.steps, columns: answer.columns, metrics: answer.metrics });
      this.generation = answer.generation;
      this.version += 1;
    }

    _append(answer) {
      const before = this.steps.length;
      const names = new Set([...Object.keys(this.columns), ...Object.keys(answer.columns)]);
      for (const name of names) {
        const old = this.columns[name] || new Array(before).fill(null);
        const added = answer.columns[name] || new Array(answer.steps.length).fill(null);
        this.columns[name] = old.concat(added);
      }
      this.steps = this.steps.concat(answer.steps);
      Object.assign(this.metrics, answer.metrics);
    }

    /** The value of a column at a step; null where there is none. */
    at(name, step) {
      const place = this.steps.indexOf(step);
      const column = this.columns[name];
      return column && place >= 0 && column[place] !== undefined ? column[place] : null;
    }

    /** Unit and sentence of a column. */
    about(name) {
      return this.metrics[name] || { unit: "", sentence: "" };
    }
  }

  const known = new Map();

  /** The one object of a run. */
  Watch.run = function (name) {
    if (!known.has(name)) known.set(name, new Run(name));
    return known.get(name);
  };

  Watch.list = { folder: "", runs: [] };

  /** Asks for the list of runs. */
  Watch.refreshList = async function () {
    Watch.list = await Watch.get("api/runs");
  };
})(window.Watch);
