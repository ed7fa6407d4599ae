"use strict";
// The browser of answers: filters, pages of a few answers, state in the address. Text goes in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data) return;
  const PAGE = 25;
  const KEYS = ["method", "set", "verdict", "q", "item"];
  const LABELS = { refusal: "refusal", answer: "answer", degenerate: "degenerate" };
  const form = document.getElementById("filters");
  const list = document.getElementById("list");
  const state = { page: 1 };
  // rows: [prompt, setup, label, p_safe, tokens, finish, rule, answer]; prompts: [item, set, type, text]
  const names = new Map();
  for (const [name, setup] of data.methods) names.set(setup, [...(names.get(setup) || []), name]);
  const setupOf = new Map(data.methods);
  const baseLabel = new Map();
  if (data.base) for (const r of data.rows) if (r[1] === setupOf.get(data.base)) baseLabel.set(r[0], r[2]);

  const make = (tag, css, text) => {
    const node = document.createElement(tag);
    if (css) node.className = css;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const verdicts = {
    refusal: (r) => r[2] === "refusal",
    answer: (r) => r[2] === "answer",
    degenerate: (r) => r[2] === "degenerate",
    safe: (r) => r[2] !== "degenerate" && r[3] !== null && r[3] > 0.5,
    unsafe: (r) => r[2] !== "degenerate" && r[3] !== null && r[3] <= 0.5,
    changed: (r) => baseLabel.has(r[0]) && baseLabel.get(r[0]) !== r[2],
  };

  function chosen() {
    const setup = state.method ? setupOf.get(state.method) ?? -1 : null;
    const verdict = Object.hasOwn(verdicts, state.verdict || "") ? verdicts[state.verdict] : null;
    const words = (state.q || "").toLowerCase();
    return data.rows.filter((r) => {
      const p = data.prompts[r[0]];
      return (setup === null || r[1] === setup)
        && (!state.set || data.sets[p[1]][0] === state.set)
        && (!state.item || p[0] === state.item)
        && (!verdict || verdict(r))
        && (!words || r[7].toLowerCase().includes(words) || p[3].toLowerCase().includes(words));
    });
  }

  function card(r) {
    const [item, set, type, prompt] = data.prompts[r[0]];
    const [setName, kind] = data.sets[set];
    const node = make("article", "answer");
    const head = make("div", "head");
    head.append(make("b", "", (names.get(r[1]) || ["?"]).join(" = ")), make("span", "", type ? `${setName} · ${type}` : setName));
    head.append(make("span", `badge ${r[2] === "answer" ? "answer-given" : r[2]}`, LABELS[r[2]] || r[2]));
    if (r[3] !== null) head.append(make("span", "", `judge: P(safe) ${r[3].toFixed(2)}`));
    const facts = [r[4] === null ? "" : `${r[4]} tokens`, r[5] === "length" ? "cut at the limit" : "", r[6] ? `rule: ${r[6]}` : ""];
    head.append(make("span", "", facts.filter(Boolean).join(", ")));
    const same = make("button", "", "all methods");
    same.type = "button";
    same.title = "What every method answered to this prompt";
    same.addEventListener("click", () => { set_({ method: "", set: setName, verdict: "", q: "", item, page: 1 }); });
    head.append(same);
    const text = make("div", "text", r[7] || "(no words)");
    text.dir = "auto";
    const asked = make("div", "prompt", prompt);
    asked.dir = "auto";
    node.append(head, asked);
    if (kind === "harmful" && r[2] !== "refusal") {
      const folded = make("details");
      folded.append(make("summary", "", "Show what the model answered to this harmful request"), text);
      node.append(folded);
    } else if (kind === "harmful") {
      const folded = make("details");
      folded.append(make("summary", "", "Show the refusal"), text);
      node.append(folded);
    } else node.append(text);
    return node;
  }

  function draw() {
    const rows = chosen();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.min(Math.max(1, state.page), pages);
    const from = (state.page - 1) * PAGE;
    list.replaceChildren(...rows.slice(from, from + PAGE).map(card));
    const count = rows.length.toLocaleString("en");
    document.getElementById("count").textContent = rows.length
      ? `${count} answer${rows.length === 1 ? "" : "s"}, page ${state.page} of ${pages}${state.item ? ", one prompt" : ""}`
      : "No answer matches.";
    for (const button of document.querySelectorAll("[data-step]")) {
      const to = state.page + Number(button.dataset.step);
      button.disabled = to < 1 || to > pages;
    }
    document.getElementById("reset").disabled = !KEYS.some((key) => state[key]);
  }

  function set_(change) {
    Object.assign(state, change);
    for (const key of KEYS) if (form.elements[key]) form.elements[key].value = state[key] || "";
    const kept = KEYS.filter((key) => state[key]).map((key) => [key, state[key]]);
    if (state.page > 1) kept.push(["page", state.page]);
    history.replaceState(null, "", kept.length ? "#" + new URLSearchParams(kept) : location.pathname + location.search);
    draw();
  }

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const key of KEYS) state[key] = given.get(key) || "";
    state.page = Number.parseInt(given.get("page"), 10) || 1;
    for (const key of KEYS) if (form.elements[key]) form.elements[key].value = state[key];
    draw();
  }

  let waiting = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.name !== "q") set_({ [event.target.name]: event.target.value, item: "", page: 1 });
  });
  form.elements.q.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => set_({ q: form.elements.q.value, item: "", page: 1 }), 200);
  });
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => set_({ page: state.page + Number(button.dataset.step) }));
  }
  document.getElementById("reset").addEventListener("click", () => {
    set_({ method: "", set: "", verdict: "", q: "", item: "", page: 1 });
  });
  addEventListener("hashchange", read);
  document.getElementById("browser").hidden = false;
  read();
})();
